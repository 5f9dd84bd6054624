"""checkpoints/running/verify.py: two checkpoints compute the same, or it is said where they do not."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import ranks
import training
from test_score import MODELS, VOCABULARY, longcat, random_ids
from training import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from checkpoints.running import verify as running
from checkpoints.running.verify import compare, random_tokens, verify
from checkpoints.tensors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("longcat") / "folder"
    longcat(folder)
    return folder


def changed(folder, target, name, change):
    """A copy of a folder with one element of one tensor changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[5] += change
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_logits(request):
    running._write_logits(*request)


@pytest.fixture
def no_start_up(monkeypatch):
    """Models run here, or forked where Megatron's backend is needed; the other tests have the tool's own processes."""

    def run(request):
        folder, *others = json.loads(request)
        if (Path(folder) / "config.json").exists():
            write_logits([folder, *others])
        else:
            ranks.run(write_logits, 1, [folder, *others], distributed=False)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(running, "_in_a_process", run)


@pytest.mark.full
def test_a_copy_computes_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    tokens = random_ids(3, 5).astype(numpy.int64)
    found = verify(folder, "hf-longcat", tmp_path / "copy", "hf-longcat", tokens=tokens)
    assert found["passed"] and found["largest_difference"] == found["relative_difference"] == 0.0
    assert (found["rows"], found["tokens"], found["same_first_choice"]) == (3, 15, 1.0)
    json.dumps(found, allow_nan=False)  # it goes into a receipt


@pytest.mark.usefixtures("no_start_up")
def test_one_changed_element_is_found(folder, tmp_path):
    """Negative control: a single element of a single matrix, by a little."""
    other = changed(folder, tmp_path / "other", "model.layers.0.mlps.0.gate_proj.weight", 0.05)
    found = verify(folder, "hf-longcat", other, "hf-longcat", tolerance=1e-7)
    assert not found["passed"] and 1e-7 < found["largest_difference"] < 0.1
    assert found["tokens"] == 2 * 64


@pytest.mark.usefixtures("no_start_up")
def test_a_nan_does_not_pass(folder, tmp_path):
    other = changed(folder, tmp_path / "other", "model.norm.weight", math.nan)
    found = verify(folder, "hf-longcat", other, "hf-longcat", tolerance=1e9)
    assert not found["passed"] and found["largest_difference"] is None


@pytest.mark.usefixtures("no_start_up")
def test_megatron_checkpoints(tmp_path):
    """Weights of two iterations differ, a checkpoint and itself do not; ids lie in its vocabulary and window."""
    flags = [*MODELS["scmoe"], "--save", str(tmp_path / "save")]
    flags = training.with_flags(flags, "--train-iters 2", "--save-interval 1")
    ranks.run(training.train, 1, flags, timeout_s=240)
    one, two = (tmp_path / "save" / f"iter_000000{n}" for n in (1, 2))
    tokens = random_tokens(one, two)
    assert tokens.shape == (2, 16) and tokens.max() < VOCABULARY
    assert numpy.array_equal(tokens, random_tokens(one, two))
    assert verify(two, "megatron", tmp_path / "save", "megatron")["largest_difference"] == 0.0
    assert not verify(one, "megatron", two, "megatron")["passed"]


def test_what_does_not_run_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))
    with pytest.raises(CheckpointError, match=r"the source \(hf-longcat\) does not run: .*other"):
        verify(tmp_path / "other", "hf-longcat", folder, "hf-longcat")


def test_compare_by_hand():
    one = numpy.zeros((1, 2, 3), dtype=numpy.float32)
    one[0, 1] = 3, 4, 0
    other = numpy.zeros((1, 2, 4), dtype=numpy.float32)
    other[0, 1] = 3, 4.5, 0, 100  # the fourth id is not in the first one's vocabulary
    found = compare(one, other)
    assert found["largest_difference"] == 0.5
    assert found["largest_difference_at"] == {"row": 0, "position": 1, "token_id": 1}
    assert found["relative_difference"] == pytest.approx(0.5 / 5)
    assert found["same_first_choice"] == 1.0 and found["vocabularies"] == [3, 4]
