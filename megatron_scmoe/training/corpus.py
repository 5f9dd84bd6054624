"""Is there the text for what this run wants to do? Asked before any process group starts.

Megatron cuts a dataset into training, validation and test by whole documents. Where a share is smaller than a document
it gets none, and Megatron then counts epochs of nothing, for ever.
"""

from __future__ import annotations

import functools
import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.config import ConfigError
from megatron_scmoe.mcore.chats import Chats
from megatron_scmoe.mcore.datasets import sequences_and_bytes

_SPLITS = ("training", "validation", "test")
_ORDER = ("seed", "seq_length", "split")


def check_datasets(args: Namespace) -> None:
    """Raise ConfigError where --data-path or its relatives name no datasets or damaged ones, blend them as Core cannot
    or one with itself, or leave a part that is needed without documents; those of an object store are not looked at.
    """
    blend, blend_per_split = _blends(args)
    blends = [given for given in (blend, *(blend_per_split or ())) if given is not None]
    if not blends or args.object_storage_cache_path is not None:
        return
    count, suffix = (_num_chats, "") if args.sft else (_num_sequences, ".bin")
    for prefixes, weights in blends:
        _check_blend(prefixes, weights, count, suffix)
    if blend is not None:
        _check_parts(args, blend[0], count)
    elif blend_per_split[1] is None:
        _check_validation(args, "--valid-data-path names none")


def say_if_order_changes(args: Namespace, saved: Namespace | None) -> None:
    """Say on rank 0 that this run does not go on where the checkpoint stopped in its samples.

    Core skips as many samples as it has seen, of another order: some come again, and others never.

    Args:
        args: Megatron's validated namespace.
        saved: the arguments of the checkpoint to load; None where there is none.
    """
    if args.rank != 0 or args.finetune or args.skip_train or not getattr(saved, "consumed_train_samples", 0):
        return
    for name in _ORDER:
        now, then = getattr(args, name), getattr(saved, name, None)
        if then is not None and now != then:
            flag = "--" + name.replace("_", "-")
            print(
                f" > data: samples come in another order than in the checkpoint in {args.load}: it has {flag} {then}, "
                f"now {now}; some that it has seen come again",
                flush=True,
            )


def first_chat(args: Namespace) -> list[dict[str, str]] | None:
    """Of the first file of chats that --data-path or its relatives name, or None."""
    blend, blend_per_split = _blends(args)
    paths = [path for given in (blend, *(blend_per_split or ())) if given is not None for path in given[0]]
    return Chats(paths[0])[0] if paths else None


def _blends(args: Namespace) -> tuple[Any, Any]:
    """For all parts of the run, and for each of them, as Megatron reads its flags."""
    try:
        return get_blend_and_blend_per_split(args)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        name = "data_args_path" if args.data_args_path else "per_split_data_args_path"
        raise ConfigError(
            f"it names datasets as Megatron's --help says: --{name.replace('_', '-')} is {getattr(args, name)}, which "
            f"does not ({error!r}); mend it"
        ) from error


def _num_sequences(prefix: str) -> int:
    """How many there are in a dataset, which is whole."""
    for suffix in (".idx", ".bin"):
        if not Path(prefix + suffix).is_file():
            raise ConfigError(
                f"--data-path names datasets without their suffix: {prefix} is given and {prefix}{suffix} is no "
                "file; write it with tools/preprocess_data.py"
            )
    try:
        num_sequences, needed = sequences_and_bytes(prefix)
    except ValueError as error:
        raise ConfigError(
            f"{prefix}.idx is no index of a dataset ({error}); write it anew with tools/preprocess_data.py"
        ) from error
    if (found := Path(f"{prefix}.bin").stat().st_size) < needed:
        raise ConfigError(
            f"a dataset is as long as its index says: {prefix}.bin has {found} bytes and should have {needed}; write "
            "it anew with tools/preprocess_data.py"
        )
    return num_sequences


@functools.cache
def _num_chats(path: str) -> int:
    """How many there are in a JSONL file, all of which are chats."""
    try:
        return len(Chats(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"with --sft, --data-path names JSONL files, a chat a line: {path} is given ({reason}); mend it"
        ) from error


def _check_blend(
    prefixes: Sequence[str], weights: Sequence[float] | None, count: Callable[[str], int], suffix: str
) -> None:
    seen: set[str] = set()
    for prefix in prefixes:
        count(prefix)
        if (place := os.path.realpath(prefix + suffix)) in seen:
            raise ConfigError(
                f"copies of a dataset give the same samples in the same order, each of them twice: {prefix} is blended "
                "with itself; name it once, with the sum of its weights"
            )
        seen.add(place)
    for prefix, weight in zip(prefixes, weights or (), strict=False):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"weights of datasets are above 0: that of {prefix} is {weight:g}; leave it out, or weigh it otherwise"
            )


def _check_parts(args: Namespace, prefixes: Sequence[str], count: Callable[[str], int]) -> None:
    parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    if parts[1] is None:
        _check_validation(args, f"--split is {args.split}")
    for prefix in prefixes:
        num_documents = count(prefix)
        for name, part in zip(_SPLITS, parts, strict=True):
            # The rounding is Megatron's.
            if part is not None and round(part[0] * num_documents) == round(part[1] * num_documents):
                raise ConfigError(
                    f"every part of --split needs a document: {prefix} has {num_documents} and --split is "
                    f"{args.split}, which leaves none for {name}; use more documents, another --split, or a smaller "
                    "--document-kib in tools/preprocess_data.py"
                )


def _check_validation(args: Namespace, why_none: str) -> None:
    """There is no validation set: Core ends at the first validation, behind the training before it."""
    if args.full_validation or args.eval_iters > 0:
        asked = "--full-validation is set" if args.full_validation else f"--eval-iters is {args.eval_iters}"
        fix = "drop --full-validation and add --eval-iters 0" if args.full_validation else "add --eval-iters 0"
        raise ConfigError(f"validation needs documents: {asked} and {why_none}; give it some, or {fix}")
