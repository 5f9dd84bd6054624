"""Is there enough text for what this run wants to do? Asked before any process group starts.

Megatron cuts a dataset into training, validation and test by whole documents. Where a share is smaller than a document
it gets none, and Megatron then counts epochs of nothing, for ever.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.config import ConfigError

_SPLITS = ("training", "validation", "test")


def check_datasets(args: Namespace) -> None:
    """Raise ConfigError where a local dataset of --data-path is missing, or a part of --split has no document."""
    blend, _ = get_blend_and_blend_per_split(args)
    if blend is None or args.object_storage_cache_path is not None:
        return
    parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    for prefix in blend[0]:
        for suffix in (".idx", ".bin"):
            if not Path(prefix + suffix).is_file():
                raise ConfigError(
                    f"--data-path names datasets without their suffix: {prefix} is given and {prefix}{suffix} is no "
                    "file; write it with tools/preprocess_data.py"
                )
        num_documents = len(IndexedDataset(prefix))
        for name, part in zip(_SPLITS, parts, strict=True):
            # The rounding is Megatron's.
            if part is not None and round(part[0] * num_documents) == round(part[1] * num_documents):
                raise ConfigError(
                    f"every part of --split needs a document: {prefix} has {num_documents} and --split is "
                    f"{args.split}, which leaves none for {name}; use more documents, another --split, or a smaller "
                    "--document-kib in tools/preprocess_data.py"
                )
