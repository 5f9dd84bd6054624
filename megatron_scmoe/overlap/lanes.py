"""How far the two lanes are behind an event of a span, as a vector of times. Standard library only.

Entries 0 and 1 say when the compute and the communication lane are free; three more follow for each call under way:

=======  ==========================================  ======================================================
entry    ``Played``                                  ``Mirrored``
=======  ==========================================  ======================================================
first    compute lane where it set off               when its landing is over on the compute lane
second   communication lane there                    when its landing is over on the communication lane
third    when its landing is over                    compute lane where it set off
=======  ==========================================  ======================================================

where a landing is over by the results so far. To an entry of one class that of the other class is added which was read
from the other end: when something is ready, and how long it takes from there. What nothing waits for is entry 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_scmoe.overlap.events import Counts, Event

if TYPE_CHECKING:
    from megatron_scmoe.overlap.solver import CallCosts, PassCosts

Vector = tuple[float, ...]


class _Call:
    """Costs of one call, in the direction of reading, and sums of them for every number of chunks.

    Attributes:
        experts: of one chunk.
        dispatch: of one chunk.
        combine: of one chunk.
        encodes: of k chunks, for k from 0.
        decodes: of k chunks.
        dispatches: of k chunks.
        combines: of k chunks.
        sent: from setting off until chunk k - 1 has been dispatched, were the communication lane free.
        received: from the first combine's begin until k chunks are decoded.
    """

    def __init__(self, costs: CallCosts, chunks: int, *, from_the_end: bool, aside_s: float | None) -> None:
        there = (costs.encode, costs.dispatch)
        back = (costs.decode, costs.combine)
        (encode, self.dispatch), (decode, self.combine) = (back, there) if from_the_end else (there, back)
        self.experts = costs.experts
        numbers = range(chunks + 1)
        self.encodes = [k * encode for k in numbers]
        self.dispatches = [k * self.dispatch for k in numbers]
        self.combines = [k * self.combine for k in numbers]
        self.decodes = [k * decode for k in numbers]
        self.sent = [max(encode + k * self.dispatch, k * encode + self.dispatch) for k in numbers]
        self.received = [max(self.combine + k * decode, k * self.combine + decode) for k in numbers]
        if aside_s is not None:  # all chunks are packed by then
            dispatched = [chunks * costs.encode + aside_s + k * costs.dispatch for k in numbers]
            if from_the_end:
                self.received = dispatched
            else:
                self.sent = dispatched


class Played:
    """A pass in the order of its launch: collectives enter the communication lane where they start.

    Args:
        costs: of the pass.
        chunks: n.
        from_the_end: whether the events come from the last to the first.
        aside_s: of the calls that are not launched before the op at their tap, from its begin to the launch.
    """

    def __init__(self, costs: PassCosts, chunks: int, *, from_the_end: bool, aside_s: Mapping[int, float]) -> None:
        self._chunks = chunks
        self._ops = (*costs.ops, *(call.route for call in costs.calls))
        self._calls = [
            _Call(call, chunks, from_the_end=from_the_end, aside_s=aside_s.get(number))
            for number, call in enumerate(costs.calls)
        ]
        self._by_kind = (self._op, self._set_off, self._run, self._land)  # in the order of Kind

    def behind(self, event: Event, v: Vector, chunk: int) -> Vector:
        """The vector behind an event; of a gap, behind the experts of ``chunk``."""
        return self._by_kind[event.kind](v, event.of, event.at, chunk)

    def _op(self, v: Vector, of: int, at: int, k: int) -> Vector:
        return (v[0] + self._ops[of], *v[1:])

    def _set_off(self, v: Vector, of: int, at: int, k: int) -> Vector:
        call, n = self._calls[of], self._chunks
        compute, wire = v[0], v[1]
        new = (compute, wire, compute)
        wire = max(wire + call.dispatches[n], compute + call.sent[n])
        return (compute + call.encodes[n], wire, *v[2:at], *new, *v[at:])

    def _run(self, v: Vector, of: int, at: int, k: int) -> Vector:
        call, left = self._calls[of], self._chunks - k
        compute_then, wire_then, landed = v[at : at + 3]
        arrival = max(wire_then + call.dispatches[k + 1], compute_then + call.sent[k + 1])
        compute = max(v[0], arrival) + call.experts
        wire = max(v[1], compute) + call.combine
        return (compute, wire, *v[2:at], compute_then, wire_then, max(landed, wire + call.decodes[left]), *v[at + 3 :])

    def _land(self, v: Vector, of: int, at: int, k: int) -> Vector:
        compute = max(v[0] + self._calls[of].decodes[self._chunks], v[at + 2])
        return (compute, v[1], *v[2:at], *v[at + 3 :])

    def settled(self, v: Vector, under_way: tuple[int, ...], counts: Counts) -> Vector:
        """The vector with each entry as late as it may be without making any pass longer, so that more are equal."""
        compute = v[0]
        entries = [compute, max(v[1], compute)]
        for position, (of, k) in enumerate(zip(under_way, counts, strict=True)):
            at = 2 + 3 * position
            entries += v[at : at + 2] if k < self._chunks else (compute, compute)
            entries.append(max(v[at + 2], compute + self._calls[of].decodes[self._chunks]) if k else compute)
        return tuple(entries)


class Mirrored(Played):
    """A pass read against the order of its launch: collectives enter the communication lane where they finish.

    A longest path is as long from its end. Where a collective waits for the one launched before it, read backwards the
    earlier one waits for the later; so they are served in the order of the waits, and each is available from its start.
    """

    def _set_off(self, v: Vector, of: int, at: int, k: int) -> Vector:
        compute = v[0]
        return (compute + self._calls[of].encodes[self._chunks], v[1], *v[2:at], compute, compute, compute, *v[at:])

    def _run(self, v: Vector, of: int, at: int, k: int) -> Vector:
        call, left = self._calls[of], self._chunks - k
        landed, landed_wire, compute_then = v[at : at + 3]
        wire = max(v[1], compute_then + call.encodes[k + 1]) + call.dispatch
        compute = max(v[0], wire) + call.experts
        landed = max(landed, compute + call.received[left])
        landed_wire = max(landed_wire, compute + call.combines[left])
        return (compute, wire, *v[2:at], landed, landed_wire, compute_then, *v[at + 3 :])

    def _land(self, v: Vector, of: int, at: int, k: int) -> Vector:
        call, n = self._calls[of], self._chunks
        compute = max(v[0] + call.decodes[n], v[1] + call.received[n], v[at])
        return (compute, max(v[1] + call.combines[n], v[at + 1]), *v[2:at], *v[at + 3 :])

    def settled(self, v: Vector, under_way: tuple[int, ...], counts: Counts) -> Vector:
        """As for ``Played``."""
        compute, wire = v[0], v[1] if under_way else v[0]
        n = self._chunks
        entries = [compute, wire]
        for position, (of, k) in enumerate(zip(under_way, counts, strict=True)):
            at, call = 2 + 3 * position, self._calls[of]
            if k:
                entries.append(max(v[at], compute + call.decodes[n], wire + call.received[n]))
                entries.append(max(v[at + 1], wire + call.combines[n]))
            else:
                entries += (compute, compute)
            entries.append(v[at + 2] if k < n else compute)
        return tuple(entries)
