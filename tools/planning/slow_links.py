"""Arms of the overlap's ablation: their measured steps, and what the solver's schedule makes of their measured ops.

A result keeps of each arm what its ops cost at each number of chunks, measured in recorded steps in which everything
waits for everything, and what such a step takes beside its groups (``ablation.measure``). The steps that are judged
are others, timed later and without marks. Megatron's own layers make no marks: theirs are the ops of our layer in
their place, in sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ablation import analysis
from ablation.ops import SpanOps

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.solver import predicted_s
from planning.judging import Judged


def judged(folder: Path) -> list[Judged]:
    """Each arm of a kept result at each link, in both kinds of step, where costs at its plan's chunks are kept.

    Args:
        folder: of the result.

    Raises:
        OSError, ValueError: where there is none that this version reads.
    """
    return [
        Judged(
            what=f"{arm['arm']['name']}, {kind}, all-to-all {point['share']:.2f} of the layer ({point['rate']})",
            measured=median(arm["seconds"][kind]),
            predicted=predicted(arm, kind),
            group=folder.name,
        )
        for point, arm, kind in arms(folder)
        if is_kept(arm, kind)
    ]


def causes(folder: Path) -> Iterator[str]:
    """How steps stand to predictions at each link, and how many have no costs to predict them by."""
    figures = judged(folder)
    for rate in dict.fromkeys(point["rate"] for point, _, _ in arms(folder)):
        errors = [one.error for one in figures if one.what.endswith(f"({rate})")]
        if errors:
            yield f"{folder.name}, {rate}: mean error {fmean(errors):+.1%}, {min(errors):+.1%} to {max(errors):+.1%}"
    if left := sum(not is_kept(arm, kind) for _, arm, kind in arms(folder)):
        yield f"{folder.name}: {left} steps are not judged, as no costs at their numbers of chunks were kept"


def predicted(arm: dict[str, Any], kind: str) -> float:
    """Seconds of a step of one arm by the solver's schedule on its measured ops."""
    return arm["rest_s"][kind] + sum(
        predicted_s(ops.shape, ops.costs[kind][plan.chunks], plan, forward_only=kind == "forward")
        for ops, plan in _planned(arm, kind)
    )


def arms(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Link, arm and kind of each step of a result."""
    for point in analysis.read(folder)["points"]:
        for arm in point["arms"]:
            yield from ((point, arm, kind) for kind in analysis.KINDS)


def is_kept(arm: dict[str, Any], kind: str) -> bool:
    """Whether costs at the chunks of an arm's plan are kept."""
    spans = _planned(arm, kind)
    return bool(spans) and all(plan.chunks in ops.costs[kind] for ops, plan in spans)


def _planned(arm: dict[str, Any], kind: str) -> list[tuple[SpanOps, Plan]]:
    """Each span with the plan that it ran by."""
    spans = {index: SpanOps.read(told) for index, told in arm["costs"].items()}
    return [(ops, _plan(arm["plans"].get(index), kind, ops.shape)) for index, ops in spans.items()]


def _plan(told: dict[str, Any] | None, kind: str, shape: SpanShape) -> Plan:
    if told is None:  # Megatron's own layer waits for each of its collectives
        return sequential_plan(shape)
    slots = tuple(tuple(call) for call in told[kind])
    return Plan(slots, blocking=told["blocking"][kind], launch=Launch(told["launches"][kind]))
