"""Megatron's process groups, for who wants them without its trainer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import fields

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize


def make(args: Namespace, store: dist.Store) -> None:
    """Make every process group that a training makes, with what NCCL is told of each; all ranks call it.

    Args:
        args: Megatron's namespace, validated and set as the global one.
        store: of the job.
    """
    initialize._initialize_distributed(None, None, store)


def named() -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Each process group that this rank is in, once, under the first name that Core has for it.

    The order is the same on every rank: ranks that go through their groups so do not wait for one another in a circle.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seen: list[dist.ProcessGroup] = []
    for one in fields(groups):
        value = getattr(groups, one.name)
        for group in value if isinstance(value, list) else [value]:
            if isinstance(group, dist.ProcessGroup) and group not in seen:
                seen.append(group)
                yield one.name, group
