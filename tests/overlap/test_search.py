"""The search for a plan against all plans, ties, the paper's rule, and how long it takes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from span_cases import CHUNK_OPS, both, call_costs, cut_span, group, pass_costs, shapes, some_costs, span_costs

from megatron_scmoe.config.architecture import ArchitectureConfig, Position, Shortcut
from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.solver import TIE, CallCosts, PassCosts, SpanCosts, predicted_s, solve

untimed = settings(deadline=None)

SCMOE, DGMOE = Shortcut.SCMOE, Shortcut.DGMOE


def span(shortcut: Shortcut, position: str, **settings: int) -> SpanShape:
    """The first span of a model."""
    config = ArchitectureConfig(shortcut=shortcut, shortcut_position=(Position(position),), **settings)
    shape = config.span_shape(0, [2 * config.moe_every - 1] * config.shortcut_span)
    num_ops = shape.num_ops // config.shortcut_span
    in_group = range(0, 2 * config.moe_every, 2)
    attentions = frozenset(at for at in range(shape.num_ops) if at % num_ops in in_group)
    return dataclasses.replace(shape, attentions=attentions)


# ---- against all plans


def all_plans(shape: SpanShape, chunk_counts) -> list[Plan]:
    """The fewest chunks first, then the earliest launches, then the earliest slots, compared call by call."""
    plans = (
        Plan(slots, launch=launch)
        for chunks in sorted(chunk_counts)
        for launch in Launch
        for slots in itertools.product(
            *[itertools.combinations_with_replacement(range(1, c.num_slots + 1), chunks) for c in shape.calls]
        )
    )
    return [plan for plan in plans if shape.has(plan)]


def first_of_the_fastest(shape: SpanShape, costs: dict[int, SpanCosts], *, forward_only: bool) -> Plan:
    predicted = {
        plan: predicted_s(shape, costs[plan.chunks], plan, forward_only=forward_only)
        for plan in all_plans(shape, costs)
    }
    fastest_s = min(predicted.values())
    return next(plan for plan, seconds in predicted.items() if seconds <= fastest_s * (1 + TIE))


def num_plans(shape: SpanShape, chunk_counts) -> int:
    return sum(math.prod(math.comb(c.num_slots + n - 1, n) for c in shape.calls) for n in chunk_counts)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_solution_is_the_first_of_the_fastest_plans(data):
    shape = data.draw(shapes())
    chunk_counts = data.draw(st.sampled_from([(1,), (3,), (4,), (1, 2), (1, 2, 3)]))
    assume(num_plans(shape, chunk_counts) < 400)
    largest = data.draw(st.sampled_from([1, 3, 9]))  # small costs make many plans equal
    costs = {chunks: data.draw(span_costs(shape, largest=largest)) for chunks in chunk_counts}
    forward_only = data.draw(st.booleans())
    solution = solve(shape, costs, forward_only=forward_only)
    assert solution.plan == first_of_the_fastest(shape, costs, forward_only=forward_only)
    assert solution.exact


def test_a_state_is_superfluous_only_where_all_its_times_are_later():
    """A span in which the most promising states do not lead to the fastest plan, 139 s."""
    shape = SpanShape(5, (RoutedCall(1, 2), RoutedCall(2, 4, late=True), RoutedCall(4, 4)))
    calls = (
        CallCosts(route=9, encode=6, dispatch=2, experts=5, combine=4, decode=1),
        CallCosts(route=0, encode=5, dispatch=7, experts=8, combine=1, decode=7),
        CallCosts(route=8, encode=6, dispatch=0, experts=7, combine=6, decode=4),
    )
    costs = {2: both(PassCosts(ops=(4, 2, 5, 3, 8), calls=calls))}
    solution = solve(shape, costs, forward_only=True)
    assert (solution.plan, solution.predicted_s) == (Plan(((1, 1), (2, 2), (1, 1))), 139)


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        span(SCMOE, "pos3"),
        span(SCMOE, "pos1", shortcut_span=2, shortcut_landing=3),
        span(SCMOE, "farskip", moe_every=1, shortcut_span=3, shortcut_landing=1),
        span(DGMOE, "pos2"),
        span(DGMOE, "pos1", shortcut_span=2, shortcut_landing=2),
    ],
    ids=["pos3", "pos1, two groups", "farskip, three groups", "dgmoe", "dgmoe, two groups"],
)
def test_spans_of_real_models_are_solved_like_all_plans(shape, forward_only):
    """With costs that are no whole numbers, of which each call has its own."""
    draw = random.Random(num_plans(shape, (1, 2)))
    for communication in (0.5, 1, 3):
        costs = {chunks: random_costs(shape, chunks, draw, communication) for chunks in (1, 2)}
        solution = solve(shape, costs, forward_only=forward_only)
        assert solution.plan == first_of_the_fastest(shape, costs, forward_only=forward_only)


def random_costs(shape: SpanShape, chunks: int, draw: random.Random, communication: float) -> SpanCosts:
    """Ops of about a second, calls of about one second of experts and ``communication`` there and back."""

    def about(seconds: float) -> float:
        return seconds * draw.uniform(0.5, 1.5)

    def one_pass(factor: float) -> PassCosts:
        calls = []
        for _ in shape.calls:
            there, back = about(communication) / chunks, about(communication) / chunks
            its = {op: about(factor * seconds) / chunks for op, seconds in
                   (("encode", 0.1), ("experts", 1), ("decode", 0.1))}  # fmt: skip
            calls.append(CallCosts(route=about(0.05), dispatch=there, combine=back, **its))
        if factor == 1:  # forward
            calls = [dataclasses.replace(call, wait=about(0.2), enqueue=about(0.3), enqueue_core=0.1) for call in calls]
        ops = tuple(about(factor) for _ in range(shape.num_ops))
        cores = {at: ops[at] / 3 for at in shape.cut if factor == 1}
        return PassCosts(ops=ops, calls=tuple(calls), cores=cores)

    return SpanCosts(forward=one_pass(1), backward=one_pass(2))


# ---- ties


def test_nothing_to_hide_gives_the_first_plan():
    shape = group(tap=1, num_dense_ops=4)
    whole = both(pass_costs(1, 2, 3, 4, encode=4, experts=4, decode=4))
    solution = solve(shape, {n: cut_span(whole, n) for n in (4, 2, 1)})
    assert solution.plan == Plan(((1,),))
    assert solution.hidden_share == 1


@untimed
@given(st.data())
def test_rounding_does_not_decide(data):
    """Costs that differ in their last digits, as sums in another order do, choose the same plan."""
    shape = data.draw(shapes(max_ops=4))
    whole = data.draw(span_costs(shape))
    noise = random.Random(data.draw(st.integers(0, 2**32)))

    def shaken(seconds: float) -> float:
        return seconds * (1 + noise.uniform(-1e-13, 1e-13))

    def all_shaken(costs: PassCosts) -> PassCosts:
        calls = tuple(CallCosts(**{op: shaken(s) for op, s in dataclasses.asdict(c).items()}) for c in costs.calls)
        cores = {at: shaken(seconds) for at, seconds in costs.cores.items()}
        return PassCosts(ops=tuple(map(shaken, costs.ops)), calls=calls, cores=cores)

    exact = {chunks: cut_span(whole, chunks) for chunks in (1, 2, 4)}
    near = {
        chunks: dataclasses.replace(costs, forward=all_shaken(costs.forward), backward=all_shaken(costs.backward))
        for chunks, costs in reversed(exact.items())
    }
    assert solve(shape, near).plan == solve(shape, exact).plan


# ---- the paper's rule


@untimed
@given(st.data())
def test_paper_rule_chooses_as_the_solver_does(data):
    """ScMoE, arXiv 2404.05019, section 3.3: min over K of |before K - T_disp| + |behind K - T_comb|."""
    tap = data.draw(st.integers(0, 2))
    shape = group(tap, tap + data.draw(st.integers(0, 4)))
    costs = data.draw(some_costs(shape))
    (call,) = costs.calls
    behind_tap = costs.ops[tap:-1]
    objective = {
        slot: abs(sum(behind_tap[: slot - 1]) - call.dispatch) + abs(sum(behind_tap[slot - 1 :]) - call.combine)
        for slot in range(1, shape.calls[0].num_slots + 1)
    }
    papers_choice = min(objective, key=objective.__getitem__)
    assert solve(shape, {1: both(costs)}, forward_only=True).plan == Plan(((papers_choice,),))


# ---- what cannot be searched to the end


LARGE = {
    "pos3": span(SCMOE, "pos3"),
    "four groups": span(SCMOE, "pos2", shortcut_span=4, shortcut_landing=1),
    "four groups of four blocks": span(SCMOE, "pos3", moe_every=4, shortcut_span=4, shortcut_landing=7),
    "dgmoe, four groups": span(DGMOE, "pos3", shortcut_span=4, shortcut_landing=3),
    "dgmoe, four groups of four blocks": span(DGMOE, "pos3", moe_every=4, shortcut_span=4, shortcut_landing=7),
}
CHUNK_COUNTS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_a_second_is_enough(shape):
    """Chunks cost nothing extra here, so that no number of them can be ruled out; three seconds of a busy machine."""
    for communication in (1, 3):
        whole = random_costs(shape, 1, random.Random(0), communication)
        started = time.process_time()
        solution = solve(shape, {chunks: cut_span(whole, chunks) for chunks in CHUNK_COUNTS})
        assert time.process_time() - started < 3
        launched_s = limit_s(shape, whole) + sum(call.wait for call in whole.forward.calls)
        assert limit_s(shape, whole) * (1 - 1e-12) <= solution.predicted_s <= launched_s * 1.04


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_few_chunks_are_searched_to_the_end(shape):
    for communication in (1, 3):
        draw = random.Random(1)
        costs = {chunks: random_costs(shape, chunks, draw, communication) for chunks in (1, 2)}
        assert solve(shape, costs).exact


def test_a_search_that_was_cut_short_says_so():
    """With less than is needed it still finds a plan; it is never called exact where another is faster."""
    shape = span(SCMOE, "pos3", shortcut_span=2, shortcut_landing=3)
    draw = random.Random(2)
    seen = set()
    for communication in (1, 2, 3) * 3:
        costs = {4: random_costs(shape, 4, draw, communication)}
        best_s = solve(shape, costs).predicted_s
        hasty = solve(shape, costs, max_steps=40)
        faster = hasty.predicted_s > best_s * (1 + TIE)
        assert not (hasty.exact and faster)
        seen.add(hasty.exact)
    assert False in seen


def test_more_chunks_are_not_looked_at_where_they_cannot_be_faster():
    """What no schedule beats with four chunks is slower than what one chunk takes."""
    shape = span(SCMOE, "pos3", shortcut_span=4, shortcut_landing=3)
    ones = dict.fromkeys(("route", *CHUNK_OPS), 1)
    costs = both(PassCosts(ops=(1,) * shape.num_ops, calls=(call_costs(**ones),) * 4))
    solution = solve(shape, dict.fromkeys(CHUNK_COUNTS, costs))  # the same for each chunk of many
    assert solution.plan.chunks == 1
    assert solution.exact
