"""The plans of an adaptive arm, as --overlap adaptive chooses them: candidates by turns, in steps of the kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablation.bench import Bench
from megatron_scmoe.contracts import Plan, SpanShape
from megatron_scmoe.overlap.candidates import candidates_of
from megatron_scmoe.overlap.kept import Plans, described
from megatron_scmoe.overlap.plan import even_plan
from megatron_scmoe.overlap.solver import SpanCosts
from megatron_scmoe.overlap.trial import TURNS, judge


def try_by_turns(
    bench: Bench,
    model: str,
    shapes: Mapping[int, SpanShape],
    costs: Mapping[int, Mapping[int, SpanCosts]],
    kind: str,
) -> tuple[dict[int, Plan], list[dict[str, Any]]]:
    """The fastest plans, by the first group of each span, and what each candidate was and took.

    Every rank calls it, and finds the same: a step's seconds are those of the slowest rank.

    Args:
        bench: holds the model.
        model: whose plans they are.
        shapes: of its spans.
        costs: by the number of chunks, and by span.
        kind: of step.
    """
    fixed = {index: even_plan(shape, 1) for index, shape in shapes.items()}
    running = {index: Plans(plan, plan) for index, plan in fixed.items()}
    candidates = candidates_of(shapes, costs, running, fixed).candidates
    both = [{index: Plans(plan, plan) for index, plan in one.plans.items()} for one in candidates]
    seconds: list[list[float]] = [[] for _ in candidates]
    left: Sequence[int] = range(len(candidates))
    while left:
        for number in list(left) * TURNS:
            bench.set_plans(model, both[number])
            seconds[number].append(bench.step(model, kind))
        verdict = judge(seconds)
        left = verdict.left
    told = [{"plans": described(plans), "seconds": its} for plans, its in zip(both, seconds, strict=True)]
    return dict(candidates[verdict.best].plans), told
