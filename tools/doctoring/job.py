"""The job that is examined, as one of its ranks sees it."""

from __future__ import annotations

import os
import socket
from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore import process_groups

MOST_EXPERT_RANKS = 64
"""Of the layout that is taken where no flags say one: as far as large recipes go."""


Changes = dict[str, tuple[Any, Any]]
"""Values before and behind validation, by name."""


@dataclass(frozen=True)
class Flags:
    """What the entry script makes of the flags behind ``--``.

    Attributes:
        given: the flags.
        refused: why it would not start; empty where it would.
        requested: values that the command line asks for, by name, where they are not the defaults.
        changes: of what was requested, and of other values.
        meant: what has to be the same on all ranks, in words.
        args: Megatron's namespace, validated; None where it is no use, since some rank refuses or has others.
        scmoe: our settings; None where ``args`` are.
    """

    given: list[str]
    refused: str = ""
    requested: dict[str, Any] = field(default_factory=dict)
    changes: tuple[Changes, Changes] = ({}, {})
    meant: dict[str, str] = field(default_factory=dict)
    args: Namespace | None = None
    scmoe: ScMoEConfig | None = None


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups, as Core's ``TransformerConfig`` names them."""

    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1


def layout_of(flags: Flags | None, world_size: int) -> Layout:
    """That of valid flags; without any, experts on all ranks, or on as many of them as may be."""
    if flags is not None and flags.args is not None:
        return Layout(**{one.name: getattr(flags.args, one.name) for one in fields(Layout)})
    sizes = (size for size in range(MOST_EXPERT_RANKS, 0, -1) if world_size % size == 0)
    return Layout(expert_model_parallel_size=next(sizes))


class Job:
    """What checks are given.

    Args:
        meeting: of the ranks.
        flags: behind ``--``; None where there were none.
        layout: of the job.
        network_s: how long the network may be tried.
        free_bytes: that a folder should have.
    """

    def __init__(
        self, meeting: Meeting, flags: Flags | None, layout: Layout, *, network_s: float, free_bytes: int
    ) -> None:
        self.meeting, self.flags, self.layout = meeting, flags, layout
        self.network_s, self.free_bytes = network_s, free_bytes
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.host = socket.gethostname()
        self.has_cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.local_rank) if self.has_cuda else torch.device("cpu")

    @property
    def args(self) -> Namespace | None:
        """Megatron's namespace, where the flags are valid."""
        return self.flags.args if self.flags else None

    def join(self) -> None:
        """Make the process groups of the layout, as a training with these flags would, unless they are there.

        The first call waits for all ranks.
        """
        if parallel_state.model_parallel_is_initialized():
            return
        if self.args is not None:
            process_groups.make(self.args, self.meeting.job_store)
            return
        self._join_world()
        parallel_state.initialize_model_parallel(**asdict(self.layout))

    def join_tiny_groups(self, size: int) -> None:
        """Make groups of ``size`` expert-parallel ranks, and no other split, in the place of those of the layout."""
        self.join()
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=size, expert_tensor_parallel_size=1)

    def _join_world(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if self.has_cuda else "gloo",
                store=self.meeting.job_store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.meeting.limit_s),
            )
