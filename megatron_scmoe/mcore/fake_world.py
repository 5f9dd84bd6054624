"""Process groups of a world whose other ranks do not exist, as Megatron makes them, for one rank of it."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize

from megatron_scmoe.config import ConfigError


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
        initialize._initialize_distributed(None, None, None)
    except RuntimeError as error:
        raise ConfigError(f"Megatron's own rule: {error}") from error
    initialize._set_random_seed(args.seed)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def first_ranks_of_stages() -> list[int]:
    """A rank of each pipeline stage, in their order."""
    return dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
