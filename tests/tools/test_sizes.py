"""Every size that a tool can be asked for: no number, none, or more than there is ends in one line, before any work."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import commands
import numpy
import pytest
import small_checkpoints
from training import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
NAMES = ("convert_checkpoint", "preprocess_data", "score", "slow_link", "ablate_codec", "ablate_overlap")
NO_NUMBERS = ("-1", "100000000000000000000", "9" * 5000, "nan", "inf", "1e999", "\u0663", "", "1 2")
NONE_IS_A_SIZE = {"--document-kib", "--grace", "--expert-noise", "--drop-ratio", "--verify-tolerance"}


def numeric_options() -> list[tuple[str, str]]:
    """Of all tools but trace.py, whose numbers are those that are in its report."""
    return [
        (name, action.option_strings[0])
        for name in NAMES
        for action in importlib.import_module(name).make_parser()._actions
        if action.option_strings and action.type not in (None, str, Path)
    ]


def test_the_options_are_found():
    assert len(numeric_options()) > 30


@pytest.mark.parametrize(("name", "flag"), numeric_options())
def test_no_number_is_taken(name, flag):
    (action,) = (one for one in importlib.import_module(name).make_parser()._actions if flag in one.option_strings)
    for text in (*NO_NUMBERS, *(() if flag in NONE_IS_A_SIZE else ("0",))):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            action.type(text)
        assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    small_checkpoints.dense(home / "dense")
    convert = (TOOLS / "convert_checkpoint.py", "--from", "hf-dense", "--to", "megatron", "--load", home / "dense")
    assert commands.run(*convert, "--experts", 2, "--skip-change", "--save", home / "made").returncode == 0
    numpy.save(home / "ids.npy", numpy.arange(20) % 7)
    (home / "a.txt").write_text("text\n" * 20)
    return home


CONVERT = (
    "convert_checkpoint.py",
    "--from",
    "hf-dense",
    "--to",
    "megatron",
    "--skip-change",
    "--load",
    "@dense",
    "--save",
)
SCORE = ("score.py", "--load", "@made", "--input", "@ids.npy", "--output")
DATA = ("preprocess_data.py", "--input", "@a.txt", "--output")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((*CONVERT, "--moe-every", 999_999), 2),
        ((*CONVERT, "--experts", 2, "--topk", 999_999), 2),
        ((*CONVERT, "--experts", 2, "--shard-size", 1), 0),
        ((*SCORE, "--seq-length", 999_999), 2),
        ((*SCORE, "--stride", 999_999), 2),
        ((*SCORE, "--tensor-model-parallel-size", 999_999), 2),
        ((*SCORE, "--expert-model-parallel-size", 999_999), 2),
        ((*DATA, "--vocab-size", 1_000_000, "--workers", 1024), 2),
    ],
    ids=lambda value: " ".join(map(str, value[-2:])) if isinstance(value, tuple) else "",
)
def test_more_than_there_is(words, code, inputs, tmp_path):
    script, *rest = (str(inputs / word[1:]) if str(word).startswith("@") else word for word in words)
    at = max(rest.index(flag) for flag in ("--save", "--output") if flag in rest)
    rest.insert(at + 1, tmp_path / "new")
    done = commands.run(TOOLS / script, *rest, timeout_s=60)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == code and len(lines) == (code != 0) and "Traceback" not in done.stderr, done.stderr[-800:]
    assert (tmp_path / "new").exists() == (code == 0) and len(list(tmp_path.iterdir())) == (code == 0)
