"""The solver against a slow simulator, against the paper's rule, and against schedules that no engine would run.

Costs are whole numbers of seconds, so that times are compared exactly.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import deque

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.plan import CURRENT, Step, backward_order, forward_order
from megatron_scmoe.overlap.solver import (
    GroupCosts,
    GroupShape,
    PassCosts,
    candidate_plans,
    predicted_hidden_share,
    predicted_s,
    schedule,
    solve,
)
from megatron_scmoe.overlap.spans import Lane

FLIGHT_OPS = ("encode", "dispatch", "experts", "combine", "decode")
OTHER_OPS = ("route", "tail")

untimed = settings(deadline=None)


def pass_costs(dense=(), **seconds) -> PassCosts:
    return PassCosts(dense=tuple(dense), **(dict.fromkeys(FLIGHT_OPS + OTHER_OPS, 0) | seconds))


def cut(costs: PassCosts, chunks: int) -> PassCosts:
    """The flights' work in ``chunks`` equal parts, at no extra cost."""
    return dataclasses.replace(costs, **{op: getattr(costs, op) / chunks for op in FLIGHT_OPS})


def cut_group(costs: GroupCosts, chunks: int) -> GroupCosts:
    return dataclasses.replace(costs, forward=cut(costs.forward, chunks), backward=cut(costs.backward, chunks))


def sum_of_all(shape: GroupShape, costs: PassCosts, chunks: int) -> float:
    flights = 2 if shape.second_gate else 1
    per_chunk = sum(getattr(costs, op) for op in FLIGHT_OPS)
    return sum(costs.dense) + flights * (costs.route + chunks * per_chunk) + costs.tail


# ---- strategies


@st.composite
def shapes(draw, max_behind: int = 3, gates=(False, True)):
    tap = draw(st.integers(0, 2))
    return GroupShape(
        tap=tap, num_dense_ops=tap + draw(st.integers(0, max_behind)), second_gate=draw(st.sampled_from(gates))
    )


def some_costs(shape: GroupShape, smallest: int = 0, largest: int = 9):
    seconds = st.integers(smallest, largest)
    dense = st.lists(seconds, min_size=shape.num_dense_ops, max_size=shape.num_dense_ops)
    return st.builds(pass_costs, dense, **dict.fromkeys(FLIGHT_OPS + OTHER_OPS, seconds))


def group_costs(shape: GroupShape, **limits):
    one_pass = some_costs(shape, **limits)
    return st.builds(GroupCosts, forward=one_pass, backward=one_pass, forward_runs=st.sampled_from([1.0, 2.0]))


def plans(shape: GroupShape, max_chunks: int = 4):
    slots = st.lists(st.integers(1, shape.num_slots), min_size=1, max_size=max_chunks)
    return slots.map(lambda values: Plan(slots=tuple(sorted(values))))


# ---- a slow simulator, written from the description of how a group runs: it knows nothing of the solver's steps


@dataclasses.dataclass(frozen=True)
class Work:
    """One op on the compute lane: it waits for ``needs`` and launches ``launches``."""

    op: str
    key: object = None
    needs: object = None
    launches: object = None


def forward_work(shape: GroupShape, slots) -> list[Work]:
    chunks = range(len(slots))
    behind = shape.num_dense_ops - shape.tap

    def start(flight):
        sends = [Work("encode", (flight, c), launches=("dispatch", flight, c)) for c in chunks]
        return [Work("route", flight), *sends]

    def experts(flight, c):
        return Work("experts", (flight, c), needs=("dispatch", flight, c), launches=("combine", flight, c))

    work = [Work("dense", i) for i in range(shape.tap)] + start(1)
    for k in range(1, behind + 1):
        work += [experts(1, c) for c in chunks if slots[c] == k]
        work.append(Work("dense", shape.tap + k - 1))
    if shape.second_gate:
        work += start(2)
    work += [experts(1, c) for c in chunks if slots[c] == behind + 1]
    if shape.second_gate:
        work += [experts(2, c) for c in chunks]
    for flight in (1, 2) if shape.second_gate else (1,):
        work += [Work("decode", (flight, c), needs=("combine", flight, c)) for c in chunks]
    return [*work, Work("tail")]


def backward_work(shape: GroupShape, slots) -> list[Work]:
    chunks = range(len(slots) - 1, -1, -1)
    behind = shape.num_dense_ops - shape.tap

    def experts(flight, c):
        return Work("experts", (flight, c), needs=("combine", flight, c), launches=("dispatch", flight, c))

    def finish(flight):
        arrivals = [Work("encode", (flight, c), needs=("dispatch", flight, c)) for c in chunks]
        return [*arrivals, Work("route", flight)]

    work = [Work("tail")]
    for flight in (2, 1) if shape.second_gate else (1,):
        work += [Work("decode", (flight, c), launches=("combine", flight, c)) for c in chunks]
    if shape.second_gate:
        work += [experts(2, c) for c in chunks]
    work += [experts(1, c) for c in chunks if slots[c] == behind + 1]
    if shape.second_gate:
        work += finish(2)
    for k in range(behind, 0, -1):
        work.append(Work("dense", shape.tap + k - 1))
        work += [experts(1, c) for c in chunks if slots[c] == k]
    return work + finish(1) + [Work("dense", i) for i in range(shape.tap - 1, -1, -1)]


def clock_ticks(work: list[Work], costs: PassCosts) -> int:
    """Second by second: each lane does one second of what it is at. Costs are whole and not zero."""

    def seconds(op, index=None):
        return costs.dense[index] if op == "dense" else getattr(costs, op)

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
        if sent and on_the_wire == seconds(sent[0][0]):
            arrived.add(sent.popleft())
            on_the_wire = 0
        if working and at_work == seconds(current.op, current.key):
            todo.popleft()
            at_work = 0
            if current.launches:
                sent.append(current.launches)
    assert not sent
    return now


def slow_time(shape: GroupShape, costs: GroupCosts, slots, forward_only: bool) -> float:
    forward = clock_ticks(forward_work(shape, slots), costs.forward)
    if forward_only:
        return forward
    return costs.forward_runs * forward + clock_ticks(backward_work(shape, slots), costs.backward)


@untimed
@given(st.data())
def test_prediction_equals_the_slow_simulator(data):
    shape = data.draw(shapes())
    costs = data.draw(group_costs(shape, smallest=1))
    plan = data.draw(plans(shape))
    for forward_only in (True, False):
        slow = slow_time(shape, costs, plan.slots, forward_only)
        assert predicted_s(shape, costs, plan, forward_only=forward_only) == slow


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_solution_equals_exhaustive_search(data):
    """Over every placement of every chunk, those in which a later chunk runs before an earlier one included."""
    shape = data.draw(shapes(max_behind=2))
    costs = {chunks: data.draw(group_costs(shape, smallest=1, largest=7)) for chunks in (1, 2, 3)}
    forward_only = data.draw(st.booleans())
    best = min(
        slow_time(shape, costs[chunks], slots, forward_only)
        for chunks in costs
        for slots in itertools.product(range(1, shape.num_slots + 1), repeat=chunks)
    )
    solution = solve(shape, costs, forward_only=forward_only)
    assert solution.predicted_s == best
    chosen = costs[solution.plan.chunks]
    assert slow_time(shape, chosen, solution.plan.slots, forward_only) == best


def test_candidates_are_every_order_of_slots_once():
    shape = GroupShape(tap=1, num_dense_ops=3)
    found = [plan.slots for plan in candidate_plans(shape, (1, 2))]
    assert found == [(1,), (2,), (3,), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)]


# ---- timelines


def dependencies(shape: GroupShape, chunks: int, slots=None) -> set[tuple]:
    """Pairs of (name, chunk) in forward, of which the second needs the first; with the order that ``slots`` demand."""
    dense = [(f"dense {i}", None) for i in range(shape.num_dense_ops)]
    tail = ("tail", None)
    pairs = set(itertools.pairwise([*dense, tail]))
    for prefix, source in (("", dense[: shape.tap]), (CURRENT, dense))[: 2 if shape.second_gate else 1]:
        route = (prefix + "route", None)
        pairs |= {(op, route) for op in source[-1:]}
        for chunk in range(chunks):
            pairs |= set(itertools.pairwise([route, *((prefix + op, chunk) for op in FLIGHT_OPS), tail]))
    for chunk, slot in enumerate(slots or ()):
        place = shape.tap + slot - 1
        pairs |= {(op, ("experts", chunk)) for op in dense[max(place - 1, 0) : place]}
        pairs |= {(("experts", chunk), op) for op in dense[place : place + 1]}
    return pairs


def faults(spans, pairs, backward: bool) -> list[str]:
    """What is wrong with a timeline: ops missing or twice, a lane doing two things at once, a need not met."""
    times = {(span.name, span.chunk): span for span in spans}
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
    costs = data.draw(some_costs(shape))
    plan = dataclasses.replace(data.draw(plans(shape)), blocking=data.draw(st.booleans()))
    for backward in (False, True):
        spans = schedule(shape, costs, plan, backward=backward)
        assert faults(spans, dependencies(shape, plan.chunks, plan.slots), backward) == []
        assert all(span.backward is backward for span in spans)
        for span in spans:
            assert (span.lane is Lane.COMMUNICATION) == span.name.endswith(("dispatch", "combine"))
            assert span.end_s - span.start_s == costs.by_name()[span.name.removeprefix(CURRENT)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("second_gate", [False, True])
def test_broken_timeline_is_found(backward, second_gate):
    """Negative control: with any one span begun a second earlier, or left out, the timeline has a fault."""
    shape = GroupShape(tap=1, num_dense_ops=3, second_gate=second_gate)
    ones = dict.fromkeys(FLIGHT_OPS + OTHER_OPS, 2)
    plan = Plan(slots=(1, 3))
    pairs = dependencies(shape, 2, plan.slots)
    spans = schedule(shape, pass_costs((2, 2, 2), **ones), plan, backward=backward)
    assert faults(spans, pairs, backward) == []
    for index, span in enumerate(spans):
        if span.start_s > 0:
            early = dataclasses.replace(span, start_s=span.start_s - 1, end_s=span.end_s - 1)
            assert faults([*spans[:index], early, *spans[index + 1 :]], pairs, backward), span
        assert faults([*spans[:index], *spans[index + 1 :]], pairs, backward), span


def test_simulator_notices_a_missing_wait():
    """Negative control of the slow simulator: experts that do not wait for their tokens give another time."""
    shape = GroupShape(tap=0, num_dense_ops=1)
    costs = pass_costs((1,), **dict.fromkeys(FLIGHT_OPS + OTHER_OPS, 3))
    work = forward_work(shape, (1,))
    broken = [dataclasses.replace(w, needs=None) if w.op == "experts" else w for w in work]
    right = GroupCosts(forward=costs, backward=costs)
    assert clock_ticks(work, costs) == predicted_s(shape, right, Plan(slots=(1,)), forward_only=True)
    assert clock_ticks(broken, costs) < clock_ticks(work, costs)


@untimed
@given(st.data())
def test_blocking_plan_takes_the_sum_of_everything(data):
    shape = data.draw(shapes())
    costs = data.draw(group_costs(shape))
    plan = dataclasses.replace(data.draw(plans(shape)), blocking=True)
    forward, backward = (sum_of_all(shape, c, plan.chunks) for c in (costs.forward, costs.backward))
    assert predicted_s(shape, costs, plan, forward_only=True) == forward
    assert predicted_s(shape, costs, plan) == costs.forward_runs * forward + backward
    if any(c.dispatch + c.combine for c in (costs.forward, costs.backward)):
        assert predicted_hidden_share(shape, costs, plan) == 0


@untimed
@given(st.data())
def test_hidden_share_lies_between_nothing_and_all(data):
    shape = data.draw(shapes())
    costs = data.draw(group_costs(shape))
    assume(costs.forward.dispatch + costs.forward.combine > 0)
    share = predicted_hidden_share(shape, costs, data.draw(plans(shape)), forward_only=data.draw(st.booleans()))
    assert 0 <= share <= 1


@untimed
@given(st.data())
def test_more_work_never_takes_less_time(data):
    shape = data.draw(shapes())
    costs = data.draw(group_costs(shape))
    plan = data.draw(plans(shape))
    op = data.draw(st.sampled_from(FLIGHT_OPS + OTHER_OPS))
    direction = data.draw(st.sampled_from(["forward", "backward"]))
    one_pass = getattr(costs, direction)
    slower = dataclasses.replace(one_pass, **{op: getattr(one_pass, op) + data.draw(st.integers(1, 9))})
    more = dataclasses.replace(costs, **{direction: slower})
    assert predicted_s(shape, more, plan) >= predicted_s(shape, costs, plan)
    assert solve(shape, {1: more}).predicted_s >= solve(shape, {1: costs}).predicted_s
    assert limit_s(shape, more) >= limit_s(shape, costs)


# ---- hand-worked


def test_two_chunks_hide_what_one_exposes():
    """Two ops of 4 s behind the tap, 4 s of experts, 6 s of communication each way.

    One chunk, 16 s, of which 4 s of communication have no op beside them. Two chunks, 12 s, and all is hidden::

                        0       2   3   4       6       8   9      10      12      14      16
        compute         | dense 0       |       | experts           | dense 1       |
        communication   | dispatch              |                   | combine               |

        compute         | dense 0       |experts|experts| dense 1       |
        communication   | dispatch  | dispatch  | combine   | combine   |
    """
    shape = GroupShape(tap=0, num_dense_ops=2)
    whole = pass_costs((4, 4), dispatch=6, experts=4, combine=6)
    costs = {n: GroupCosts(forward=cut(whole, n), backward=cut(whole, n)) for n in (1, 2)}
    one = solve(shape, {1: costs[1]}, forward_only=True)
    assert (one.plan, one.predicted_s, one.hidden_share) == (Plan(slots=(2,)), 16, 1 - 4 / 12)
    two = solve(shape, costs, forward_only=True)
    assert (two.plan, two.predicted_s, two.hidden_share) == (Plan(slots=(2, 2)), 12, 1)
    assert [(s.name, s.chunk, s.start_s, s.end_s) for s in schedule(shape, costs[2].forward, two.plan, backward=False)
            if s.lane is Lane.COMMUNICATION] == [
        ("dispatch", 0, 0, 3), ("dispatch", 1, 3, 6), ("combine", 0, 6, 9), ("combine", 1, 9, 12),
    ]  # fmt: skip


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
    shape = GroupShape(tap=0, num_dense_ops=2)
    forward, backward = pass_costs((5, 5), dispatch=10), pass_costs((6, 6), combine=12)
    once = GroupCosts(forward=forward, backward=backward)
    twice = dataclasses.replace(once, forward_runs=2)
    by_slot = [Plan(slots=(slot,)) for slot in (1, 2, 3)]
    assert [predicted_s(shape, once, plan, forward_only=True) for plan in by_slot] == [20, 15, 10]
    assert [predicted_s(shape, once, plan) for plan in by_slot] == [32, 33, 34]
    assert [predicted_s(shape, twice, plan) for plan in by_slot] == [52, 48, 44]
    assert solve(shape, {1: once}, forward_only=True).plan == by_slot[2]
    assert solve(shape, {1: once}).plan == by_slot[0]
    assert solve(shape, {1: twice}).plan == by_slot[2]


def test_stock_layer_is_pipelined():
    """No dense op behind the tap: chunks hide each other's communication behind the experts."""
    shape = GroupShape(tap=1, num_dense_ops=1)
    whole = pass_costs((3,), dispatch=8, experts=8, combine=8)
    costs = {n: GroupCosts(forward=cut(whole, n), backward=cut(whole, n)) for n in (1, 2, 4)}
    # 4 chunks: dispatches arrive at 2, 4, 6, 8; experts end at 4, 6, 8, 10; but combines queue behind the dispatches:
    # 8..10, 10..12, 12..14, 14..16. The dense op before the tap adds 3.
    assert solve(shape, costs, forward_only=True).predicted_s == 3 + 16
    assert predicted_s(shape, costs[1], Plan(slots=(1,)), forward_only=True) == 3 + 24
    assert limit_s(shape, costs[1], forward_only=True) == 3 + 16
    slow_experts = dataclasses.replace(whole, experts=20)
    assert limit_s(shape, GroupCosts(forward=slow_experts, backward=slow_experts), forward_only=True) == 3 + 20


# ---- the paper's rule


@untimed
@given(st.data())
def test_paper_rule_chooses_as_the_solver_does(data):
    """ScMoE, arXiv 2404.05019, section 3.3: min over K of |before K - T_disp| + |behind K - T_comb|."""
    shape = data.draw(shapes(max_behind=4, gates=(False,)))
    costs = data.draw(some_costs(shape))
    behind_tap = costs.dense[shape.tap :]
    objective = {
        slot: abs(sum(behind_tap[: slot - 1]) - costs.dispatch) + abs(sum(behind_tap[slot - 1 :]) - costs.combine)
        for slot in range(1, shape.num_slots + 1)
    }
    papers_choice = min(objective, key=objective.__getitem__)
    group = GroupCosts(forward=costs, backward=costs)
    assert solve(shape, {1: group}, forward_only=True).plan == Plan(slots=(papers_choice,))


# ---- ties


def test_nothing_to_hide_gives_the_first_plan():
    shape = GroupShape(tap=1, num_dense_ops=4)
    whole = pass_costs((1, 2, 3, 4), encode=4, experts=4, decode=4)
    costs = {n: GroupCosts(forward=cut(whole, n), backward=cut(whole, n)) for n in (4, 2, 1)}
    assert solve(shape, costs).plan == Plan(slots=(1,))
    assert solve(shape, costs).hidden_share == 1


@untimed
@given(st.data())
def test_rounding_does_not_decide(data):
    """Costs that differ in their last digits, as sums in another order do, choose the same plan."""
    shape = data.draw(shapes())
    whole = data.draw(group_costs(shape))
    noise = random.Random(data.draw(st.integers(0, 2**32)))

    def shaken(costs: PassCosts) -> PassCosts:
        values = {op: getattr(costs, op) * (1 + noise.uniform(-1e-13, 1e-13)) for op in FLIGHT_OPS + OTHER_OPS}
        return PassCosts(dense=tuple(s * (1 + noise.uniform(-1e-13, 1e-13)) for s in costs.dense), **values)

    exact = {chunks: cut_group(whole, chunks) for chunks in (1, 2, 4)}
    near = {
        chunks: dataclasses.replace(exact[chunks], forward=shaken(costs.forward), backward=shaken(costs.backward))
        for chunks, costs in reversed(exact.items())
    }
    assert solve(shape, near).plan == solve(shape, exact).plan


# ---- the limit


@untimed
@given(st.data())
def test_no_plan_beats_the_limit(data):
    shape = data.draw(shapes(max_behind=4))
    whole = data.draw(group_costs(shape))
    plan = data.draw(plans(shape, max_chunks=12))
    for forward_only in (True, False):
        seconds = predicted_s(shape, cut_group(whole, plan.chunks), plan, forward_only=forward_only)
        assert seconds >= limit_s(shape, whole, forward_only=forward_only) * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_not_even_the_best_plan_beats_the_limit(data):
    shape = data.draw(shapes(max_behind=2))
    whole = data.draw(some_costs(shape, largest=20))
    group = GroupCosts(forward=whole, backward=whole)
    chunks = data.draw(st.integers(8, 12))
    best_s = solve(shape, {chunks: cut_group(group, chunks)}, forward_only=True).predicted_s
    assert best_s >= limit_s(shape, group, forward_only=True) * (1 - 1e-12)


@untimed
@given(st.data(), st.integers(1, 12), st.randoms(use_true_random=False))
def test_no_order_of_the_ops_beats_the_limit(data, chunks, order):
    """Ops in any order that their needs allow, collectives too: schedules that no plan can ask for."""
    shape = data.draw(shapes(max_behind=4))
    whole = data.draw(some_costs(shape))
    seconds = cut(whole, chunks).by_name()
    pairs = dependencies(shape, chunks)
    needs = {op: {first for first, second in pairs if second == op} for op in {op for pair in pairs for op in pair}}
    ends, free, todo = {}, dict.fromkeys(Lane, 0.0), sorted(needs, key=str)
    while todo:
        op = order.choice([op for op in todo if needs[op] <= ends.keys()])
        lane = Lane.COMMUNICATION if op[0].endswith(("dispatch", "combine")) else Lane.COMPUTE
        start = max([free[lane], *(ends[need] for need in needs[op])])
        ends[op] = free[lane] = start + seconds[op[0].removeprefix(CURRENT)]
        todo.remove(op)
    limit = limit_s(shape, GroupCosts(forward=whole, backward=whole), forward_only=True)
    assert max(ends.values()) >= limit * (1 - 1e-12)


def eager_plan(shape: GroupShape, costs: PassCosts, chunks: int) -> Plan:
    """Each chunk's experts before the first dense op at which its tokens are there."""
    op_s = sum(costs.dense) / shape.num_dense_ops
    arrivals = (costs.encode + (chunk + 1) * costs.dispatch / chunks for chunk in range(chunks))
    return Plan(slots=tuple(min(1 + math.ceil(arrival / op_s), shape.num_slots) for arrival in arrivals))


@pytest.mark.parametrize("second_gate", [False, True])
@pytest.mark.parametrize(
    ("communication", "compute"), [(1, 10), (10, 1), (5, 5)], ids=["compute rules", "communication rules", "balanced"]
)
def test_many_small_pieces_come_near_the_limit(communication, compute, second_gate):
    ops = 60
    shape = GroupShape(tap=0, num_dense_ops=ops, second_gate=second_gate)
    costs = pass_costs(
        [compute / ops] * ops, route=0.1, encode=0.1, experts=0.5, decode=0.1, tail=0.1,
        dispatch=communication, combine=communication,
    )  # fmt: skip
    whole = GroupCosts(forward=costs, backward=costs)
    limit = limit_s(shape, whole, forward_only=True)
    near = predicted_s(shape, cut_group(whole, 60), eager_plan(shape, costs, 60), forward_only=True)
    assert limit * (1 - 1e-12) <= near <= 1.04 * limit


def test_one_long_op_does_not_hide_both_ways():
    """10 s behind the tap, 6 s each way: 12 s of communication fit beside 10 s only if the op could be cut."""
    shape = GroupShape(tap=1, num_dense_ops=2)
    costs = pass_costs((3, 10), dispatch=6, combine=6)
    group = GroupCosts(forward=costs, backward=costs)
    assert limit_s(shape, group, forward_only=True) == 3 + 10 + 6
    assert limit_s(shape, group) == 2 * (3 + 10 + 6)
    assert predicted_s(shape, group, Plan(slots=(1,)), forward_only=True) == 3 + 6 + 10
    halves = dataclasses.replace(costs, dense=(3, 5, 5))
    cuttable = GroupShape(tap=1, num_dense_ops=3)
    assert limit_s(cuttable, GroupCosts(forward=halves, backward=halves), forward_only=True) == 3 + 12
    # Encoding in fine pieces keeps up with the dispatch: 2 s of it change nothing where 5 + 10 s fly and 10 s compute.
    encoding = pass_costs((3, 10), encode=2, dispatch=5, combine=10)
    assert limit_s(shape, GroupCosts(forward=encoding, backward=encoding), forward_only=True) == 3 + 5 + 10


@untimed
@given(st.data())
def test_limit_is_reached_where_there_is_one_op_and_nothing_but_communication(data):
    shape = data.draw(shapes(max_behind=0, gates=(False,)))
    shape = dataclasses.replace(shape, num_dense_ops=shape.tap + 1)
    costs = dataclasses.replace(data.draw(some_costs(shape)), encode=0, experts=0, decode=0)
    group = GroupCosts(forward=costs, backward=costs)
    assert solve(shape, {1: group}).predicted_s == limit_s(shape, group)


def test_limit_is_reached_with_two_flights():
    """dgmoe, three limits that some plan reaches: 2 s to carry tokens there and 4 s back, in both flights."""

    def limit_and_best(*dense):
        shape = GroupShape(tap=0, num_dense_ops=len(dense), second_gate=True)
        costs = pass_costs(dense, dispatch=2, combine=4)
        groups = {n: GroupCosts(forward=cut(costs, n), backward=cut(costs, n)) for n in (1, 2)}
        return limit_s(shape, groups[1], forward_only=True), solve(shape, groups, forward_only=True).predicted_s

    assert limit_and_best(4, 4) == (8 + 6, 8 + 6)  # the second flight starts behind all ops
    assert limit_and_best(1, 1) == (6 + 6, 6 + 6)  # the wire is never idle
    # Beside the second op, 2 s, half a combine fits. So the other half must fly beside the first, and for that half a
    # dispatch, 1 s, must be there before it; or the wire has more to carry behind the ops than the second flight.
    assert limit_and_best(10, 2) == (1 + 10 + 2 + 6, 1 + 10 + 2 + 6)


# ---- what is refused


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("op", ["route", "combine", "dense"])
def test_costs_that_no_clock_shows_are_refused(op, wrong):
    with pytest.raises(ValueError, match=rf"cost of {op}.* is {wrong} s"):
        pass_costs(**{op: (0.0, wrong) if op == "dense" else wrong})


# ---- what the solver plays is what a group runs


def as_steps(played, shape: GroupShape, launch: str) -> list[Step]:
    """The solver's steps of a pass, in the words of plan.py: experts, dense ops, and a start for each collective."""
    steps = []
    for span in played:
        name = span.name.removeprefix(CURRENT)
        if name in ("dispatch", "combine"):
            name = f"{launch} {name}"
        elif name.startswith("dense "):
            steps.append(Step("dense", int(name.removeprefix("dense "))))
            continue
        elif name != "experts":
            continue
        steps.append(Step(CURRENT + name if span.name.startswith(CURRENT) else name, span.chunk))
    return steps


@given(data=st.data())
def test_the_solver_plays_the_order_that_a_group_runs(data):
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    played = schedule(shape, data.draw(some_costs(shape)), plan, backward=False)
    played_backward = schedule(shape, data.draw(some_costs(shape)), plan, backward=True)
    dense = ["dense"] * shape.num_dense_ops
    for order, spans in ((forward_order, played), (backward_order, played_backward)):
        expected = order(dense, shape.tap, plan, second_gate=shape.second_gate)
        # A wait takes no time of its own in a schedule; where it stands is tried below.
        launched = [step for step in expected if "finish " not in step.name]
        assert as_steps(spans, shape, "start") == launched


@given(data=st.data())
def test_the_solver_waits_where_a_group_waits(data):
    """With collectives that never seem to end, an op begins late exactly where a wait stands before it."""
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    costs = pass_costs([1] * shape.num_dense_ops, dispatch=1000, combine=1000, experts=1, encode=1, decode=1, route=1)
    for backward, order in ((False, forward_order), (True, backward_order)):
        spans = schedule(shape, costs, plan, backward=backward)
        compute = [span for span in spans if span.lane is Lane.COMPUTE and not span.name.startswith("dense")]
        arrival = {(span.name, span.chunk): span.end_s for span in spans if span.lane is Lane.COMMUNICATION}
        expected = order(["dense"] * shape.num_dense_ops, shape.tap, plan, second_gate=shape.second_gate)
        waits = [step for step in expected if "finish " in step.name]
        # The op that follows each wait, of the same flight and chunk: experts or decode, in backward experts or encode.
        follows = {"dispatch": ("experts", "encode"), "combine": ("decode", "experts")}
        for wait in waits:
            prefix = CURRENT if wait.name.startswith(CURRENT) else ""
            collective = wait.name.removeprefix(CURRENT).removeprefix("finish ")
            (op,) = [
                span for span in compute if (span.name, span.chunk) == (prefix + follows[collective][backward], wait.at)
            ]
            assert op.start_s >= arrival[prefix + collective, wait.at]
        kinds = [(step.name.removeprefix(CURRENT).removeprefix("finish "), step.at) for step in waits]
        assert len(kinds) == 2 * plan.chunks * (2 if shape.second_gate else 1)
