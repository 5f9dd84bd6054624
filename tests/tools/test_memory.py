"""A conversion that renames, splits and joins needs memory for a few pieces, whatever the size of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import small_checkpoints
from test_convert import run_python

MIB = 2**20
PIECE = 8 * MIB  # the largest of each: a gate and an up projection, which are one tensor on Megatron's side
SIZES = {"hidden_size": 512, "vocab_size": 2048}


class Chain(NamedTuple):
    """Conversions, each of what the one before has made.

    Attributes:
        make: makes the first checkpoint, of random numbers.
        sizes: of the large one.
        steps: source, target and options.
        pieces: how many of the largest piece there is room for.
    """

    make: Callable[..., Path]
    sizes: dict[str, int]
    steps: tuple[str, ...]
    pieces: int


CHAINS = {
    "longcat": Chain(
        small_checkpoints.longcat,
        SIZES | {"num_layers": 2, "ffn_hidden_size": 2048, "expert_ffn_hidden_size": 512, "n_routed_experts": 8},
        ("hf-longcat megatron", "megatron hf-longcat"),
        6,
    ),
    "dense": Chain(
        small_checkpoints.dense,
        SIZES | {"num_hidden_layers": 6, "intermediate_size": 2048},
        ("hf-dense megatron --experts 4 --skip-change", "megatron hf-scmoe", "hf-scmoe megatron"),
        12,  # upcycling draws random numbers for whole pieces
    ),
}

MEASURE = """
import sys
from pathlib import Path
from checkpoint_files import HFFolder, MegatronCheckpoint, peak_memory_kib
import convert_checkpoint as tool

home, shard, keeps, *chain = Path(sys.argv[1]), *sys.argv[2:]

def convert(folder):
    for number, step in enumerate(chain):
        origin, target, *more = step.split()
        words = ["--from", origin, "--to", target, "--load", f"{folder}/{number}", "--save", f"{folder}/{number + 1}"]
        assert tool.main([*words, *more, "--shard-size", shard]) == 0

convert(home / "tiny")  # what imports and first calls take
if keeps == "everything":
    kept = []
    for kind in (HFFolder, MegatronCheckpoint):
        def read(self, *words, original=kind.read):
            kept.append(original(self, *words))
            return kept[-1].clone()
        kind.read = read
before = peak_memory_kib()
convert(home / "large")
print(before, peak_memory_kib())
"""


def memory_of(folder: Path, chain: Chain, keeps: str) -> tuple[int, int]:
    """Bytes of the large checkpoint, and what converting it takes beyond what converting the tiny one does."""
    chain.make(folder / "tiny" / "0")
    source = chain.make(folder / "large" / "0", **chain.sizes)
    done = run_python(MEASURE, folder, f"{2 * PIECE}B", keeps, *chain.steps, timeout_s=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    before, after = map(int, done.stdout.split()[-2:])
    return (source / "model.safetensors").stat().st_size, 1024 * (after - before)


@pytest.mark.parametrize("name", CHAINS)
def test_memory_is_that_of_a_few_pieces(tmp_path, name):
    source_bytes, taken = memory_of(tmp_path, CHAINS[name], "nothing")
    limit = CHAINS[name].pieces * PIECE
    assert taken <= limit < source_bytes


@pytest.mark.parametrize("name", [pytest.param("longcat"), pytest.param("dense", marks=pytest.mark.full)])
def test_whatever_keeps_what_it_reads_is_noticed(tmp_path, name):
    """Negative control."""
    source_bytes, taken = memory_of(tmp_path, CHAINS[name], "everything")
    assert taken > source_bytes > CHAINS[name].pieces * PIECE
