"""The start of a job, and its end."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator

import torch.distributed as dist

from megatron_scmoe.job import sameness
from megatron_scmoe.job.hangs import HangWatch, StepLimit
from megatron_scmoe.mcore import fault_hooks
from megatron_scmoe.mcore.job_store import job_store


@contextlib.contextmanager
def joined(args: Namespace, hang_limit_s: float) -> Iterator[dist.Store]:
    """Join the other ranks of this job, which must mean the same, and watch them until the block ends.

    Args:
        args: Megatron's namespace, validated.
        hang_limit_s: of a training step; negative to follow what is measured, 0 to watch nothing.

    Yields:
        What Megatron makes its process groups with.

    Raises:
        ConfigError: where a rank means something else, or does not come.
    """
    store = job_store(args)
    sameness.check(args, store)
    watch = None
    if hang_limit_s != 0 and not args.enable_ft_package:  # whose client takes the place of ours
        watch = HangWatch(args, store, StepLimit(hang_limit_s))
        fault_hooks.follow_sections(watch)
        watch.start()
    try:
        yield store
    finally:
        if watch is not None:
            watch.stop()
