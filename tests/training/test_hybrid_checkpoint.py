"""Checkpoints of hybrid models in training: the stock model's by keys, and what a converter made of a GPT's."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import entry
import pytest
import training
from cases import cases
from checkpoint_files import TOOLS
from test_checkpoint import EP2, FULLY_RESHARDABLE, assert_all_travels_to_scmoe_and_back, train
from training import SCMOE, STOCK_SHARED_EXPERT, with_flags, without_flag

sys.path.insert(0, str(TOOLS))
import convert_checkpoint as tool

MAMBA = ("--mamba-num-heads 4", "--mamba-head-dim 8", "--mamba-state-dim 8", "--mamba-num-groups 2")
PATTERNS = {"blocks": "*-*E*-*E", "mamba": "M*-E*-ME"}


def as_hybrid(flags: list[str], pattern: str, *changes: str) -> list[str]:
    for name in ("--num-layers", "--moe-layer-freq"):
        if name in flags:
            flags = without_flag(flags, name)
    return with_flags(flags, f"--hybrid-layer-pattern {pattern}", *(MAMBA if "M" in pattern else ()), *changes)


@pytest.mark.parametrize("name", cases(PATTERNS, ["mamba"]))
def test_stock_hybrid_loads_as_scmoe_and_back(tmp_path, name):
    """Every weight and both moments of every parameter survive the way there and back, under the same keys."""
    shared = (EP2, "--use-distributed-optimizer", FULLY_RESHARDABLE, "--train-iters 3", "--shortcut-resume changed")
    stock = as_hybrid(STOCK_SHARED_EXPERT, PATTERNS[name], *shared)
    scmoe = as_hybrid(SCMOE, PATTERNS[name], *shared)
    assert_all_travels_to_scmoe_and_back(stock, scmoe, tmp_path)


def test_scmoe_trains_on_from_a_stock_hybrid_as_another_function(tmp_path):
    """Negative control: the weights are the same and the wiring is not, so the very next loss differs."""
    stock = as_hybrid(STOCK_SHARED_EXPERT, PATTERNS["mamba"], EP2, "--train-iters 4")
    train(with_flags(stock, f"--save {tmp_path}/stock", "--save-interval 4"))
    common = ("--train-iters 5", "--override-opt-param-scheduler", f"--load {tmp_path}/stock")
    train(with_flags(stock, *common, f"--tensorboard-dir {tmp_path}/a"))
    scmoe = as_hybrid(SCMOE, PATTERNS["mamba"], EP2, "--shortcut-resume changed")
    train(with_flags(scmoe, *common, f"--tensorboard-dir {tmp_path}/b"))
    one, other = (training.scalars(tmp_path / d, "lm loss")["lm loss"] for d in "ab")
    assert sorted(one) == sorted(other) == [5]
    assert abs(one[5] - other[5]) > 1e-5  # rounding is a tenth of that at most


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> Path:
    """A checkpoint of a GPT model."""
    folder = tmp_path_factory.mktemp("gpt") / "save"
    train(with_flags(SCMOE, "--train-iters 1", f"--save {folder}", "--save-interval 1"), world_size=1)
    return folder


@pytest.fixture(scope="module")
def layers(blocks, tmp_path_factory) -> Path:
    """The same as a hybrid model's."""
    folder = tmp_path_factory.mktemp("hybrid") / "save"
    words = ["--from", "megatron", "--to", "megatron", "--container", "hybrid", "--load", str(blocks)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert tool.main([*words, "--save", str(folder)]) == 0
    return folder


def test_a_converted_checkpoint_trains_on(blocks, layers, tmp_path):
    """In its container, by its own arguments, with the losses of the other container."""
    steps = ("--train-iters 2", "--finetune")
    hybrid = as_hybrid(SCMOE, PATTERNS["blocks"])
    restored = with_flags(without_flag(hybrid, "--hybrid-layer-pattern"), "--use-checkpoint-args")
    runs = {
        "gpt": with_flags(SCMOE, f"--load {blocks}"),
        "hybrid": with_flags(hybrid, f"--load {layers}"),
        "restored": with_flags(restored, f"--load {layers}"),
    }
    losses = {}
    for name, flags in runs.items():
        train(with_flags(flags, *steps, f"--tensorboard-dir {tmp_path}/{name}"), world_size=1)
        losses[name] = training.scalars(tmp_path / name, "lm loss")["lm loss"]
    assert sorted(losses["gpt"]) == [1, 2]
    assert losses["hybrid"] == losses["restored"] == losses["gpt"]


def test_checkpoints_of_other_layers_are_refused(blocks, layers):
    hybrid = as_hybrid(SCMOE, PATTERNS["blocks"], f"--load {layers}")
    entry.assert_refused(
        [
            (with_flags(SCMOE, f"--load {layers}"), ["is not set and", "has *-*E*-*E", "--container gpt", "or set it"]),
            (with_flags(hybrid, f"--load {blocks}"), ["is *-*E*-*E and", "has none", "--container hybrid"]),
            (
                with_flags(hybrid, "--hybrid-layer-pattern *-*E*E-*", "--shortcut-position pos1"),
                ["a parameter belongs to its layer", "is *-*E*E-* and", "has *-*E*-*E", "use its pattern"],
            ),
        ]
    )
    entry.assert_accepted([hybrid])
    cut = with_flags(hybrid, "--hybrid-layer-pattern *-*E|*-*E", "--pipeline-model-parallel-size 2")
    entry.assert_accepted([cut], entry.world(2))
