"""What no schedule of a span's ops beats, by which every plan is judged. Pure, standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from megatron_scmoe.contracts import SpanShape

if TYPE_CHECKING:
    from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts

SPLIT_CALLS = 3
"""Most calls of a window that is split at its ops: with more, little is gained and much to be computed."""

_Line = tuple[float, tuple[float, ...]]
"""``a + b X``, for parts X in [0, 1] of some calls: a, and b for each call."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A call, all of whose work lies between two of the span's ops: behind ``route``, and before ``landing``."""

    route: int
    landing: int
    costs: CallCosts

    @property
    def computing_s(self) -> float:
        return self.costs.encode + self.costs.experts + self.costs.decode

    @property
    def communicating_s(self) -> float:
        return self.costs.dispatch + self.costs.combine


def limit_s(shape: SpanShape, costs: SpanCosts, *, forward_only: bool = False) -> float:
    """What no schedule of these ops on two lanes beats, whatever its chunks and wherever its experts run.

    Only the work of the calls may be cut, as finely as one likes. A dense op or a route is one piece, and they run in
    their order. Cutting makes no op cheaper in all. :func:`_pass_limit_s` says why nothing is faster. A schedule of the
    backward pass, read from its end, is one of the forward pass with backward's costs, and so both have the same limit.

    Args:
        shape: the span.
        costs: what the span costs uncut, at one chunk.
        forward_only: leave backward out.
    """
    forward_s = _pass_limit_s(shape, costs.forward)
    return forward_s if forward_only else costs.training_s(forward_s, _pass_limit_s(shape, costs.backward))


def _pass_limit_s(shape: SpanShape, costs: PassCosts) -> float:
    """Limit of one pass: the least time at which each op can start, one after the other, and the end behind all.

    An op starts when the one before it has ended. And behind the start of any route it starts no sooner than the calls
    take that are routed there or later and land before the op (:func:`_window_s`).
    """
    ops, flights = _line(shape, costs)
    starts_s = [0.0]
    for end in range(1, len(ops) + 1):
        bounds = [starts_s[-1] + ops[end - 1]]
        if any(flight.landing == end for flight in flights):
            for first in {flight.route for flight in flights}:
                within = [f for f in flights if first <= f.route and f.landing <= end]
                if within:
                    bounds.append(starts_s[first] + _window_s(ops[first:end], [_moved(f, first) for f in within]))
        starts_s.append(max(bounds))
    return starts_s[-1]


def _line(shape: SpanShape, costs: PassCosts) -> tuple[list[float], list[_Flight]]:
    """The ops, routes among them, in the order that ``SpanShape`` says, and the calls."""
    ops: list[float] = []
    route: dict[int, int] = {}
    landing: dict[int, int] = {}
    for place in range(shape.num_ops):
        landing |= dict.fromkeys(shape.landing_before(place), len(ops))
        for call in shape.tapped_at(place):
            route[call] = len(ops)
            ops.append(costs.calls[call].route)
        landing |= dict.fromkeys(shape.landing_in(place), len(ops))
        ops.append(costs.ops[place])
    return ops, [_Flight(route[number], landing[number], call) for number, call in enumerate(costs.calls)]


def _moved(flight: _Flight, first: int) -> _Flight:
    return _Flight(flight.route - first, flight.landing - first, flight.costs)


def _window_s(ops: Sequence[float], flights: Sequence[_Flight]) -> float:
    """Least time from the start of the first of ``ops``, a route, until all of them and all of ``flights`` are done.

    * The compute lane has all ops and all encoding, experts and decoding to do.
    * Behind the first op the communication lane has all dispatches and combines to carry.
    * Each further op splits time in two (:func:`_split_s`).
    """
    bounds = [
        sum(ops) + sum(flight.computing_s for flight in flights),
        ops[0] + sum(flight.communicating_s for flight in flights),
    ]
    if len(flights) <= SPLIT_CALLS:
        bounds += [_split_s(ops, flights, at) for at in range(1, len(ops))]
    return max(bounds)


def _split_s(ops: Sequence[float], flights: Sequence[_Flight], at: int) -> float:
    """Least time of a window by what is before and behind op ``at``, which no other computation runs beside.

    Calls that land before it are done when it starts, and calls that are routed by it or later have not begun when it
    ends. Of each other call some part X of the tokens has passed the experts when it starts: they were dispatched by
    then, and encoded and computed. The rest passes the experts, is combined and decoded when it has ended. So each lane
    bounds the time before it and the time behind it by a linear function of these parts. The op costs at least the
    smallest sum over them: this is why a single long op cannot hide dispatch and combine both.
    """
    done = [flight for flight in flights if flight.landing <= at]
    to_come = [flight for flight in flights if flight.route >= at]
    crossing = [flight.costs for flight in flights if flight.route < at < flight.landing]
    before: list[_Line] = [
        (sum(ops[:at]) + sum(f.computing_s for f in done), tuple(c.encode + c.experts for c in crossing)),
        (ops[0] + sum(f.communicating_s for f in done), tuple(c.dispatch for c in crossing)),
    ]
    rest = [c.experts + c.decode for c in crossing]
    combines = [c.combine for c in crossing]
    behind: list[_Line] = [
        (sum(ops[at + 1 :]) + sum(f.computing_s for f in to_come) + sum(rest), tuple(-seconds for seconds in rest)),
        (sum(f.communicating_s for f in to_come) + sum(combines), tuple(-seconds for seconds in combines)),
    ]
    for first in {flight.route for flight in to_come}:  # ops, and then all that is routed there or later
        late = sum(flight.communicating_s for flight in to_come if flight.route >= first)
        behind.append((sum(ops[at + 1 : first + 1]) + late, (0.0,) * len(crossing)))
    sums = [(a + c, tuple(map(sum, zip(b, d, strict=True)))) for a, b in before for c, d in behind]
    return ops[at] + max(_mixed_bounds(sums))


def _mixed_bounds(lines: Sequence[_Line]) -> Iterator[float]:
    """Bounds from below of the largest of the lines, whatever X is: the smallest values of any two of them, mixed.

    The smallest value of a mix is at X of 0 or 1 for each call. It is largest where the mix ceases to rise or fall with
    one call's X. With one call, the best of these bounds is the smallest value of the largest line.
    """
    yield from (a + sum(min(0.0, slope) for slope in b) for a, b in lines)
    for (a, b), (c, d) in combinations(lines, 2):
        for rising, falling in zip(b, d, strict=True):
            if rising * falling < 0:
                share = falling / (falling - rising)
                slopes = (share * one + (1 - share) * other for one, other in zip(b, d, strict=True))
                yield share * a + (1 - share) * c + sum(min(0.0, slope) for slope in slopes)
