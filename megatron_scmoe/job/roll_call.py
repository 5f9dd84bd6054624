"""Who takes part in this attempt of a job. All ranks are there and new, or there is no attempt.

The store of torchrun outlives its ranks. After a restart it still holds all that the earlier ranks wrote, some of which
may run on, and each torchrun counts restarts of its own. So rank 0 numbers the attempts and calls the roll. A rank that
finds the attempt under way without it is a restarted one: it declares that attempt over, for those who still wait in
it, and answers the next call. Every key of ours, and of the process groups, begins with the attempt's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import last_words
from megatron_scmoe.job.last_words import LastWords

SAY_EVERY_S = 30.0
_NUMBER = f"{last_words.PLACE}/attempt"
_OPEN = "open"


def answered(
    store: dist.Store, rank: int, world_size: int, limit_s: float, limit: str = "--distributed-timeout-minutes"
) -> str:
    """Wait until all ranks are there; returns with what the keys of this attempt begin.

    Args:
        store: of the job.
        rank: of this process.
        world_size: of the job.
        limit_s: how long to wait for the others.
        limit: what refusals call that time.

    Raises:
        ConfigError: where some rank refuses to start, or does not come.
    """
    last_words.forget(store, rank)
    place = _call(store, world_size, limit_s, limit) if rank == 0 else _answer(store, rank, limit_s, limit)
    last_words.takes_part(place)
    return place


def in_words(ranks: Sequence[int]) -> str:
    """Such as ``rank 3`` or ``ranks 0-7, 9``; ``ranks`` ascend."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def wait(
    store: dist.Store, key: Callable[[int], str], ranks: Iterable[int], limit_s: float, look: Callable[[list[int]], Any]
) -> list[int]:
    """Wait until all have written; says now and then who has not, and returns who has not at the end.

    Args:
        store: where they write.
        key: of a rank.
        ranks: which.
        limit_s: how long.
        look: called now and then with those who are missing; may raise.
    """
    said_s, missing = 0.0, list(ranks)
    for waited_s in looks(limit_s):
        missing = [rank for rank in missing if not store.check([key(rank)])]
        if not missing:
            break
        look(missing)
        if waited_s - said_s > SAY_EVERY_S:
            said_s = waited_s
            print(f" > waiting for {in_words(missing)} for {waited_s:.0f} s", flush=True)
    return missing


def looks(limit_s: float) -> Iterator[float]:
    """When to look for something: for how many seconds it has been waited for, until ``limit_s``. A look that comes
    soon finds soon, and thousands of ranks that look every second are no burden to a store.
    """
    began_s = time.monotonic()
    while (waited_s := time.monotonic() - began_s) < limit_s:
        yield waited_s
        time.sleep(min(1.0, 0.05 + 0.1 * waited_s))


def heed(said: LastWords | None) -> None:
    """End this process where another one's last words say that there is nothing to wait for.

    Raises:
        ConfigError: where the other one refused to start, which this one does as well.
    """
    if said is None:
        return
    if said.is_refusal:
        raise ConfigError(said.in_words())
    last_words.stop(said.in_words())


def _place(number: int) -> str:
    return f"{last_words.PLACE}/{number}"


def _attempt(store: dist.Store, number: int) -> dist.Store:
    return dist.PrefixStore(_place(number), store)


def _here(rank: int) -> str:
    return f"here/{rank}"


def _declare_over(attempt: dist.Store, rank: int) -> None:
    """Nobody takes part in an attempt that has not begun, so none of it is over."""
    if attempt.check([_OPEN]):
        last_words.end(attempt, LastWords(rank, "it was started again"))


def _is_lost(store: dist.Store, ranks: Iterable[int]) -> LastWords | None:
    """What one of ``ranks`` said that has ended and that nobody starts again; None where there is none."""
    said = (last_words.of_rank(store, rank) for rank in ranks)
    return next((words for words in said if words is not None and not words.comes_back), None)


def _call(store: dist.Store, world_size: int, limit_s: float, limit: str) -> str:
    number = store.add(_NUMBER, 1)
    _declare_over(_attempt(store, number - 1), 0)
    attempt = _attempt(store, number)

    def look(missing: list[int]) -> None:
        if said := _is_lost(store, missing):
            last_words.end(attempt, said)
            heed(said)

    # Before the others give up waiting for what this one finds.
    if missing := wait(attempt, _here, range(1, world_size), 0.9 * limit_s, look):
        raise ConfigError(
            f"a job starts when all ranks are there: {in_words(missing)} of {world_size} did not come within "
            f"{limit}; see what they printed, and the address of the first node"
        )
    attempt.set(_OPEN, "")
    return _place(number)


def _answer(store: dist.Store, rank: int, limit_s: float, limit: str) -> str:
    mine = 0
    for _ in looks(limit_s):
        number = store.add(_NUMBER, 0)
        attempt = _attempt(store, number)
        is_open = attempt.check([_OPEN])
        if number == mine and is_open:
            return _place(mine)
        if is_open:
            _declare_over(attempt, rank)  # an earlier process of this rank takes part in it
        elif number:
            attempt.set(_here(rank), "")
            mine = number
            heed(last_words.heard(attempt))
        heed(_is_lost(store, [0]))
    raise ConfigError(
        f"a job starts when all ranks are there: rank 0 did not call them within {limit}; see "
        "what it printed, and the address of the first node"
    )
