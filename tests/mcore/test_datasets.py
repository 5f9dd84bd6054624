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


def test_ranks_that_read_nothing_know_the_hashes_too(tmp_path):
    (tmp_path / "there.idx").write_bytes(b"lengths")
    expected = {"there": hashlib.sha256(b"lengths").hexdigest()}
    assert ranks.run(hashes_seen, 2, tmp_path) == [expected, expected]
