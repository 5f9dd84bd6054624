"""Process groups of a world whose other ranks do not exist, as Megatron makes them, for one rank of it."""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize

from megatron_scmoe.config import ConfigError

_rank_groups = parallel_state.generate_masked_orthogonal_rank_groups


@contextlib.contextmanager
def fake_world(args: Namespace, rank: int) -> Iterator[ProcessGroupCollection]:
    """All process groups, and the seeds, of ``rank`` in a world of ``args.world_size``; collectives carry nothing.

    Args:
        args: Megatron's namespace, validated and set as the global one; its rank and what it says of process groups are
            changed.
        rank: in that world.

    Raises:
        ConfigError: where the world cannot be split so.
    """
    args.rank, args.fake_process_group, args.use_gloo_process_groups = rank, True, False
    # What NCCL is told of a communicator has no place in a fake one.
    args.nccl_communicator_config_path = args.high_priority_stream_groups = None
    try:
        with _groups_of(rank):
            initialize._initialize_distributed(None, None, None)
    except RuntimeError as error:
        raise ConfigError(f"Megatron's own rule: {error}") from error
    initialize._set_random_seed(args.seed)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _groups_of(rank: int) -> Iterator[None]:
    """In here Megatron makes the groups of ``rank`` alone, and looks up once which ranks are in which.

    Of a world of 16,384 ranks it would make 115,000 groups, for each stage that is looked at, in 10 s.
    """
    new_group = dist.new_group

    def own_group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, **kwargs)

    dist.new_group, parallel_state.generate_masked_orthogonal_rank_groups = own_group, _fresh_rank_groups
    try:
        yield
    finally:
        dist.new_group, parallel_state.generate_masked_orthogonal_rank_groups = new_group, _rank_groups


def _fresh_rank_groups(world_size: int, sizes: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """Lists of Megatron's that whoever gets them may change."""
    return [list(ranks) for ranks in _known_rank_groups(world_size, tuple(sizes), tuple(mask))]


@functools.cache
def _known_rank_groups(world_size: int, sizes: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
    return _rank_groups(world_size, list(sizes), list(mask))


def first_ranks_of_stages() -> list[int]:
    """A rank of each pipeline stage, in their order."""
    return dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
