"""The plans that a stage tries: which of them are worth a turn, and in which order a tie is decided. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.kept import Plans
from megatron_scmoe.overlap.plan import even_plan, sequential_plan
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


def candidates_of(shapes: Mapping[int, SpanShape], costs: Costs, running: Mapping[int, Plans]) -> Solved:
    """Solve for every number of chunks, and choose what is to be tried beside the plans that run.

    Args:
        shapes: of the stage's spans.
        costs: of each at each number of chunks that may be chosen.
        running: the plans that they have.
    """
    found = {only: {chunks: _solved(shapes, costs, chunks, only) for chunks in costs} for only in (False, True)}
    fastest = {only: _fastest(shapes, of_counts) for only, of_counts in found.items()}
    best: dict[bool, StagePlan] = {only: {i: one.plan for i, one in its.items()} for only, its in fastest.items()}
    stage_plans: list[StagePlan] = [
        {index: plans.training for index, plans in running.items()},
        {index: plans.forward for index, plans in running.items()},
        {index: even_plan(shape, 1) for index, shape in shapes.items()},
        *({i: one.plan for i, one in its.items()} for of_counts in found.values() for its in of_counts.values()),
        *best.values(),
        {index: sequential_plan(shape) for index, shape in shapes.items()},
    ]
    seconds = [{only: _predicted_s(shapes, costs, plans, only) for only in found} for plans in stage_plans]
    least = {only: min(of_kind[only] for of_kind in seconds) for only in found}
    tried: list[StagePlan] = []
    for plans, of_kind in zip(stage_plans, seconds, strict=True):
        runs = plans is stage_plans[0] or plans is stage_plans[1]
        hopeful = any(of_kind[only] <= HOPELESS * least[only] for only in found)
        if (runs or hopeful) and plans not in tried:
            tried.append(plans)
    tried.sort(key=_complexity)  # stable: of equals what runs comes first, and what hides nothing last
    return Solved(
        {index: Plans(best[False][index], best[True][index]) for index in shapes},
        sum(one.predicted_s for one in fastest[False].values()),
        min(one.hidden_share for one in fastest[False].values()),
        all(one.exact for of_counts in found.values() for its in of_counts.values() for one in its.values()),
        tuple(_candidate(shapes, costs, plans) for plans in tried),
    )


def _solved(shapes: Mapping[int, SpanShape], costs: Costs, chunks: int, forward_only: bool) -> dict[int, Solution]:
    return {
        index: solve(
            shape, {chunks: costs[chunks][index]}, forward_only=forward_only, max_steps=MAX_STEPS // len(costs)
        )
        for index, shape in shapes.items()
    }


def _fastest(shapes: Mapping[int, SpanShape], found: Mapping[int, Mapping[int, Solution]]) -> dict[int, Solution]:
    """Of each span, over the numbers of chunks, of which fewer win a tie."""
    return {
        index: min((found[chunks][index] for chunks in sorted(found)), key=lambda one: one.predicted_s)
        for index in shapes
    }


def _predicted_s(shapes: Mapping[int, SpanShape], costs: Costs, plans: StagePlan, forward_only: bool) -> float:
    return sum(
        predicted_s(shapes[index], costs[plan.chunks][index], plan, forward_only=forward_only)
        for index, plan in plans.items()
    )


def _candidate(shapes: Mapping[int, SpanShape], costs: Costs, plans: StagePlan) -> Candidate:
    shares = (predicted_hidden_share(shapes[i], costs[plan.chunks][i], plan) for i, plan in plans.items())
    return Candidate(plans, _predicted_s(shapes, costs, plans, forward_only=False), min(shares))


def _complexity(plans: StagePlan) -> tuple[int, int]:
    """Fewer chunks are simpler, and so is a launch before the op at the tap."""
    return max(plan.chunks for plan in plans.values()), sum(plan.launch is not Launch.BEFORE for plan in plans.values())
