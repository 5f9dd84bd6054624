"""Files that are empty, torn, somebody else's or of a version to come: one line that names the file, and no output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import numpy
import pytest
import small_checkpoints
from training import ROOT

TOOLS = ROOT / "tools"
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "nothing in it": lambda content: b"{}",
    "newer": lambda content: json.dumps({"format_version": 99}).encode(),
}
TOKENS = ("empty", "half", "a list")
READ = {
    "convert, settings": ("convert_checkpoint.py", "dense/config.json", DAMAGES),
    "convert, tensors": ("convert_checkpoint.py", "dense/model.safetensors", TOKENS),
    "inspect, settings": ("inspect_checkpoint.py", "dense/config.json", ("empty", "half", "a list")),
    "inspect, tensors": ("inspect_checkpoint.py", "dense/model.safetensors", TOKENS),
    "score, ids": ("score.py", "ids.npy", TOKENS),
    "data, lines": ("preprocess_data.py", "a.jsonl", ("half", "a list", "nothing in it", "newer")),
    "data, tokenizer": ("preprocess_data.py", "tokenizer.model", DAMAGES),
}
CASES = [(name, damage) for name, (_, _, damages) in READ.items() for damage in damages]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    small_checkpoints.dense(home / "dense")
    numpy.save(home / "ids.npy", numpy.arange(20) % 7)
    (home / "a.jsonl").write_text('{"text": "one two three"}\n')
    text = (TOOLS / "convert_checkpoint.py").read_text()
    (home / "b.txt").write_text(text)
    words = ("--input", home / "b.txt", "--output", home / "data", "--vocab-size", 400, "--workers", 1)
    assert commands.run(TOOLS / "preprocess_data.py", *words).returncode == 0
    (home / "data" / "tokenizer.model").rename(home / "tokenizer.model")
    return home


def words(script: str, home: Path) -> tuple[object, ...]:
    new = home / "new"
    convert = ("--from", "hf-dense", "--to", "megatron", "--experts", 2, "--skip-change")
    return {
        "convert_checkpoint.py": (*convert, "--load", home / "dense", "--save", new),
        "inspect_checkpoint.py": (home / "dense", "--norms", "--json", new),
        "score.py": ("--load", home / "dense", "--input", home / "ids.npy", "--output", new),
        "preprocess_data.py": (
            *("--input", home / "a.jsonl", "--tokenizer-model", home / "tokenizer.model", "--workers", 1),
            *("--output", new),
        ),
    }[script]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_it_is_refused_in_one_line(name, damage, inputs, tmp_path):
    script, file, _ = READ[name]
    home = tmp_path / "home"
    shutil.copytree(inputs, home)
    path = home / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    done = commands.run(TOOLS / script, *words(script, home), timeout_s=60)
    lines = [line for line in done.stderr.splitlines() if " error: " in line]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-800:]
    assert path.name in done.stderr and not (home / "new").exists(), done.stderr
    assert not [other.name for other in home.iterdir() if other.name.startswith(".")]


@pytest.mark.parametrize("script", ["convert_checkpoint.py", "inspect_checkpoint.py", "preprocess_data.py"])
def test_whole_files_are_read(script, inputs, tmp_path):
    """Negative control."""
    home = tmp_path / "home"
    shutil.copytree(inputs, home)
    done = commands.run(TOOLS / script, *words(script, home), timeout_s=60)
    assert done.returncode == 0 and (home / "new").exists(), done.stderr


@pytest.mark.parametrize("damage", ["empty", "half", "a list", "newer"])
def test_a_conversion_that_was_begun_by_another_version_is_kept_or_begun_anew(damage, inputs, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(inputs, home)
    plan = home / ".new.partial" / "plan.json"
    plan.parent.mkdir()
    plan.write_bytes(DAMAGES[damage](json.dumps({"version": 1, "plan": "another"}).encode()))
    before = plan.read_bytes()
    done = commands.run(TOOLS / "convert_checkpoint.py", *words("convert_checkpoint.py", home), timeout_s=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "rm -r" in done.stderr, done.stderr
    assert not (home / "new").exists() and (not plan.exists() or plan.read_bytes() == before)
