"""What ran, when, on this rank: named marks, recorded only while somebody listens. Imports nothing of ours.

A mark is one dictionary look-up when nobody listens, so the hot path may carry them always.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_listeners: list[list[Mark]] = []


@dataclass(frozen=True, slots=True)
class Mark:
    """One moment of one rank.

    Attributes:
        name: what happened, e.g. ``"start dispatch"``.
        backward: whether it happened in the backward pass.
        time_s: host clock in seconds (``time.perf_counter``), when the host reached it.
    """

    name: str
    backward: bool
    time_s: float


def mark(name: str, *, backward: bool = False) -> None:
    """Record that ``name`` happens now, for everyone who listens."""
    if _listeners:
        moment = Mark(name, backward, time.perf_counter())
        for recorded in _listeners:
            recorded.append(moment)


@contextmanager
def recording() -> Iterator[list[Mark]]:
    """Listen for the time of a ``with`` block; the list that it yields fills as marks happen."""
    recorded: list[Mark] = []
    _listeners.append(recorded)
    try:
        yield recorded
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not recorded]
