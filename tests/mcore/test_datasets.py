"""Hashes of dataset indices: one rank reads, all know."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import ranks
import torch.distributed as dist

from megatron_scmoe.mcore.datasets import index_hashes


def hashes_seen(folder: Path) -> dict[str, str]:
    """Rank 0 alone sees the data by these relative names."""
    if dist.get_rank() == 0:
        os.chdir(folder)
    return index_hashes(["there", "s3://elsewhere"])


def hashes_and_reads(folder: Path) -> tuple[list[str], int]:
    """Of data that change behind the second question, and how often they were read."""
    reads, file_digest = [], hashlib.file_digest
    hashlib.file_digest = lambda file, name: reads.append(name) or file_digest(file, name)  # type: ignore[assignment]
    path, found = folder / "there.idx", []
    for text, modified_s in ((b"lengths", 1), (b"lengths", 1), (b"changed", 2)):
        path.write_bytes(text)
        os.utime(path, (modified_s, modified_s))
        found.append(index_hashes([str(folder / "there")]).popitem()[1])
    return found, len(reads)


def test_ranks_that_read_nothing_know_the_hashes_too(tmp_path):
    (tmp_path / "there.idx").write_bytes(b"lengths")
    expected = {"there": hashlib.sha256(b"lengths").hexdigest()}
    assert ranks.run(hashes_seen, 2, tmp_path) == [expected, expected]


def test_an_index_is_read_once_until_it_changes(tmp_path):
    """For all virtual pipeline stages."""
    (found,) = ranks.run(hashes_and_reads, 1, tmp_path)
    hashes = [hashlib.sha256(text).hexdigest() for text in (b"lengths", b"lengths", b"changed")]
    assert found == (hashes, 2)
