"""Checkpoints as Core keeps them: the arguments in one, and the gradient buckets by which it saves moments."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.training.checkpointing import _load_base_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.config import ConfigError


def saved_args(args: Namespace) -> Namespace | None:
    """The arguments saved in the checkpoint that ``args`` would load; None where there is no checkpoint.

    Those of a release say that it has no optimizer, since Core looks for none there.
    They have ``expert_optimizer``: whether experts have an optimizer of their own in it, by what it holds; None where
    that does not tell.

    Raises:
        ConfigError: for one that cannot be read, and for none where --exit-on-missing-checkpoint asks for one.
    """
    if Path(args.load).exists() and not Path(args.load).is_dir():
        raise ConfigError(f"a checkpoint is a folder: --load is {args.load}, a file; give the folder that --save wrote")
    try:
        with without_warnings(), contextlib.redirect_stdout(io.StringIO()):  # of a load that is not happening yet
            state_dict, _, is_release, _ = _load_base_checkpoint(args.load, args, rank0=True)
    except SystemExit as end:
        raise ConfigError(
            f"--exit-on-missing-checkpoint asks for a checkpoint: --load is {args.load}, where there is none; give the "
            "folder of one, or drop --exit-on-missing-checkpoint"
        ) from end
    except (
        Exception,
        CheckpointException,
    ) as error:  # whatever a damaged or foreign file makes of Core's and torch's readers
        what = " ".join(str(error).split())
        raise ConfigError(
            f"the checkpoint in --load {args.load} cannot be read ({type(error).__name__}: {what[:200]}); give another "
            "--load, or an older step by --ckpt-step"
        ) from error
    saved = state_dict.get("args") if state_dict else None
    if saved is not None:
        saved.expert_optimizer = _has_expert_optimizer(state_dict.get("optimizer"))
        if is_release:
            saved.no_save_optim = True
    return saved


def _has_expert_optimizer(saved: object) -> bool | None:
    """By what Core saves beside tensors of an optimizer, or of several by their numbers."""
    if not isinstance(saved, dict):
        return None
    if (groups := saved.get("param_groups")) is not None:
        return any(group.get("is_expert_parallel") for group in groups)
    found = [_has_expert_optimizer(part) for key, part in saved.items() if isinstance(key, int) or key == "optimizer"]
    return None if None in found or not found else any(found)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without what torch says of a checkpoint that is read where there is no process group yet."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBucket:
    """A gradient bucket that ends in padding and has another behind it.

    Attributes:
        place: which bucket of how many, in words.
        numel: elements of its parameters.
        numel_padded: elements that it takes.
        bucket_size: the bucket size at which its buffer would be one bucket; None where it ends because a tied
            embedding, which has a bucket of its own, begins or ends there.
    """

    place: str
    numel: int
    numel_padded: int
    bucket_size: int | None


def padded_buckets(model_chunk: torch.nn.Module) -> list[PaddedBucket]:
    """Buckets of ``model_chunk`` that end in padding and are not the last of their buffer; none if nothing trains."""
    found: list[PaddedBucket] = []
    if not isinstance(model_chunk, DistributedDataParallel):
        return found
    for buffer in model_chunk.buffers + model_chunk.expert_parallel_buffers:
        tied = [any(getattr(param, "shared_embedding", False) for param in bucket.params) for bucket in buffer.buckets]
        for i, bucket in enumerate(buffer.buckets[:-1]):
            numel_padded = bucket.grad_data.numel()
            if bucket.numel_unpadded != numel_padded:
                found.append(
                    PaddedBucket(
                        place=f"bucket {i + 1} of {len(buffer.buckets)}",
                        numel=bucket.numel_unpadded,
                        numel_padded=numel_padded,
                        bucket_size=None if tied[i] or tied[i + 1] else buffer.numel,
                    )
                )
    return found
