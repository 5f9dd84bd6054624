"""Spans of work on the compute and the communication lane, and how much of the communication is exposed.

Standard library only. The solver's simulated timelines and what the ranks measured are both lists of spans, so the same
arithmetic says how much was hidden and how much should have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

Interval = tuple[float, float]
"""Start and end."""


class Lane(StrEnum):
    """What a span occupies. Two lanes work at once; one lane does one thing at a time."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one lane.

    Attributes:
        name: what ran.
        lane: where it ran.
        start_s: when it began, on a clock that all spans of a list share.
        end_s: when it ended.
        backward: whether it belongs to the backward pass.
        at: which dense op, or which token chunk of a routed call.
        call: number of the routed call; None for a dense op.
    """

    name: str
    lane: Lane
    start_s: float
    end_s: float
    backward: bool = False
    at: int = 0
    call: int | None = None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; empty intervals vanish."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    """Summed length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Points that two unions share, in order."""
    shared: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            shared.append((start, end))
        if one[i][1] <= other[j][1]:
            i += 1
        else:
            j += 1
    return shared


def communication_s(spans: Iterable[Span]) -> float:
    """How long at least one collective was under way."""
    return length(_lane(spans, Lane.COMMUNICATION))


def exposed_s(spans: Sequence[Span]) -> float:
    """How long a collective was under way while nothing was computed.

    Args:
        spans: those of one group and one step, whose forward and backward count alike. With the spans of several groups
            one group's computation would count as hiding another one's communication.
    """
    communication = _lane(spans, Lane.COMMUNICATION)
    return length(communication) - length(intersection(communication, _lane(spans, Lane.COMPUTE)))


def hidden_share(exposed: float, communication: float) -> float:
    """Part of the communication, from 0 to 1, that ran beside computation; 1 where there was none to hide.

    Args:
        exposed: its seconds beside no computation, of a group, or summed over groups or steps.
        communication: all of its seconds.
    """
    return 1 - exposed / communication if communication else 1.0


def _lane(spans: Iterable[Span], lane: Lane) -> list[Interval]:
    return union((span.start_s, span.end_s) for span in spans if span.lane is lane)
