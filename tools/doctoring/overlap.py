"""A tiny group: how much of its communication is hidden, and how much the solver predicts from its measured costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ablation.arms import Arm
from ablation.bench import Bench, Sizes
from megatron.core import parallel_state

from doctoring.check import Finding, by_ranks, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.overlap.costs import passes_of
from megatron_scmoe.overlap.kept import Plans
from megatron_scmoe.overlap.solver import solve
from megatron_scmoe.overlap.spans import communication_s, exposed_s, hidden_share

KEPT = 0.5
"""Part of the predicted hidden share that has to be hidden. Between right and wrong there is much room: half of it
leaves to noise what a busy machine has of it."""
LEAST = 0.01
"""Part of a step that communication has to take for its share to be told from noise."""
REPETITIONS = 9
SEED = 1234
MODEL = "pos2"
_WIDTH, _TOKENS = 256, 256


class Overlap:
    """See ``CATALOG``."""

    name, communicates = "overlap", True

    def look(self, job: Job) -> dict[str, Any]:
        """Hidden share of training steps with the plan that the solver finds, and the share that it predicts."""
        size = job.layout.expert_model_parallel_size
        size = size if size > 1 else job.world_size
        if size == 1:
            return {}
        job.join_tiny_groups(size)
        bench = Bench([Arm(f"{MODEL} adaptive", MODEL, "adaptive")], _sizes(experts=size * max(1, 8 // size)), SEED)
        costs = bench.costs(MODEL, 1)
        ((index, part),) = bench.planned(MODEL).items()
        solution = solve(part.shape, {1: costs[index]})
        bench.set_plans(MODEL, {index: Plans(solution.plan, solution.plan)})
        bench.step(MODEL, "training")
        steps = [bench.recorded_step(MODEL, "training") for _ in range(REPETITIONS)]
        spans = [[one.spans for one in passes_of(recording)] for _, recording in steps]
        communication = [sum(map(communication_s, of_step)) for of_step in spans]
        exposed = [sum(map(exposed_s, of_step)) for of_step in spans]
        parallel_state.destroy_model_parallel()
        return {
            "ranks": size,
            "step_s": median(seconds for seconds, _ in steps),
            "communication_s": median(communication),
            "hidden": median(map(hidden_share, exposed, communication)),
            "predicted": solution.hidden_share,
        }

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Rank by rank; where all are right, by the one that hides least."""
        found = by_ranks([[judged(one)] for one in seen])
        wrong = [one for one in found if one.fix]
        return wrong or [judged(min(seen, key=lambda one: one.get("hidden", 0.0)))]


def judged(seen: Mapping[str, Any]) -> Finding:
    """What there is to say of one rank."""
    if not seen:
        return not_tried("experts on one rank have no all-to-all")
    words = (
        f"{seen['ranks']} ranks, a step of {seen['step_s'] * 1e3:.1f} ms: {seen['hidden']:.0%} of "
        f"{seen['communication_s'] * 1e3:.1f} ms of communication hidden, {seen['predicted']:.0%} predicted"
    )
    if seen["communication_s"] < LEAST * seen["step_s"]:
        return not_tried(f"{words}: too little of it to tell")
    if seen["hidden"] < KEPT * seen["predicted"]:
        fix = "see check environment, and what else computes there; tools/trace.py draws an --overlap-report"
        return problem(words, fix)
    return ok(words)


def _sizes(experts: int) -> Sizes:
    """Of one group of two blocks."""
    return Sizes(hidden=_WIDTH, ffn=4 * _WIDTH, heads=_WIDTH // 64, experts=experts, layers=2, tokens=_TOKENS)
