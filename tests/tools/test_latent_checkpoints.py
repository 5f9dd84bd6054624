"""Checkpoints with latent projections: the tools carry them, count them, or refuse in one line, and never drop them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import ranks
import torch
import training
from checkpoint_files import TOOLS
from training import STOCK_SHARED_EXPERT, with_flags, without_flag

sys.path.insert(0, str(TOOLS))
import convert_checkpoint as tool
from checkpoints.contents.anatomy import describe
from checkpoints.disk.torch_dist import MegatronCheckpoint

FLAGS = with_flags(STOCK_SHARED_EXPERT, "--moe-latent-size 16", "--train-iters 1", "--save-interval 1")
PROJECTIONS = {f"decoder.layers.{block}.mlp.fc{n}_latent_proj.weight" for block in (1, 3) for n in (1, 2)}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "run"
    printed = ranks.run(training.train, 1, [*FLAGS, "--save", str(folder)], timeout_s=180)[0]
    assert "exit code" not in printed, printed[-3000:]
    return folder


def convert(source: Path, target: Path, *words: str) -> int:
    common = ["--from", "megatron", "--load", str(source), "--save", str(target)]
    return tool.main([*common, *words])


def weights(folder: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    tensors = ranks.run(training.checkpoint_tensors, 1, folder, iteration)[0]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer")}


def test_the_other_spec_and_back(checkpoint, tmp_path):
    """Bit for bit, and a run loads the result."""
    there, back = tmp_path / "there", tmp_path / "back"
    assert convert(checkpoint, there, "--to", "megatron", "--transformer-impl", "transformer_engine") == 0
    assert convert(there, back, "--to", "megatron", "--transformer-impl", "local") == 0
    before, after = weights(checkpoint, 1), weights(back)
    assert PROJECTIONS <= before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    flags = with_flags(without_flag(FLAGS, "--save-interval"), f"--load {back}", "--finetune")
    printed = ranks.run(training.train, 1, flags, timeout_s=180)[0]
    assert "exit code" not in printed, printed[-3000:]


def test_upcycling_keeps_them(checkpoint, tmp_path):
    assert convert(checkpoint, tmp_path / "up", "--to", "megatron", "--position", "pos1", "--skip-change") == 0
    before, after = weights(checkpoint, 1), weights(tmp_path / "up")
    assert all(torch.equal(before[name], after[name]) for name in PROJECTIONS)


@pytest.mark.parametrize("target", ["hf-scmoe", "hf-longcat"])
def test_hugging_face_has_no_place_for_them(checkpoint, tmp_path, capsys, target):
    assert convert(checkpoint, tmp_path / "hf", "--to", target) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "hf").exists()
    assert "--moe-latent-size 16" in error or target == "hf-longcat"


def test_they_are_counted(checkpoint):
    found = describe(MegatronCheckpoint(checkpoint))
    assert found["architecture"]["moe_latent_size"] == 16
    kinds = found["parameters"]["by_kind"]
    assert kinds["latent projections"] == 2 * 2 * 16 * 32
    assert kinds["routed experts"] == 2 * 4 * (48 * 16 + 16 * 24)
