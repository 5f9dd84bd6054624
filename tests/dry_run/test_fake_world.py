"""The groups of a world whose other ranks do not exist: those that Megatron makes where it makes them all."""

from __future__ import annotations

import contextlib
import os
import sys

import ranks
from megatron.core.process_groups_config import ProcessGroupCollection
from training import SCMOE, with_flags

LAYOUT = with_flags(
    SCMOE,
    *("--tensor-model-parallel-size 2", "--sequence-parallel", "--pipeline-model-parallel-size 2"),
    *("--expert-model-parallel-size 2", "--expert-tensor-parallel-size 1", "--global-batch-size 16"),
)
WORLD = 16


def ranks_of_groups(groups: ProcessGroupCollection) -> dict[str, list[int]]:
    import torch.distributed as dist

    own = {name: group for name, group in vars(groups).items() if isinstance(group, dist.ProcessGroup)}
    return {name: dist.get_process_group_ranks(group) for name, group in own.items()}


def own_and_all(of: tuple[int, ...]) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
    """Of each rank: groups as the dry run has them, and where all of them are made."""
    from megatron_scmoe.mcore import fake_world
    from megatron_scmoe.training.arguments import parse_and_validate_args

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD), CUDA_DEVICE_MAX_CONNECTIONS="1")
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *LAYOUT]
    args, _, _ = parse_and_validate_args(lambda _: None)
    only_own = fake_world._groups_of
    found = []
    for rank in of:
        pair = []
        for making in (only_own, lambda _: contextlib.nullcontext()):
            fake_world._groups_of = making
            with fake_world.fake_world(args, rank) as groups:
                pair.append(ranks_of_groups(groups))
        found.append(tuple(pair))
    return found


def test_groups_are_those_of_a_world_in_which_all_are_made():
    ((first, other),) = ranks.run(own_and_all, 1, (0, 13), distributed=False)
    for own, everything in (first, other):
        assert len(own) > 10 and own == everything
    assert first[0]["tp"] == [0, 1] and other[0]["tp"] == [12, 13] and first[0] != other[0]  # negative control
