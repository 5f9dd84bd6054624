"""Where the ranks of a job meet before any process group is made: rank 0 decides, all are told."""

from __future__ import annotations

import functools
import itertools
import json
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_scmoe.config import ConfigError
from megatron_scmoe.mcore.job_store import job_store

_numbers = itertools.count()  # of the meetings of a process, alike on all ranks


class Meeting:
    """The ranks of one job, of which there may be one.

    Args:
        args: Megatron's namespace.
        alone: whether this rank decides without the others, which there are not.
    """

    def __init__(self, args: Namespace, *, alone: bool = False) -> None:
        self.rank: int = args.rank
        self.world_size: int = 1 if alone else args.world_size
        self.limit_s = 60.0 * args.distributed_timeout_minutes
        self._args = args
        self._prefix = f"megatron_scmoe/{next(_numbers)}"

    @functools.cached_property
    def job_store(self) -> dist.Store:
        """What Megatron makes its process groups with; whoever asks first waits for rank 0."""
        return job_store(self._args)

    @functools.cached_property
    def store(self) -> dist.Store:
        """Ours alone."""
        return dist.PrefixStore(self._prefix, self.job_store)

    def told(self, name: str, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on rank 0, on every rank; all call this, and a ConfigError is raised on all.

        Args:
            name: of the decision, once in a meeting.
            decide: returns what JSON can say; other ranks do not call it.
        """
        if self.rank == 0:
            decision = _decided(decide)
            if self.world_size > 1:
                self.store.set(name, json.dumps(decision))
        else:
            self.store.wait([name], timedelta(seconds=self.limit_s))
            decision = json.loads(self.store.get(name))
        if "refused" in decision:
            raise ConfigError(decision["refused"])
        return decision["value"]


def _decided(decide: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": decide()}
    except ConfigError as error:
        return {"refused": str(error)}
