"""The solver's model against a slow simulator and worked examples, and its timelines against the order of a plan.

Costs are whole numbers of seconds, so that times are compared exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from span_cases import (
    CHUNK_OPS,
    LAUNCH,
    both,
    call_costs,
    cut_span,
    group,
    pass_costs,
    plans,
    shapes,
    some_costs,
    span_costs,
    sum_of_all,
)

from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.plan import Step, backward_order, forward_order
from megatron_scmoe.overlap.solver import (
    PassCosts,
    SpanCosts,
    predicted_hidden_share,
    predicted_s,
    schedule,
    solve,
)
from megatron_scmoe.overlap.spans import Lane

untimed = settings(deadline=None)

# ---- a slow simulator, written from the description of how a span runs: it knows nothing of the solver's steps


@dataclasses.dataclass(frozen=True)
class Work:
    """One op on the compute lane: it waits for ``needs`` and launches ``launches``.

    Where dispatches of the call ``aside`` are launched behind it, the host enqueues it, waits for the counts and
    launches them; only then it can enqueue what comes next, ``within`` an attention that is its core attention.
    """

    op: str
    of: tuple = ()
    needs: tuple | None = None
    launches: tuple | None = None
    aside: int | None = None
    within: bool = False


def forward_work(shape: SpanShape, slots, launch=Launch.BEFORE) -> list[Work]:
    work, late = [], shape.launched_aside(launch)
    chunks = range(len(slots[0]))

    def experts(call, place):
        for chunk in chunks:
            if slots[call][chunk] == place - shape.calls[call].tap + 1:
                key = (call, chunk)
                work.append(Work("experts", key, needs=("dispatch", *key), launches=("combine", *key)))

    def land(call):
        work.extend(Work("decode", (call, chunk), needs=("combine", call, chunk)) for chunk in chunks)

    for place in range(shape.num_ops):
        numbered = list(enumerate(shape.calls))
        for call, its in numbered:
            if its.late and its.landing == place:
                experts(call, place)
                land(call)
        for call, its in numbered:
            if its.tap == place:
                work.append(Work("route", (call,)))
                if call in late:
                    work += [Work("encode", (call, chunk)) for chunk in chunks]
                    continue
                work += [Work("encode", (call, 0)), Work("wait", (call,), launches=("dispatch", call, 0))]
                work += [Work("encode", (call, chunk), launches=("dispatch", call, chunk)) for chunk in chunks[1:]]
        for call, its in numbered:
            if its.tap <= place and not (its.late and its.landing == place):
                experts(call, place)
        for call, its in numbered:
            if not its.late and its.landing == place:
                land(call)
        aside = [call for call, its in numbered if its.tap == place and call in late]
        within = launch is Launch.WITHIN
        work.append(Work("op", (place,), aside=aside[0], within=within) if aside else Work("op", (place,)))
    return work


def backward_work(shape: SpanShape, slots) -> list[Work]:
    work = []
    chunks = range(len(slots[0]) - 1, -1, -1)
    numbered = list(enumerate(shape.calls))[::-1]

    def experts(call, place):
        for chunk in chunks:
            if slots[call][chunk] == place - shape.calls[call].tap + 1:
                key = (call, chunk)
                work.append(Work("experts", key, needs=("combine", *key), launches=("dispatch", *key)))

    def leave(call):
        work.extend(Work("decode", (call, chunk), launches=("combine", call, chunk)) for chunk in chunks)

    for place in range(shape.num_ops - 1, -1, -1):
        work.append(Work("op", (place,)))
        for call, its in numbered:
            if not its.late and its.landing == place:
                leave(call)
        for call, its in numbered:
            if its.tap <= place and not (its.late and its.landing == place):
                experts(call, place)
        for call, its in numbered:
            if its.tap == place:
                work += [Work("encode", (call, chunk), needs=("dispatch", call, chunk)) for chunk in chunks]
                work.append(Work("route", (call,)))
        for call, its in numbered:
            if its.late and its.landing == place:
                leave(call)
                experts(call, place)
    return work


def clock_ticks(work: list[Work], costs: PassCosts, chunks: int) -> int:
    """Second by second: each lane does one second of what it is at. Costs are whole and not zero."""

    def seconds(op, of, *_):
        return costs.ops[of] if op == "op" else getattr(costs.calls[of], op)

    todo, sent, arrived = deque(work), deque(), set()
    now, at_work, on_the_wire = 0, 0, 0
    while todo:
        current = todo[0]
        working = at_work > 0 or current.needs is None or current.needs in arrived
        if sent:
            on_the_wire += 1
        if working:
            at_work += 1
        now += 1
        if sent and on_the_wire == seconds(*sent[0]):
            arrived.add(sent.popleft())
            on_the_wire = 0
        if not working:
            continue
        until = seconds(current.op, *current.of)
        if current.aside is not None:
            rest = costs.cores[current.of[0]] if current.within else 0
            host = seconds("enqueue", current.aside) - (seconds("enqueue_core", current.aside) if current.within else 0)
            launched = host + seconds("wait", current.aside)
            until = max(until - rest, launched) + rest
            if at_work == launched:
                sent.extend(("dispatch", current.aside, chunk) for chunk in range(chunks))
        if at_work == until:
            todo.popleft()
            at_work = 0
            if current.launches:
                sent.append(current.launches)
    assert not sent
    return now


def slow_time(shape: SpanShape, costs: SpanCosts, slots, *, forward_only: bool, launch: Launch) -> float:
    chunks = len(slots[0])
    forward = clock_ticks(forward_work(shape, slots, launch), costs.forward, chunks)
    if forward_only:
        return forward
    return costs.forward_runs * forward + clock_ticks(backward_work(shape, slots), costs.backward, chunks)


@untimed
@given(st.data())
def test_prediction_equals_the_slow_simulator(data):
    shape = data.draw(shapes())
    costs = data.draw(span_costs(shape, smallest=1))
    plan = data.draw(plans(shape))
    for forward_only in (True, False):
        slow = slow_time(shape, costs, plan.slots, forward_only=forward_only, launch=plan.launch)
        assert predicted_s(shape, costs, plan, forward_only=forward_only) == slow


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_solution_equals_the_slow_simulators_best(data):
    """Over every placement of every chunk, those in which a later chunk runs before an earlier one included."""
    shape = data.draw(shapes(max_ops=3, max_calls=2))
    chunk_counts = (1, 2, 3) if len(shape.calls) == 1 else (1, 2)
    costs = {chunks: data.draw(span_costs(shape, smallest=1, largest=7)) for chunks in chunk_counts}
    forward_only = data.draw(st.booleans())

    def placements(chunks, launch):
        aside = shape.launched_aside(launch)
        return itertools.product(
            *[
                itertools.product(range(1 + (number in aside), call.num_slots + 1), repeat=chunks)
                for number, call in enumerate(shape.calls)
            ]
        )

    best = min(
        slow_time(shape, costs[chunks], slots, forward_only=forward_only, launch=launch)
        for chunks in costs
        for launch in Launch
        for slots in placements(chunks, launch)
    )
    solution = solve(shape, costs, forward_only=forward_only)
    assert solution.predicted_s == best
    chosen, launch = costs[solution.plan.chunks], solution.plan.launch
    assert slow_time(shape, chosen, solution.plan.slots, forward_only=forward_only, launch=launch) == best


def test_simulator_notices_a_missing_wait():
    """Negative control of the slow simulator: experts that do not wait for their tokens give another time."""
    shape = group(tap=0, num_dense_ops=1)
    costs = PassCosts(ops=(1, 3), calls=(call_costs(**dict.fromkeys(("route", *CHUNK_OPS, *LAUNCH), 3)),))
    work = forward_work(shape, ((1,),))
    broken = [dataclasses.replace(w, needs=None) if w.op == "experts" else w for w in work]
    assert clock_ticks(work, costs, 1) == predicted_s(shape, both(costs), Plan(((1,),)), forward_only=True)
    assert clock_ticks(broken, costs, 1) < clock_ticks(work, costs, 1)


def test_simulator_notices_a_launch_that_waits_for_nothing():
    """Negative control of the slow simulator: a host that launches before it has enqueued the op gives another time."""
    shape = group(tap=0, num_dense_ops=2)
    costs = PassCosts(ops=(5, 1, 3), calls=(call_costs(**dict.fromkeys(("route", *CHUNK_OPS, *LAUNCH), 3)),))
    work, plan = forward_work(shape, ((2,),), Launch.BEHIND), Plan(((2,),), launch=Launch.BEHIND)
    sooner = dataclasses.replace(costs, calls=(dataclasses.replace(costs.calls[0], enqueue=1),))
    assert clock_ticks(work, costs, 1) == predicted_s(shape, both(costs), plan, forward_only=True)
    assert clock_ticks(work, sooner, 1) < clock_ticks(work, costs, 1)


# ---- timelines


def dependencies(shape: SpanShape, plan: Plan, *, backward: bool) -> set[tuple]:
    """Pairs of (name, at, call) in forward, of which the second needs the first, with the order the slots demand."""
    aside, cut = shape.launched_aside(plan.launch), frozenset() if backward else shape.cut
    ops = [[("op", place, None), *[("core attention", place, None)] * (place in cut)] for place in range(shape.num_ops)]
    pairs = set(itertools.pairwise(itertools.chain(*ops)))
    for number, call in enumerate(shape.calls):
        chain = [("route", 0, number)]
        if call.tap:
            pairs.add((ops[call.tap - 1][-1], chain[0]))
        if not backward:
            wait = ("wait", 0, number)
            if number not in aside:
                pairs |= {(("encode", 0, number), wait), (wait, ("dispatch", 0, number))}
            elif plan.launch is Launch.WITHIN:
                pairs |= {(ops[call.tap][0], wait), (wait, ops[call.tap][1])}
            else:
                pairs |= {(ops[call.tap][-1], wait), (wait, ops[call.tap + 1][0])}
        for chunk, slot in enumerate(plan.slots[number]):
            steps = [*chain, *((op, chunk, number) for op in CHUNK_OPS), ops[call.landing][0]]
            pairs |= set(itertools.pairwise(steps))
            place = call.tap + slot - 1
            pairs.add((("experts", chunk, number), ops[place][0]))
            if place:
                pairs.add((ops[place - 1][-1], ("experts", chunk, number)))
    return pairs


def faults(spans, pairs, *, backward: bool) -> list[str]:
    """What is wrong with a timeline: ops missing or twice, a lane doing two things at once, a need not met."""
    times = {(span.name, span.at, span.call): span for span in spans}
    wrong = [] if len(times) == len(spans) else ["an op runs twice"]
    wrong += [f"{op} does not run" for op in {op for pair in pairs for op in pair} - times.keys()]
    for lane in Lane:
        on_lane = sorted((s.start_s, s.end_s) for s in spans if s.lane is lane)
        wrong += [f"{lane}: {a} {b}" for a, b in itertools.pairwise(on_lane) if a[1] > b[0]]
    for pair in pairs:
        first, second = reversed(pair) if backward else pair
        if first in times and second in times and times[first].end_s > times[second].start_s:
            wrong.append(f"{second} does not wait for {first}")
    return wrong


@untimed
@given(st.data())
def test_timeline_is_legal(data):
    shape = data.draw(shapes())
    costs = data.draw(some_costs(shape, launches=True))
    plan = dataclasses.replace(data.draw(plans(shape)), blocking=data.draw(st.booleans()))
    for backward in (False, True):
        one_way = dataclasses.replace(costs, cores={}) if backward else costs
        spans = schedule(shape, one_way, plan, backward=backward)
        assert faults(spans, dependencies(shape, plan, backward=backward), backward=backward) == []
        assert all(span.backward is backward for span in spans)
        for span in spans:
            assert (span.lane is Lane.COMMUNICATION) == (span.name in ("dispatch", "combine"))
            its_costs = one_way.seconds(Step(span.name, span.at, span.call))
            if span.name == "wait" and span.call in shape.launched_aside(plan.launch):  # beside the op at the tap
                assert span.end_s - span.start_s <= its_costs + costs.calls[span.call].enqueue
            else:
                assert span.end_s - span.start_s == its_costs


LATE_AND_DGMOE = SpanShape(
    6, (RoutedCall(0, 3, late=True), RoutedCall(2, 3, late=True), RoutedCall(4, 5), RoutedCall(5, 5))
)
"""Two groups of two ops and an end. The first one's calls land behind the first op of the second."""

CUT = dataclasses.replace(group(1, 3), attentions=frozenset({1}))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [group(1, 3), group(1, 3, second_gate=True), CUT, LATE_AND_DGMOE], ids=str)
def test_broken_timeline_is_found(backward, shape):
    """Negative control: with any one span begun a second earlier, or left out, the timeline has a fault."""
    seconds = call_costs(**dict.fromkeys(("route", *CHUNK_OPS, *LAUNCH), 2))
    cores = {} if backward else dict.fromkeys(shape.cut, 1)
    costs = PassCosts(ops=(2,) * shape.num_ops, calls=(seconds,) * len(shape.calls), cores=cores)
    plan = Plan(tuple((1, call.num_slots) for call in shape.calls))
    pairs = dependencies(shape, plan, backward=backward)
    spans = schedule(shape, costs, plan, backward=backward)
    assert faults(spans, pairs, backward=backward) == []
    for index, span in enumerate(spans):
        if span.start_s > 0:
            early = dataclasses.replace(span, start_s=span.start_s - 1, end_s=span.end_s - 1)
            assert faults([*spans[:index], early, *spans[index + 1 :]], pairs, backward=backward), span
        assert faults([*spans[:index], *spans[index + 1 :]], pairs, backward=backward), span


@untimed
@given(st.data())
def test_blocking_plan_takes_the_sum_of_everything(data):
    shape = data.draw(shapes())
    costs = data.draw(span_costs(shape))
    plan = dataclasses.replace(data.draw(plans(shape)), blocking=True, launch=Launch.BEFORE)
    forward, backward = (sum_of_all(c, plan.chunks) for c in (costs.forward, costs.backward))
    assert predicted_s(shape, costs, plan, forward_only=True) == forward
    assert predicted_s(shape, costs, plan) == costs.forward_runs * forward + backward
    if any(c.dispatch + c.combine for p in (costs.forward, costs.backward) for c in p.calls):
        assert predicted_hidden_share(shape, costs, plan) == 0


@untimed
@given(st.data())
def test_hidden_share_lies_between_nothing_and_all(data):
    shape = data.draw(shapes())
    costs = data.draw(span_costs(shape))
    assume(any(call.dispatch + call.combine > 0 for call in costs.forward.calls))
    share = predicted_hidden_share(shape, costs, data.draw(plans(shape)), forward_only=data.draw(st.booleans()))
    assert 0 <= share <= 1


@untimed
@given(st.data())
def test_more_work_never_takes_less_time(data):
    shape = data.draw(shapes())
    costs = data.draw(span_costs(shape))
    plan = data.draw(plans(shape))
    direction = data.draw(st.sampled_from(["forward", "backward"]))
    one_pass = getattr(costs, direction)
    call = data.draw(st.integers(0, len(shape.calls) - 1))
    op = data.draw(st.sampled_from(("route", *CHUNK_OPS)))
    seconds = getattr(one_pass.calls[call], op) + data.draw(st.integers(1, 9))
    calls = list(one_pass.calls)
    calls[call] = dataclasses.replace(calls[call], **{op: seconds})
    more = dataclasses.replace(costs, **{direction: dataclasses.replace(one_pass, calls=tuple(calls))})
    assert predicted_s(shape, more, plan) >= predicted_s(shape, costs, plan)
    assert solve(shape, {1: more}).predicted_s >= solve(shape, {1: costs}).predicted_s
    assert limit_s(shape, more) >= limit_s(shape, costs) * (1 - 1e-12)


# ---- hand-worked


def test_two_chunks_hide_what_one_exposes():
    """Two ops of 4 s behind the tap, 4 s of experts, 6 s of communication each way.

    One chunk, 16 s, of which 4 s of communication have no op beside them. Two chunks, 12 s, and all is hidden::

                        0       2   3   4       6       8   9      10      12      14      16
        compute         | op 0          |       | experts           | op 1          |
        communication   | dispatch              |                   | combine               |

        compute         | op 0          |experts|experts| op 1          |
        communication   | dispatch  | dispatch  | combine   | combine   |
    """
    shape = group(tap=0, num_dense_ops=2)
    whole = both(pass_costs(4, 4, dispatch=6, experts=4, combine=6))
    costs = {n: cut_span(whole, n) for n in (1, 2)}
    one = solve(shape, {1: costs[1]}, forward_only=True)
    assert (one.plan, one.predicted_s, one.hidden_share) == (Plan(((2,),)), 16, 1 - 4 / 12)
    two = solve(shape, costs, forward_only=True)
    assert (two.plan, two.predicted_s, two.hidden_share) == (Plan(((2, 2),)), 12, 1)
    assert one.exact and two.exact
    played = schedule(shape, costs[2].forward, two.plan, backward=False)
    assert [(s.name, s.at, s.start_s, s.end_s) for s in played if s.lane is Lane.COMMUNICATION] == [
        ("dispatch", 0, 0, 3), ("dispatch", 1, 3, 6), ("combine", 0, 6, 9), ("combine", 1, 9, 12),
    ]  # fmt: skip


def test_a_late_landing_hides_a_combine_behind_the_next_group():
    """Two groups of one op of 4 s and an end; the first one's call carries 4 s there and 2 s back, the other nothing.

    Landing at its end, its combine has no op beside it; landing behind the next group's op, it has that one::

        compute         | op 0     | experts  |         | op 2        compute       | op 0     | experts  | op 2     |
        communication   | dispatch |          | combine |             communication | dispatch |          | combine |

    The second call's tokens then queue behind that combine, so its experts run behind the op.
    """
    costs = PassCosts(ops=(4, 0, 4, 0), calls=(call_costs(dispatch=4, experts=4, combine=2), call_costs()))
    at_its_end = SpanShape(4, (RoutedCall(0, 1), RoutedCall(2, 3)))
    late = SpanShape(4, (RoutedCall(0, 3, late=True), RoutedCall(2, 3)))
    for shape, plan, seconds, share in (
        (at_its_end, Plan(((2,), (1,))), 14, 1 - 2 / 6),
        (late, Plan(((2,), (2,))), 12, 1),
    ):
        found = solve(shape, {1: both(costs)}, forward_only=True)
        assert (found.plan, found.predicted_s, found.hidden_share) == (plan, seconds, share)


def test_a_launch_behind_the_op_at_the_tap_hides_the_hosts_wait():
    """Two ops of 4 s behind the tap; the host waits 2 s for the counts, and takes 1 s to enqueue an op::

        before          | wait   | op 0         | experts      | op 1         |
                                 | dispatch                    | combine
        behind          | op 0         | experts      | op 1         |
                                 | dispatch           | combine

    Where the host takes as long for the op as the lane, it waits in any case, and launches 4 s later.
    """
    shape = group(tap=0, num_dense_ops=2)
    costs = both(pass_costs(4, 4, dispatch=1, experts=4, combine=3, wait=2, enqueue=1))
    before, behind = Plan(((2,),)), Plan(((2,),), launch=Launch.BEHIND)
    assert predicted_s(shape, costs, before, forward_only=True) == 14
    assert predicted_s(shape, costs, behind, forward_only=True) == 12
    found = solve(shape, {1: costs}, forward_only=True)
    assert (found.plan, found.predicted_s, found.hidden_share, found.exact) == (behind, 12, 1, True)
    busy_host = both(pass_costs(4, 4, dispatch=1, experts=4, combine=3, wait=2, enqueue=4))
    assert predicted_s(shape, busy_host, behind, forward_only=True) == 15
    assert solve(shape, {1: busy_host}, forward_only=True).plan == before


def test_a_launch_within_attention_starts_a_long_dispatch_sooner():
    """Two ops of 4 s, of which the first one's core attention takes 2 s; the host waits 2 s, and takes 1 s for a half::

                    0       2   3   4   5       7   8   9   10          13  14
    before          | wait  | op 0          | op 1          | experts       |
                            | dispatch              |
    within          | op 0  |   | core  | op 1          | experts       |
                                | dispatch              |
    behind          | op 0          | op 1          |       | experts       |
                                    | dispatch              |
    """
    shape = dataclasses.replace(group(tap=0, num_dense_ops=2), attentions=frozenset({0}))
    whole = pass_costs(4, 4, dispatch=6, experts=4, wait=2, enqueue=2, enqueue_core=1)
    costs = SpanCosts(forward=dataclasses.replace(whole, cores={0: 2}), backward=pass_costs(4, 4))
    by_launch = [Plan(((3,),), launch=launch) for launch in Launch]
    assert [predicted_s(shape, costs, plan, forward_only=True) for plan in by_launch] == [14, 13, 14]
    found = solve(shape, {1: costs}, forward_only=True)
    assert (found.plan, found.predicted_s, found.exact) == (by_launch[1], 13, True)
    timeline = schedule(shape, costs.forward, found.plan, backward=False)
    starts_s = {span.name: span.start_s for span in timeline if span.at == 0}
    assert (starts_s["wait"], starts_s["dispatch"], starts_s["core attention"]) == (2, 3, 3)
    late_host = dataclasses.replace(costs.forward, calls=(dataclasses.replace(whole.calls[0], enqueue=4),))
    assert predicted_s(shape, both(late_host), by_launch[1], forward_only=True) == 15  # projections took it 3 s


def test_a_launch_has_a_place_behind_an_op_where_nothing_comes_between():
    def may(*calls: RoutedCall, **changes: bool) -> list[int]:
        return sorted(SpanShape(6, calls, **changes).launched_aside(Launch.BEHIND))

    assert may(RoutedCall(0, 2)) == [0]
    assert may(RoutedCall(0, 2), waits_to_pack=True) == []
    assert may(RoutedCall(2, 2)) == []  # its experts run before the op
    assert may(RoutedCall(0, 2), RoutedCall(2, 2)) == [0]  # dgmoe
    assert may(RoutedCall(0, 2), RoutedCall(3, 5)) == [0, 1]  # two groups
    assert may(RoutedCall(0, 4, late=True), RoutedCall(3, 5)) == [0]  # the first is under way at the second's tap
    assert may(RoutedCall(0, 3, late=True), RoutedCall(3, 5)) == [0, 1]  # it has landed before
    assert may(RoutedCall(0, 3), RoutedCall(3, 5)) == [0]  # it lands in that op
    assert may(RoutedCall(1, 3), RoutedCall(1, 5)) == []
    within = SpanShape(6, (RoutedCall(0, 2), RoutedCall(3, 5)), attentions=frozenset({1, 3}))
    assert sorted(within.launched_aside(Launch.WITHIN)) == [1] and within.cut == {3}  # the first op is no attention
    assert within.has(Plan(((1,), (2,)), launch=Launch.WITHIN)) and within.has(Plan(((2,), (2,)), launch=Launch.BEHIND))
    assert not within.has(Plan(((1,), (1,)), launch=Launch.WITHIN))  # experts of what is not launched yet
    assert not SpanShape(6, within.calls).has(Plan(((2,), (2,)), launch=Launch.WITHIN))


def test_forward_alone_and_recompute_choose_for_themselves():
    """Forward wants the experts late, for its long dispatch; backward early, for its long reverse combine.

    ========================  ============  ==============  ============
    slot                      1             2               3
    ========================  ============  ==============  ============
    forward, 5 s an op        10 + 10 = 20  10 + 5 = 15     10
    backward, 6 s an op       12            12 + 6 = 18     12 + 12 = 24
    both                      32            33              34
    with a second forward     52            48              44
    ========================  ============  ==============  ============
    """
    shape = group(tap=0, num_dense_ops=2)
    once = SpanCosts(forward=pass_costs(5, 5, dispatch=10), backward=pass_costs(6, 6, combine=12))
    twice = dataclasses.replace(once, forward_runs=2)
    by_slot = [Plan(((slot,),)) for slot in (1, 2, 3)]
    assert [predicted_s(shape, once, plan, forward_only=True) for plan in by_slot] == [20, 15, 10]
    assert [predicted_s(shape, once, plan) for plan in by_slot] == [32, 33, 34]
    assert [predicted_s(shape, twice, plan) for plan in by_slot] == [52, 48, 44]
    assert solve(shape, {1: once}, forward_only=True).plan == by_slot[2]
    assert solve(shape, {1: once}).plan == by_slot[0]
    assert solve(shape, {1: twice}).plan == by_slot[2]


def test_stock_layer_is_pipelined():
    """No dense op behind the tap: chunks hide each other's communication behind the experts."""
    shape = group(tap=1, num_dense_ops=1)
    whole = pass_costs(3, dispatch=8, experts=8, combine=8)
    costs = {n: cut_span(both(whole), n) for n in (1, 2, 4)}
    # 4 chunks: dispatches arrive at 2, 4, 6, 8; experts end at 4, 6, 8, 10; but combines queue behind the dispatches:
    # 8..10, 10..12, 12..14, 14..16. The dense op before the tap adds 3.
    assert solve(shape, costs, forward_only=True).predicted_s == 3 + 16
    assert predicted_s(shape, costs[1], Plan(((1,),)), forward_only=True) == 3 + 24
    assert limit_s(shape, costs[1], forward_only=True) == 3 + 16
    slow_experts = pass_costs(3, dispatch=8, experts=20, combine=8)
    assert limit_s(shape, both(slow_experts), forward_only=True) == 3 + 20


# ---- what is refused


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("op", ["route", "combine", "op"])
def test_costs_that_no_clock_shows_are_refused(op, wrong):
    with pytest.raises(ValueError, match=rf"cost of {op}.* is {wrong} s"):
        pass_costs(0.0, wrong) if op == "op" else pass_costs(**{op: wrong})


# ---- what the solver plays is what a span runs


@given(data=st.data())
def test_the_solver_plays_the_order_that_a_span_runs(data):
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    costs = data.draw(some_costs(shape, launches=True))
    for backward, order in ((False, forward_order), (True, backward_order)):
        expected = [
            step._replace(name=step.name.removeprefix("start "))
            for step in order(["op"] * shape.num_ops, shape, plan)
            if "finish " not in step.name  # a wait takes no time of its own; where it stands is tried below
        ]
        played = schedule(shape, costs, plan, backward=backward)
        assert [Step(span.name, span.at, span.call) for span in played] == expected


@given(data=st.data())
def test_the_solver_waits_where_a_span_waits(data):
    """With collectives that never seem to end, an op begins late exactly where a wait stands before it."""
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    ones = dict.fromkeys(("route", *CHUNK_OPS), 1) | {"dispatch": 1000, "combine": 1000}
    costs = PassCosts(ops=(1,) * shape.num_ops, calls=(call_costs(**ones),) * len(shape.calls))
    for backward, order in ((False, forward_order), (True, backward_order)):
        spans = {(s.name, s.at, s.call): s for s in schedule(shape, costs, plan, backward=backward)}
        compute = [span for span in spans.values() if span.lane is Lane.COMPUTE]
        late = {(b.name, b.at, b.call) for a, b in itertools.pairwise(compute) if b.start_s > a.end_s}
        steps = order(["op"] * shape.num_ops, shape, plan)
        waits = [(wait, step) for wait, step in itertools.pairwise(steps) if "finish " in wait.name]
        for wait, step in waits:
            assert (step.call, step.at) == (wait.call, wait.at)  # the op behind a wait is of the same flight
            arrival = spans[wait.name.removeprefix("finish "), wait.at, wait.call]
            assert spans[step.name, step.at, step.call].start_s >= arrival.end_s
        assert len(waits) == 2 * plan.chunks * len(shape.calls)
        assert late <= {(step.name, step.at, step.call) for _, step in waits}
