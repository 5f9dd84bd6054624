"""The plans that a stage tries: which of them are worth a turn, and in which order a tie is decided. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.kept import Plans
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.solver import (
    MAX_STEPS,
    Solution,
    SpanCosts,
    predicted_hidden_share,
    predicted_s,
    solve,
)

HOPELESS = 1.25
"""Plans that are predicted to take this many times the best one's time, in training and in forward, are not tried."""

type Costs = Mapping[int, Mapping[int, SpanCosts]]
"""By the number of chunks, and by the first group of each span."""

type StagePlan = dict[int, Plan]
"""One plan for each span of a stage, by its first group."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan for every span of a stage.

    Attributes:
        plans: by the first group of a span.
        predicted_s: time of one micro-batch through all of them, forward and backward, by the solver.
        hidden_share: smallest of the spans', by the solver.
    """

    plans: Mapping[int, Plan]
    predicted_s: float
    hidden_share: float


@dataclass(frozen=True, slots=True)
class Solved:
    """What the solver found for a stage.

    Attributes:
        best: the plans of the smallest predicted times.
        predicted_s: of its training plans, as in ``Candidate``.
        hidden_share: of these, too.
        exact: whether it is proven that none are faster.
        candidates: what is to be tried, the simplest first.
    """

    best: Mapping[int, Plans]
    predicted_s: float
    hidden_share: float
    exact: bool
    candidates: tuple[Candidate, ...]


def candidates_of(
    shapes: Mapping[int, SpanShape], costs: Costs, running: Mapping[int, Plans], fixed: Mapping[int, Plan]
) -> Solved:
    """Solve for every number of chunks, and choose what is to be tried beside the plans that run.

    Args:
        shapes: of the stage's spans.
        costs: of each at each number of chunks that may be chosen.
        running: the plans that they have.
        fixed: those that they have with --overlap fixed, in one chunk.
    """
    kinds = (False, True)  # forward alone or not
    found = {only: _solved(shapes, costs, only, MAX_STEPS) for only in kinds}
    best = {only: {index: one.plan for index, one in its.items()} for only, its in found.items()}
    of_one_count = [{chunks: costs[chunks]} for chunks in costs if len(costs) > 1]
    few = MAX_STEPS // len(costs)  # all of them search no longer than what they are alternatives to
    alternatives = [_solved(shapes, one_count, only, few) for only in kinds for one_count in of_one_count]
    stage_plans: list[StagePlan] = [
        {index: plans.training for index, plans in running.items()},
        {index: plans.forward for index, plans in running.items()},
        dict(fixed),
        *best.values(),
        *({index: one.plan for index, one in its.items()} for its in alternatives),
        {index: sequential_plan(shape) for index, shape in shapes.items()},
    ]
    seconds = [{only: _predicted_s(shapes, costs, plans, only) for only in kinds} for plans in stage_plans]
    least = {only: min(of_kind[only] for of_kind in seconds) for only in kinds}
    tried: list[Candidate] = []
    for number, (plans, of_kind) in enumerate(zip(stage_plans, seconds, strict=True)):
        runs = number < len(kinds)
        hopeful = any(of_kind[only] <= HOPELESS * least[only] for only in kinds)
        if (runs or hopeful) and all(plans != one.plans for one in tried):
            shares = (predicted_hidden_share(shapes[i], costs[plan.chunks][i], plan) for i, plan in plans.items())
            tried.append(Candidate(plans, of_kind[False], min(shares)))
    tried.sort(key=_complexity)  # stable: of equals what runs comes first, and what hides nothing last
    return Solved(
        {index: Plans(best[False][index], best[True][index]) for index in shapes},
        sum(one.predicted_s for one in found[False].values()),
        min(one.hidden_share for one in found[False].values()),
        all(one.exact for its in found.values() for one in its.values()),
        tuple(tried),
    )


def _solved(shapes: Mapping[int, SpanShape], costs: Costs, forward_only: bool, max_steps: int) -> dict[int, Solution]:
    found = {}
    for index, shape in shapes.items():
        its = {chunks: of_spans[index] for chunks, of_spans in costs.items()}
        found[index] = solve(shape, its, forward_only=forward_only, max_steps=max_steps)
    return found


def _predicted_s(shapes: Mapping[int, SpanShape], costs: Costs, plans: StagePlan, forward_only: bool) -> float:
    return sum(
        predicted_s(shapes[index], costs[plan.chunks][index], plan, forward_only=forward_only)
        for index, plan in plans.items()
    )


def _complexity(one: Candidate) -> tuple[int, int]:
    """Fewer chunks are simpler, and so is a launch before the op at the tap."""
    plans = one.plans.values()
    return max(plan.chunks for plan in plans), sum(plan.launch is not Launch.BEFORE for plan in plans)
