"""What the ranks of a stage tell one another between two steps."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist

from megatron_scmoe.overlap.kept import Plans


def gathered(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """What each rank of ``group`` has, by rank."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def digests(plans: dict[Any, Any], group: dist.ProcessGroup) -> list[str]:
    """Of what every rank has."""
    return gathered(hashlib.sha256(repr(sorted(plans.items())).encode()).hexdigest(), group)


def check_equal(plans: dict[int, Plans], stage: dist.ProcessGroup) -> None:
    """Different plans on the ranks of a stage would hang in the first collective: stop before it."""
    found = digests(plans, stage)
    if len(set(found)) > 1:
        ranks = dist.get_process_group_ranks(stage)
        odd = [rank for rank, digest in zip(ranks, found, strict=True) if digest != found[0]]
        raise RuntimeError(f"ranks {odd} have other plans than rank {ranks[0]}: {plans}")
