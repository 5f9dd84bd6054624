"""Where the ranks of a job meet before any process group is made: rank 0 decides, all are told."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.distributed as dist

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import last_words, roll_call
from megatron_scmoe.mcore.job_store import job_store

ANSWERS_WITHIN_S = 10.0
"""How much later than torch's constructor, which has more to say, a rank gives up reaching the store."""


class Meeting:
    """The ranks of one job, of which there may be one.

    Args:
        args: Megatron's namespace.
        alone: whether this rank decides without the others, which there are not.
        limit: what refusals call the time that ranks wait for one another.
    """

    def __init__(self, args: Namespace, *, alone: bool = False, limit: str = "--distributed-timeout-minutes") -> None:
        self.rank: int = args.rank
        self.world_size: int = 1 if alone else args.world_size
        self.limit_s, self.limit = 60.0 * args.distributed_timeout_minutes, limit
        self._args = args

    @property
    def job_store(self) -> dist.Store:
        """What Megatron makes its process groups with, in this attempt."""
        return dist.PrefixStore("groups", self.store)

    @functools.cached_property
    def store(self) -> dist.Store:
        """Of this attempt alone; who asks first waits for all ranks.

        Raises:
            ConfigError: where the others cannot be reached, do not come, or refuse to start.
        """
        store = _reached(lambda: job_store(self._args), self.limit_s, self.limit)
        with store_lives():
            place = roll_call.answered(store, self.rank, self.world_size, self.limit_s, self.limit)
            return dist.PrefixStore(place, store)

    def told(self, name: str, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on rank 0, on every rank; all call this, and a ConfigError is raised on all.

        Args:
            name: of the decision, once in a meeting.
            decide: returns what JSON can say; other ranks do not call it.
        """
        if self.world_size == 1:
            return decide()
        with store_lives():
            if self.rank == 0:
                decision = self._decided(decide)
                self.store.set(name, json.dumps(decision))
            else:
                decision = self._awaited(name)
        if "refused" in decision:
            raise ConfigError(decision["refused"])
        return decision["value"]

    def missing(self, key: Callable[[int], str], ranks: Iterable[int]) -> list[int]:
        """Those of ``ranks`` that have not written their key until the others would give up; for rank 0."""
        return roll_call.wait(self.store, key, ranks, 0.9 * self.limit_s, lambda _missing: self._heed())

    def _heed(self) -> None:
        roll_call.heed(last_words.heard(self.store))

    def _decided(self, decide: Callable[[], Any]) -> dict[str, Any]:
        self.store  # noqa: B018 - nothing is decided before all are there
        try:
            return {"value": decide()}
        except ConfigError as error:
            return {"refused": str(error)}

    def _awaited(self, name: str) -> dict[str, Any]:
        for _ in roll_call.looks(self.limit_s):
            if self.store.check([name]):
                return json.loads(self.store.get(name))
            self._heed()
        raise ConfigError(
            f"rank 0 decides for all: it has not said within {self.limit} what follows for '{name}'; "
            "see what it printed"
        )


def _reached(reach: Callable[[], dist.Store], limit_s: float, limit: str) -> dist.Store:
    """The store that ``reach`` returns, in a time with an end, and not in silence.

    Torch's constructor has a limit for its attempts, but none for an answer: where another program listens, or the
    first node is frozen, it would wait for ever, and ^C with it. So it runs in a thread, which may be left behind.

    Raises:
        ConfigError: where it takes longer, and what ``reach`` raises.
    """
    found: queue.SimpleQueue[dist.Store | BaseException] = queue.SimpleQueue()

    def put() -> None:
        try:
            found.put(reach())
        except BaseException as error:
            found.put(error)

    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    threading.Thread(target=put, name="store", daemon=True).start()
    began_s = time.monotonic()
    until_s = began_s + limit_s + ANSWERS_WITHIN_S
    while (left_s := until_s - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            answer = found.get(timeout=min(roll_call.SAY_EVERY_S, left_s))
            if isinstance(answer, BaseException):
                raise answer
            return answer
        print(f" > waiting for the job's store at {where} for {time.monotonic() - began_s:.0f} s", flush=True)
    raise ConfigError(
        f"ranks find one another at MASTER_ADDR:MASTER_PORT: what listens at {where} has not answered within {limit}; "
        "see whether rank 0 runs there, and whether something else has the port"
    )


@contextlib.contextmanager
def store_lives() -> Iterator[None]:
    """End in a line where it does not."""
    try:
        yield
    except dist.DistError as error:
        last_words.stop(f"the job's store is gone, with the first node: {str(error).splitlines()[0]}")
