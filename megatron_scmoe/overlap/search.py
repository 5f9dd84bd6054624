"""Finds the plan with the smallest predicted time at one chunk count without trying all. Standard library only.

A span is read event by event: dense ops, calls that set off, gaps where experts of a call may run, calls that land.
What the rest of a pass has to know of what was read is how many chunks of each call have run, a *point*, and a few
times, a *state*. All that follows is a largest sum of these times and of costs, so that a later time is never better.

* Forward is read from its start, as it is launched (``lanes.Played``). Backward is read from its end
  (``lanes.Mirrored``) and so visits the same events: one reading carries both, and they share the plan.
* Read from the last event to the first, the two change roles. Entry by entry, a state read from the start plus one
  read from the end is the longest way across the point; the largest of these sums is the time of the pass.

Three readings find the plan. The first, from the start, knows the least value of each entry at each point. The second,
from the end, keeps at each point the states with which a plan may still be fast enough, by the first, and which no
other makes superfluous. The third, from the start, knows by the second how fast each beginning can end, and takes the
earliest slots that are fast enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import add, mul, sub
from typing import TYPE_CHECKING, Any

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.events import Counts, Event, Kind, events_of, from_the_end, num_points
from megatron_scmoe.overlap.lanes import Mirrored, Played, Vector
from megatron_scmoe.overlap.launch import ONCE, launched_s, with_launches
from megatron_scmoe.overlap.limit import limit_s

if TYPE_CHECKING:
    from megatron_scmoe.overlap.solver import CallCosts, SpanCosts

State = tuple[Vector, ...]
"""How far the lanes are, in each pass that is read."""
Fronts = dict[Counts, list[Any]]
"""What a reading keeps at the points behind one event."""

MAX_FRONT = 64
"""States kept at one point, the most promising. Where there are more, the search is not exact."""
ROUNDING = 1e-13
"""Part of the time by which equal times may differ."""


class Search:
    """The search for a plan with one number of chunks.

    Args:
        shape: of the span.
        costs: of the span at this number of chunks.
        chunks: of each call.
        forward_only: leave backward out.
        launch: of dispatches, where that can be.

    Attributes:
        least_s: what no plan beats.
        fastest_s: smallest time of a plan; infinite before one was found.
        exact: whether no plan is faster than ``fastest_s``, or than what was looked for.
        steps: how many were taken.
    """

    def __init__(self, shape: SpanShape, costs: SpanCosts, chunks: int, *, forward_only: bool, launch: Launch) -> None:
        self.chunks = chunks
        self.block = 1
        self.weights = (1.0,) if forward_only else (costs.forward_runs, 1.0)
        self.launch = launch
        aside_s = launched_s(costs.forward, shape, launch)
        costs = replace(costs, forward=with_launches(costs.forward, shape, launch))
        self.events = events_of(shape, aside_s)
        passes = [(costs.forward, aside_s)] if forward_only else [(costs.forward, aside_s), (costs.backward, {})]
        here, there = (Played, Mirrored), (Mirrored, Played)
        self.from_start = [
            kind(c, chunks, from_the_end=False, aside_s=its) for kind, (c, its) in zip(here, passes, strict=False)
        ]
        self.from_end = [
            kind(c, chunks, from_the_end=True, aside_s=its) for kind, (c, its) in zip(there, passes, strict=False)
        ]
        self.start: State = ((0.0, 0.0),) * len(passes)
        self.least_s = limit_s(shape, _in_one_chunk(costs, chunks), forward_only=forward_only)
        self.fastest_s = math.inf
        self.exact = True
        self.steps = 0
        self._num_calls = len(shape.calls)
        self._endings: _Endings | None = None

    def find(self, limit_s: float, tie: float, max_steps: int) -> None:
        """Look for plans that take ``limit_s`` at most.

        Args:
            limit_s: time within which a plan counts.
            tie: part of the time of the fastest by which others may be slower and are still kept for :meth:`earliest`.
            max_steps: points of a reading, and states that the second reading may keep. Where there are more points,
                chunks run in blocks; where there are more states, one is kept at a point. The search may not be exact.
        """
        sizes = [size for size in range(1, self.chunks + 1) if self.chunks % size == 0]
        points = {size: num_points(self.events, self.chunks // size) for size in sizes}
        self.block = next((size for size in sizes if points[size] <= max_steps), self.chunks)
        least = _Least(self)
        least.read(self.start)
        for max_states in (0, max_steps):  # with one state at a point, to know a limit
            endings = _Endings(self, least.kept, min(limit_s, self.fastest_s * (1 + tie)), max_states)
            endings.read(self.start)
            self.fastest_s = min([self.fastest_s, *map(self.seconds, endings.last())])
        self._endings = endings
        if self.block == 1:
            self.least_s = max(self.least_s, *map(self.seconds, least.last()))
        self.exact = (self.block == 1 and not endings.dropped) or self.fastest_s <= self.least_s * (1 + ROUNDING)
        self.steps = points[self.block] + endings.num_states

    def earliest(self, limit_s: float) -> Plan:
        """The plan with the earliest slots, compared call by call, of those found that take ``limit_s`` at most."""
        assert self._endings is not None
        beginnings = _Beginnings(self, self._endings.kept, limit_s, self._num_calls)
        beginnings.read((((),) * self._num_calls, self.start))
        slots, _ = min(beginnings.last())
        return Plan(slots, launch=self.launch)

    def seconds(self, state: State, other: State | None = None) -> float:
        """Time of the passes by two states of one point, read from either end; by one where all is read."""
        if other is None:
            return self.weigh([max(vector) for vector in state])
        return self.weigh([max(map(add, one, rest)) for one, rest in zip(state, other, strict=True)])

    def serves(self, one: State, other: State) -> bool:
        """Whether whatever ends ``other`` takes no longer with ``one``, a state of the same point."""
        later_s = [max(map(sub, mine, its)) for mine, its in zip(one, other, strict=True)]
        return self.weigh(later_s) <= self.least_s * ROUNDING

    def weigh(self, seconds: Sequence[float]) -> float:
        """Sum over the passes, each as often as it runs."""
        return sum(map(mul, self.weights, seconds))

    def opposite(self, fronts: Sequence[Fronts], index: int, counts: Counts) -> list[State]:
        """What a reading from the other end keeps behind its event ``index``, at the point that is ``counts`` here."""
        if index < 0:
            return [self.start]
        return fronts[index].get(tuple([self.chunks - count for count in counts]), [])


def _in_one_chunk(costs: SpanCosts, chunks: int) -> SpanCosts:
    def whole(call: CallCosts) -> CallCosts:
        return replace(call, **{op: seconds * chunks for op, seconds in asdict(call).items() if op not in ONCE})

    passes = {name: getattr(costs, name) for name in ("forward", "backward")}
    calls = {name: tuple(map(whole, its.calls)) for name, its in passes.items()}
    return replace(costs, **{name: replace(its, calls=calls[name]) for name, its in passes.items()})


class _Reading:
    """One reading of all events.

    Attributes:
        kept: what it keeps behind each event; of a gap, within it, where it may still run more chunks.
    """

    def __init__(self, search: Search, events: Sequence[Event], passes: Sequence[Played]) -> None:
        self.kept: list[Fronts] = []
        self.search, self.passes = search, passes
        self._events = events

    def last(self) -> list[Any]:
        """What is left at the end."""
        return self.kept[-1].get((), [])

    def read(self, first: Any) -> None:
        """Read all events, from what is kept before them."""
        fronts: Fronts = {(): [first]}
        for index, event in enumerate(self._events):
            rest = len(self._events) - 2 - index  # the event, counted from the other end, behind which this one lies
            if event.kind is Kind.GAP:
                self.kept.append(self._gap(event, rest + 1, fronts))
                fronts = {counts: self.possible(items, rest, counts) for counts, items in self.kept[-1].items()}
            else:
                self.kept.append(self._pass_by(event, rest, fronts))
                fronts = self.kept[-1]

    def step(self, item: Any, event: Event, chunk: int) -> Any:
        """Behind an event; of a gap, behind the experts of ``chunk``."""
        return tuple([p.behind(event, v, chunk) for p, v in zip(self.passes, item, strict=True)])

    def possible(self, items: list[Any], rest: int, counts: Counts) -> list[Any]:
        """Those with which the rest may still be fast enough."""
        return items

    def merged(self, items: list[Any], rest: int, counts: Counts, event: Event) -> list[Any]:
        """What has to be kept of these."""
        raise NotImplementedError

    def settled(self, state: State, counts: Counts, event: Event) -> State:
        """The state with all entries as late as they may be."""
        return tuple([p.settled(v, event.under_way, counts) for p, v in zip(self.passes, state, strict=True)])

    def _pass_by(self, event: Event, rest: int, fronts: Fronts) -> Fronts:
        new: Fronts = {}
        for counts, items in fronts.items():
            if event.kind is not Kind.LAND or counts[event.position] == self.search.chunks:
                behind = event.counts_behind(counts)
                new[behind] = self.merged([self.step(item, event, 0) for item in items], rest, behind, event)
        return new

    def _gap(self, event: Event, rest: int, fronts: Fronts) -> Fronts:
        here, block, chunks = event.position, self.search.block, self.search.chunks
        new: Fronts = {}
        for others in dict.fromkeys((counts[:here], counts[here + 1 :]) for counts in fronts):
            run: list[Any] = []
            for chunk in range(0, chunks + 1, block):
                counts = (*others[0], chunk, *others[1])
                if items := self.merged(fronts.get(counts, []) + run, rest, counts, event):
                    new[counts] = items
                run = items
                for number in range(chunk, min(chunk + block, chunks)):
                    run = [self.step(item, event, number) for item in run]
        return new


class _Least(_Reading):
    """From the start: one state at each point, of the least value of each entry, so that no plan is faster."""

    def __init__(self, search: Search) -> None:
        super().__init__(search, search.events, search.from_start)

    def merged(self, items: list[State], rest: int, counts: Counts, event: Event) -> list[State]:
        if len(items) < 2:
            return items
        settled = [self.settled(state, counts, event) for state in items]
        return [tuple([tuple(map(min, *vectors)) for vectors in zip(*settled, strict=True)])]


class _Endings(_Reading):
    """From the end: the states of plans that may take ``limit_s`` at most.

    Attributes:
        dropped: whether any was dropped for being one too many.
        num_states: how many are kept in all.
    """

    def __init__(self, search: Search, least: Sequence[Fronts], limit_s: float, max_states: int) -> None:
        super().__init__(search, from_the_end(search.events), search.from_end)
        self._least, self._limit_s, self._max_states = least, limit_s, max_states
        self.dropped = False
        self.num_states = 0

    def possible(self, items: list[State], rest: int, counts: Counts) -> list[State]:
        return [state for _, state in self._promising(items, rest, counts)]

    def merged(self, items: list[State], rest: int, counts: Counts, event: Event) -> list[State]:
        promising = self._promising(items, rest, counts)
        if len(promising) > 1:
            promising = sorted((bound_s, self.settled(state, counts, event)) for bound_s, state in promising)
        room = MAX_FRONT if self.num_states < self._max_states else 1
        kept: list[State] = []
        for _, state in promising:
            if not any(self.search.serves(other, state) for other in kept):
                if len(kept) == room:
                    self.dropped = True
                    break
                kept.append(state)
        self.num_states += len(kept)
        return kept

    def _promising(self, items: list[State], rest: int, counts: Counts) -> list[tuple[float, State]]:
        bounds = [
            (self.search.seconds(state, begun), state)
            for begun in self.search.opposite(self._least, rest, counts)
            for state in items
        ]
        return [pair for pair in bounds if pair[0] <= self._limit_s]


class _Beginnings(_Reading):
    """From the start: slots so far, of all calls, and a state, where some ending leads to ``limit_s`` at most."""

    def __init__(self, search: Search, endings: Sequence[Fronts], limit_s: float, num_calls: int) -> None:
        super().__init__(search, search.events, search.from_start)
        self._endings, self._limit_s, self._num_calls = endings, limit_s, num_calls

    def step(self, item: Any, event: Event, chunk: int) -> Any:
        slots, state = item
        if event.kind is Kind.GAP:
            call = event.of
            slots = (*slots[:call], (*slots[call], event.slot), *slots[call + 1 :])
        return slots, super().step(state, event, chunk)

    def possible(self, items: list[Any], rest: int, counts: Counts) -> list[Any]:
        endings = self.search.opposite(self._endings, rest, counts)
        return [item for item in items if any(self.search.seconds(item[1], s) <= self._limit_s for s in endings)]

    def merged(self, items: list[Any], rest: int, counts: Counts, event: Event) -> list[Any]:
        kept: list[Any] = []
        settled = [(slots, self.settled(state, counts, event)) for slots, state in items]
        unfinished = [n for n, count in zip(event.under_way, counts, strict=True) if count < self.search.chunks]
        decided = min(unfinished, default=self._num_calls) + 1  # whatever follows, the slots of these calls decide
        for slots, state in sorted(self.possible(settled, rest, counts)):
            if not any(s[:decided] < slots[:decided] or self.search.serves(o, state) for s, o in kept):
                kept.append((slots, state))
        return kept[:MAX_FRONT]
