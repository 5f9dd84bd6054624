"""Core's GPT datasets, whose cached sample indices are found again only for the data that they were made of.

Core names its cache by path, split, seed and sizes. Data made again under an old name would train with the old ones'
indices: documents left out, samples across documents, validation on what was trained. Document lengths decide the
indices, so the hash of the ``.idx`` file, which holds them, goes into the name.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import _IndexReader
from megatron.training.utils import get_blend_and_blend_per_split

INDEX_HASHES = "index_hashes"


@dataclass
class HashedDatasetConfig(GPTDatasetConfig):
    """Core's, and what the data are.

    Attributes:
        index_hashes: SHA-256 of each local dataset's ``.idx`` file, by its prefix.
    """

    index_hashes: dict[str, str] = field(default_factory=dict)


class HashedDataset(GPTDataset):
    """Core's dataset, whose cache is named by its data, too."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), INDEX_HASHES]


def dataset_prefixes(args: Namespace) -> list[str]:
    """Paths without suffix of all datasets that the command line names, for whatever part of the run."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return [prefix for part in (blend, *(blend_per_split or ())) if part for prefix in part[0]]


def index_hashes(prefixes: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the ``.idx`` file of each prefix; those that lie elsewhere, as in an object store, have none.

    Rank 0 reads them and tells all ranks, which call this together: a thousand ranks need not read each file.
    """
    found: list[dict[str, str]] = [{}]
    if dist.get_rank() == 0:
        paths = {prefix: Path(prefix + ".idx") for prefix in prefixes}
        found = [{prefix: _sha256(path, path.stat().st_mtime_ns) for prefix, path in paths.items() if path.is_file()}]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def sequences_and_bytes(prefix: str) -> tuple[int, int]:
    """How many sequences the index of a dataset has, and how many bytes of tokens they take; reads its ends alone.

    Raises:
        ValueError: where it is no index, or not a whole one.
    """
    try:
        index = _IndexReader(prefix + ".idx", multimodal=False)
    except (AssertionError, struct.error) as error:
        raise ValueError(str(error)) from error
    last = zip(index.sequence_pointers[-1:], index.sequence_lengths[-1:], strict=True)
    return len(index), sum(int(begin) + int(length) * index.dtype_size for begin, length in last)


@functools.cache
def _sha256(path: Path, _modified_ns: int) -> str:
    """Read once, though every virtual pipeline stage asks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
