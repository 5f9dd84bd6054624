"""Spans with costs and plans for tests of the solver: hand-made ones, and hypothesis' strategies for any."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts

CHUNK_OPS = ("encode", "dispatch", "experts", "combine", "decode")
"""What a call does for each chunk; ``route`` is done once."""
LAUNCH = ("wait", "enqueue")
"""What a launch costs, in forward alone; ``enqueue_core`` is part of the second."""


def group(tap: int, num_dense_ops: int, *, second_gate: bool = False) -> SpanShape:
    """One group; dgmoe's second gate reads what its end reads."""
    end = num_dense_ops
    calls = [RoutedCall(tap, end)] + [RoutedCall(end, end)] * second_gate
    return SpanShape(end + 1, tuple(calls))


def call_costs(**seconds: float) -> CallCosts:
    """Those named; 0 for the others."""
    return CallCosts(**(dict.fromkeys(("route", *CHUNK_OPS), 0) | seconds))


def pass_costs(*ops: float, calls: int = 1, **seconds: float) -> PassCosts:
    """Of ops, the end of the group behind the last, which costs nothing, and of calls that all cost the same."""
    return PassCosts(ops=(*ops, 0), calls=(call_costs(**seconds),) * calls)


def both(costs: PassCosts, **others: float) -> SpanCosts:
    """Backward costs what forward costs."""
    return SpanCosts(forward=costs, backward=costs, **others)


def cut(costs: PassCosts, chunks: int) -> PassCosts:
    """The calls' work in ``chunks`` equal parts, at no extra cost."""
    calls = (dataclasses.replace(c, **{op: getattr(c, op) / chunks for op in CHUNK_OPS}) for c in costs.calls)
    return dataclasses.replace(costs, calls=tuple(calls))


def cut_span(costs: SpanCosts, chunks: int) -> SpanCosts:
    """The calls' work of both passes in ``chunks`` equal parts."""
    return dataclasses.replace(costs, forward=cut(costs.forward, chunks), backward=cut(costs.backward, chunks))


def sum_of_all(costs: PassCosts, chunks: int) -> float:
    """All work of a pass, one thing at a time."""
    per_chunk = sum(getattr(call, op) for call in costs.calls for op in CHUNK_OPS)
    return sum(costs.ops) + sum(call.route + call.wait for call in costs.calls) + chunks * per_chunk


@st.composite
def shapes(draw: st.DrawFn, max_ops: int = 5, max_calls: int = 3) -> SpanShape:
    """Any ops and calls, those that land late and those that start together among them."""
    num_ops = draw(st.integers(1, max_ops))
    calls = []
    for tap in sorted(draw(st.lists(st.integers(0, num_ops - 1), min_size=1, max_size=max_calls))):
        late = tap + 1 < num_ops and draw(st.booleans())
        calls.append(RoutedCall(tap, draw(st.integers(tap + late, num_ops - 1)), late))
    attentions = draw(st.frozensets(st.integers(0, num_ops - 1)))
    return SpanShape(num_ops, tuple(calls), attentions=attentions)


@st.composite
def some_costs(
    draw: st.DrawFn, shape: SpanShape, smallest: int = 0, largest: int = 9, *, launches: bool = False
) -> PassCosts:
    """Of one pass, in whole seconds; with ``launches`` of a forward pass."""
    seconds = st.integers(smallest, largest)
    costs = ("route", *CHUNK_OPS, *(LAUNCH if launches else ()))
    ops = tuple(draw(seconds) for _ in range(shape.num_ops))
    calls = [draw(st.builds(CallCosts, **dict.fromkeys(costs, seconds))) for _ in shape.calls]
    cut = shape.cut if launches else ()
    for number, call in enumerate(shape.calls):
        if call.tap in cut:
            enqueue_core = draw(st.integers(0, calls[number].enqueue))
            calls[number] = dataclasses.replace(calls[number], enqueue_core=enqueue_core)
    return PassCosts(ops=ops, calls=tuple(calls), cores={at: draw(st.integers(0, ops[at])) for at in cut})


def span_costs(shape: SpanShape, **limits: int) -> st.SearchStrategy[SpanCosts]:
    """Of both passes, with and without full recompute."""
    forward, backward = (some_costs(shape, **limits, launches=launches) for launches in (True, False))
    return st.builds(SpanCosts, forward=forward, backward=backward, forward_runs=st.sampled_from([1.0, 2.0]))


@st.composite
def plans(draw: st.DrawFn, shape: SpanShape, max_chunks: int = 4) -> Plan:
    """Any plan of a span."""
    chunks = draw(st.integers(1, max_chunks))
    launch = draw(st.sampled_from([one for one in Launch if one is Launch.BEFORE or shape.launched_aside(one)]))
    aside = shape.launched_aside(launch)
    places = [st.integers(1 + (number in aside), call.num_slots) for number, call in enumerate(shape.calls)]
    slots = [st.lists(its, min_size=chunks, max_size=chunks) for its in places]
    return Plan(tuple(tuple(sorted(draw(its))) for its in slots), launch=launch)
