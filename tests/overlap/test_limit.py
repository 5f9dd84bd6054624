"""The limit against plans, against schedules that no engine would run, and against limits worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from span_cases import (
    CHUNK_OPS,
    both,
    call_costs,
    cut,
    cut_span,
    group,
    pass_costs,
    plans,
    shapes,
    some_costs,
    span_costs,
)

from megatron_scmoe.contracts import Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.solver import PassCosts, predicted_s, solve
from megatron_scmoe.overlap.spans import Lane

untimed = settings(deadline=None)


@untimed
@given(st.data())
def test_no_plan_beats_the_limit(data):
    shape = data.draw(shapes(max_ops=8, max_calls=4))
    whole = data.draw(span_costs(shape))
    plan = data.draw(plans(shape, max_chunks=12))
    for forward_only in (True, False):
        seconds = predicted_s(shape, cut_span(whole, plan.chunks), plan, forward_only=forward_only)
        assert seconds >= limit_s(shape, whole, forward_only=forward_only) * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_not_even_the_best_plan_beats_the_limit(data):
    shape = data.draw(shapes())
    whole = both(data.draw(some_costs(shape, largest=20)))
    chunks = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    best_s = solve(shape, {chunks: cut_span(whole, chunks)}, forward_only=True).predicted_s
    assert best_s >= limit_s(shape, whole, forward_only=True) * (1 - 1e-12)


def dependencies(shape: SpanShape, chunks: int) -> set[tuple]:
    """Pairs of (name, at, call) of which the second needs the first, whatever the plan. Ops and routes keep order."""
    line = []
    before, landing = {}, {}
    for place in range(shape.num_ops):
        first = len(line)
        for call in [number for number, call in enumerate(shape.calls) if call.tap == place]:
            before[call] = len(line)
            line.append(("route", 0, call))
        for number, call in enumerate(shape.calls):
            if call.landing == place:
                landing[number] = first if call.late else len(line)
        line.append(("op", place, None))
    pairs = set(itertools.pairwise(line))
    for number in range(len(shape.calls)):
        for chunk in range(chunks):
            work = [(op, chunk, number) for op in CHUNK_OPS]
            pairs |= set(itertools.pairwise([line[before[number]], *work, line[landing[number]]]))
    return pairs


def any_order(shape: SpanShape, whole: PassCosts, chunks: int, choose) -> float:
    """Time of a schedule whose steps ``choose`` orders, each as early as its lane and its needs allow."""
    costs = cut(whole, chunks)
    pairs = dependencies(shape, chunks)
    needs = {step: {first for first, second in pairs if second == step} for step in {s for pair in pairs for s in pair}}
    ends, free, todo = {}, dict.fromkeys(Lane, 0.0), sorted(needs, key=str)
    while todo:
        step = choose([step for step in todo if needs[step] <= ends.keys()])
        name, at, call = step
        lane = Lane.COMMUNICATION if name in ("dispatch", "combine") else Lane.COMPUTE
        start = max([free[lane], *(ends[need] for need in needs[step])])
        ends[step] = free[lane] = start + (costs.ops[at] if call is None else getattr(costs.calls[call], name))
        todo.remove(step)
    return max(ends.values())


@untimed
@given(st.data(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_no_order_of_the_ops_beats_the_limit(data, chunks, order):
    """Steps in any order that their needs allow, collectives too: schedules that no plan can ask for."""
    shape = data.draw(shapes(max_ops=6))
    whole = data.draw(some_costs(shape))
    # Steps of calls first, or dense ops first, more often than chance would have it.
    eager = data.draw(st.sampled_from([None, "experts", "dispatch", "combine", "op"]))

    def choose(ready):
        return order.choice([step for step in ready if step[0] == eager] or ready)

    limit = limit_s(shape, both(whole), forward_only=True)
    assert any_order(shape, whole, chunks, choose) >= limit * (1 - 1e-12)


def eager_plan(shape: SpanShape, costs: PassCosts, chunks: int) -> Plan:
    """Each chunk's experts before the first dense op at which its tokens are there."""
    op_s = sum(costs.ops) / (shape.num_ops - 1)

    def slots(call, its):
        arrivals = (its.encode + (chunk + 1) * its.dispatch / chunks for chunk in range(chunks))
        return tuple(min(1 + math.ceil(arrival / op_s), call.num_slots) for arrival in arrivals)

    return Plan(tuple(map(slots, shape.calls, costs.calls)))


@pytest.mark.parametrize("second_gate", [False, True])
@pytest.mark.parametrize(
    ("communication", "compute"), [(1, 10), (10, 1), (5, 5)], ids=["compute rules", "communication rules", "balanced"]
)
def test_many_small_pieces_come_near_the_limit(communication, compute, second_gate):
    ops = 60
    shape = group(tap=0, num_dense_ops=ops, second_gate=second_gate)
    costs = pass_costs(
        *[compute / ops] * ops, calls=1 + second_gate, route=0.1, encode=0.1, experts=0.5, decode=0.1,
        dispatch=communication, combine=communication,
    )  # fmt: skip
    limit = limit_s(shape, both(costs), forward_only=True)
    near = predicted_s(shape, cut_span(both(costs), 60), eager_plan(shape, costs, 60), forward_only=True)
    assert limit * (1 - 1e-12) <= near <= 1.04 * limit


def test_one_long_op_does_not_hide_both_ways():
    """10 s behind the tap, 6 s each way: 12 s of communication fit beside 10 s only if the op could be cut."""
    shape = group(tap=1, num_dense_ops=2)
    whole = both(pass_costs(3, 10, dispatch=6, combine=6))
    assert limit_s(shape, whole, forward_only=True) == 3 + 10 + 6
    assert limit_s(shape, whole) == 2 * (3 + 10 + 6)
    assert predicted_s(shape, whole, Plan(((1,),)), forward_only=True) == 3 + 6 + 10
    halves = both(pass_costs(3, 5, 5, dispatch=6, combine=6))
    assert limit_s(group(tap=1, num_dense_ops=3), halves, forward_only=True) == 3 + 12
    # Encoding in fine pieces keeps up with the dispatch: 2 s of it change nothing where 5 + 10 s fly and 10 s compute.
    encoding = both(pass_costs(3, 10, encode=2, dispatch=5, combine=10))
    assert limit_s(shape, encoding, forward_only=True) == 3 + 5 + 10


@untimed
@given(st.data())
def test_limit_is_reached_where_there_is_one_op_and_nothing_but_communication(data):
    tap = data.draw(st.integers(0, 2))
    shape = group(tap, tap + 1)
    costs = data.draw(some_costs(shape))
    call = dataclasses.replace(costs.calls[0], encode=0, experts=0, decode=0)
    whole = both(dataclasses.replace(costs, calls=(call,)))
    assert solve(shape, {1: whole}).predicted_s == limit_s(shape, whole)


def limit_and_best(shape: SpanShape, costs: PassCosts) -> tuple[float, float]:
    costs = {n: cut_span(both(costs), n) for n in (1, 2)}
    return limit_s(shape, costs[1], forward_only=True), solve(shape, costs, forward_only=True).predicted_s


def test_limit_is_reached_with_two_flights():
    """dgmoe, three limits that some plan reaches: 2 s to carry tokens there and 4 s back, in both flights."""

    def two_flights(*ops):
        shape = group(tap=0, num_dense_ops=len(ops), second_gate=True)
        return limit_and_best(shape, pass_costs(*ops, calls=2, dispatch=2, combine=4))

    assert two_flights(4, 4) == (8 + 6, 8 + 6)  # the second flight starts behind all ops
    assert two_flights(1, 1) == (6 + 6, 6 + 6)  # the wire is never idle
    # Beside the second op, 2 s, half a combine fits. So the other half must fly beside the first, and for that half a
    # dispatch, 1 s, must be there before it; or the wire has more to carry behind the ops than the second flight.
    assert two_flights(10, 2) == (1 + 10 + 2 + 6, 1 + 10 + 2 + 6)


def test_limits_of_groups_that_share_nothing_add_up():
    """Each group's op of 10 s hides one way, 6 s, and not the other."""
    shape = SpanShape(4, (RoutedCall(0, 1), RoutedCall(2, 3)))
    costs = PassCosts(ops=(10, 1, 10, 1), calls=(call_costs(dispatch=6, combine=6),) * 2)
    assert limit_and_best(shape, costs) == (2 * (10 + 6 + 1),) * 2


def test_limit_falls_where_a_call_lands_late():
    """Then the first call's combine hides behind the second group's op, and that group's call shares the wire."""

    def landing(first_call):
        shape = SpanShape(4, (first_call, RoutedCall(2, 3)))
        return limit_and_best(shape, PassCosts(ops=(10, 0, 10, 0), calls=(call_costs(dispatch=6, combine=6),) * 2))

    assert landing(RoutedCall(0, 1)) == (32, 32)
    # Beside the second op fly the first call's combine and the second one's dispatch, 12 s and so 2 s too many.
    assert landing(RoutedCall(0, 3, late=True)) == (10 + 10 + 2 + 6, 10 + 10 + 2 + 6)
