"""The events of a span that a plan is searched along, from either end. Standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from megatron_scmoe.contracts import SpanShape

Counts = tuple[int, ...]
"""How many chunks have run their experts, of each call under way."""


class Kind(IntEnum):
    """What happens at an event."""

    OP = 0
    SET_OFF = 1
    GAP = 2
    LAND = 3


class Event(NamedTuple):
    """One event.

    Attributes:
        kind: what happens: an op, a call that sets off, a gap where experts of a call may run, a call that lands.
        of: number of the call; of an op its index, routes behind the dense ops.
        slot: of a gap.
        under_way: the calls under way behind it.
        position: the call's place among them, itself included.
        at: where its entries begin in a vector of ``lanes.py``.
    """

    kind: Kind
    of: int
    slot: int = 0
    under_way: tuple[int, ...] = ()
    position: int = 0
    at: int = 0

    def counts_behind(self, counts: Counts) -> Counts:
        """``counts`` with the call that sets off, or without the one that lands."""
        here = self.position
        if self.kind is Kind.SET_OFF:
            return (*counts[:here], 0, *counts[here:])
        return counts[:here] + counts[here + 1 :] if self.kind is Kind.LAND else counts


def events_of(shape: SpanShape, aside: Collection[int] = ()) -> list[Event]:
    """The events of a span from its start, in the order that ``SpanShape`` says.

    Args:
        shape: of the span.
        aside: numbers of the calls that are not launched before the op at their tap: experts run behind it.
    """
    events: list[Event] = []
    for place in range(shape.num_ops):
        late = shape.landing_before(place)
        for call in late:
            events += [_gap(shape, call, place), Event(Kind.LAND, call)]
        for call in shape.tapped_at(place):
            events += [Event(Kind.OP, shape.num_ops + call), Event(Kind.SET_OFF, call)]
        for call, routed in enumerate(shape.calls):
            if call not in late and routed.tap + (call in aside) <= place <= routed.landing:
                events.append(_gap(shape, call, place))
        events += [Event(Kind.LAND, call) for call in shape.landing_in(place)]
        events.append(Event(Kind.OP, place))
    return list(_with_calls_under_way(events))


def from_the_end(events: Sequence[Event]) -> list[Event]:
    """The same events from the last to the first: a call sets off where it lands."""
    swapped = {Kind.SET_OFF: Kind.LAND, Kind.LAND: Kind.SET_OFF}
    return list(_with_calls_under_way(e._replace(kind=swapped.get(e.kind, e.kind)) for e in reversed(events)))


def num_points(events: Iterable[Event], blocks: int) -> int:
    """Points behind all events where each call runs in ``blocks`` parts."""
    return sum((blocks + 1) ** len(event.under_way) for event in events)


def _gap(shape: SpanShape, call: int, place: int) -> Event:
    return Event(Kind.GAP, call, slot=place - shape.calls[call].tap + 1)


def _with_calls_under_way(events: Iterable[Event]) -> Iterator[Event]:
    under_way: tuple[int, ...] = ()
    for event in events:
        if event.kind is Kind.SET_OFF:
            under_way = tuple(sorted((*under_way, event.of)))
        position = 0 if event.kind is Kind.OP else under_way.index(event.of)
        if event.kind is Kind.LAND:
            under_way = tuple(call for call in under_way if call != event.of)
        yield event._replace(under_way=under_way, position=position, at=2 + 3 * position)
