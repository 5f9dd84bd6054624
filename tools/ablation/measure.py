"""Timing all arms by turns, at the link rate that holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ablation.arms import Arm, cost_model
from ablation.bench import KINDS, Bench, gathered
from ablation.link import Link
from ablation.ops import SpanOps
from ablation.tried import try_by_turns
from megatron_scmoe.contracts import Plan, SpanShape
from megatron_scmoe.overlap import observe
from megatron_scmoe.overlap.costs import passes_of
from megatron_scmoe.overlap.kept import Plans
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.solver import predicted_s
from megatron_scmoe.overlap.spans import communication_s, exposed_s

RECORDED_STEPS = 5


@dataclass(slots=True)
class ArmResult:
    """What one arm did at one link rate; lists hold one value for each repetition.

    Attributes:
        arm: what was timed.
        plans: by group: slots of each call for training and forward, whether they block, and where, in each of the
            two, dispatches are launched by the op at the tap; empty for Megatron's own layers.
        seconds: of the slowest rank, by kind.
        limit_s: what no plan beats, by kind: the step without its groups, and the groups' limits. None for stock.
        predicted_s: the same with the solver's prediction for its plans, in the place of the limits.
        costs_of: the model whose ops were measured for this arm (``arms.cost_model``).
        costs: by group what ``SpanOps`` tells of it: costs of its ops at each number of chunks among which the plan is
            chosen, in sequence, under the arm's routing, each the median of the passes of some recorded steps. The
            timed steps are others, and later.
        tried: of an adaptive arm the candidates for its plans and the seconds of each in its turns, by kind.
        rest_s: of recorded steps of the same model, what lies outside of the groups, by kind.
        communication_s, exposed_s: of some recorded steps, on the rank where more is exposed, by kind.
        sent_bytes: a step's, from the interface counters, summed over ranks, by kind; empty without slow_link.
        tensor_bytes: the same from the sizes of what was sent; empty for Megatron's own layers.
        tokens_max_over_mean: load of the busiest expert in the recorded steps.
        sent_rate: centroids over rows that were routed, on all ranks, in the last recorded step; 1 where none travel.
        timeline: spans of one group's passes on rank 0, by kind.
    """

    arm: Arm
    plans: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    limit_s: dict[str, float] | None = None
    predicted_s: dict[str, float] | None = None
    costs_of: str = ""
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rest_s: dict[str, float] = field(default_factory=dict)
    communication_s: dict[str, list[float]] = field(default_factory=dict)
    exposed_s: dict[str, list[float]] = field(default_factory=dict)
    sent_bytes: dict[str, float] = field(default_factory=dict)
    tensor_bytes: dict[str, float] = field(default_factory=dict)
    tokens_max_over_mean: float | None = None
    sent_rate: float = 1.0
    timeline: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def measure(bench: Bench, link: Link, results: list[ArmResult], *, repetitions: int) -> Iterator[None]:
    """Time the arms of ``results`` at the rate that the link has, and fill these; yields after each round of work."""
    plans: dict[str, dict[int, Plans]] = {}
    for (model, routing), alike in measured_alike(results).items():
        _solve(bench, model, routing, alike, plans)
        yield
    for repetition in range(-1, repetitions):
        # Each round begins with another arm, so that none is always behind the same one; round -1 warms up.
        first = repetition % len(results)
        turned = results[first:] + results[:first]
        for result in turned:
            _prepare(bench, result.arm, plans)
            for kind in KINDS:
                with observe.recording() if result.arm.recorded else contextlib.nullcontext():
                    seconds = bench.step(result.arm.model, kind)
                if repetition >= 0:
                    result.seconds[kind].append(seconds)
        yield
    for result in results:
        _prepare(bench, result.arm, plans)
        for kind in KINDS:
            for _ in range(RECORDED_STEPS):
                _observe(bench, link, result, kind)


def measured_alike(results: list[ArmResult]) -> dict[tuple[str, str], list[ArmResult]]:
    """Arms by the model and the routing whose ops are measured for them."""
    found: dict[tuple[str, str], list[ArmResult]] = {}
    for result in results:
        found.setdefault((cost_model(result.arm.model), result.arm.routing), []).append(result)
    return found


def _prepare(bench: Bench, arm: Arm, plans: dict[str, dict[int, Plans]]) -> None:
    bench.set_routing(arm.model, arm.routing)
    if bench.planned(arm.model):
        bench.set_plans(arm.model, plans[arm.name])


def _solve(
    bench: Bench, model: str, routing: str, results: list[ArmResult], plans: dict[str, dict[int, Plans]]
) -> None:
    """Measure a model's ops, and from them the plans, predictions and limits of the arms that are measured by it."""
    bench.set_routing(model, routing)
    shapes = {index: part.shape for index, part in bench.planned(model).items()}
    counts = sorted({1}.union(*(result.arm.chunk_counts for result in results)))
    costs = {kind: {chunks: bench.costs(model, chunks, kind) for chunks in counts} for kind in KINDS}
    rest_s = bench.rest_s(model)
    only = {kind: kind == "forward" for kind in KINDS}
    limits = {
        kind: rest_s[kind]
        + sum(limit_s(shape, costs[kind][1][i], forward_only=only[kind]) for i, shape in shapes.items())
        for kind in KINDS
    }
    tried: dict[tuple[tuple[int, ...], str], tuple[dict[int, Plan], list[dict[str, Any]]]] = {}
    for result in results:
        counts_of = result.arm.chunk_counts
        of_group = {
            index: SpanOps(shape=shape, costs={kind: {n: costs[kind][n][index] for n in counts_of} for kind in KINDS})
            for index, shape in shapes.items()
        }
        result.costs_of, result.rest_s = model, rest_s
        result.costs = {str(index): ops.written() for index, ops in of_group.items()}
        if result.arm.model != model:  # one of Megatron's own layers, which have no plan
            continue
        chosen: dict[str, dict[int, Plan]] = {kind: {} for kind in KINDS}
        result.predicted_s, result.limit_s = dict(rest_s), limits
        for kind in KINDS:
            if result.arm.adaptive:
                if (counts_of, kind) not in tried:  # arms that differ in recording alone have one plan
                    of_counts = {chunks: costs[kind][chunks] for chunks in counts_of}
                    tried[counts_of, kind] = try_by_turns(bench, model, shapes, of_counts, kind)
                chosen[kind], result.tried[kind] = tried[counts_of, kind]
            else:
                chosen[kind] = {index: _plan(result.arm, shape) for index, shape in shapes.items()}
            for index, ops in of_group.items():
                plan = chosen[kind][index]
                its = ops.costs[kind][plan.chunks]
                result.predicted_s[kind] += predicted_s(ops.shape, its, plan, forward_only=only[kind])
        plans[result.arm.name] = {index: Plans(*(chosen[kind][index] for kind in KINDS)) for index in shapes}
        result.plans = {index: _written({kind: chosen[kind][index] for kind in KINDS}) for index in shapes}


def _written(plans: dict[str, Plan]) -> dict[str, Any]:
    """A group's plans, by kind, as ``ArmResult.plans`` has them."""
    slots = {kind: list(plan.slots) for kind, plan in plans.items()}
    launches = {kind: str(plan.launch) for kind, plan in plans.items()}
    blocking = {kind: plan.blocking for kind, plan in plans.items()}
    return {**slots, "blocking": blocking, "launches": launches}


def _plan(arm: Arm, shape: SpanShape) -> Plan:
    """The plan of a group that the arm's mode says."""
    word, _, number = arm.mode.partition(" ")
    if word == "off":
        return sequential_plan(shape)
    (call,) = shape.calls  # of several, slots are not set by hand
    if word == "slot":
        return Plan(((int(number),),))
    return Plan(((call.num_slots,) * int(number),))  # chunks: the shared expert runs while the first one travels


def _observe(bench: Bench, link: Link, result: ArmResult, kind: str) -> None:
    """A recorded step: exposed time, bytes, load, and a timeline, of which that of the last step stays."""
    before = link.bytes_sent()
    with bench.routed_tokens(result.arm.model) as tokens:
        _, recording = bench.recorded_step(result.arm.model, kind)
    after = link.bytes_sent()
    passes = passes_of(recording)
    summary = {
        "communication_s": sum(communication_s(one.spans) for one in passes),
        "exposed_s": sum(exposed_s(one.spans) for one in passes),
        "tensor_bytes": sum(one.sent_bytes for one in passes),
        "tokens": tokens.tolist(),
        "rows": sum(one.rows for one in recording.compressions),
        "clusters": sum(one.clusters for one in recording.compressions),
    }
    ranks = gathered(summary)
    if kind == "training":
        totals = [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)]
        result.tokens_max_over_mean = max(totals) * len(totals) / sum(totals)
        if rows := sum(rank["rows"] for rank in ranks):
            result.sent_rate = sum(rank["clusters"] for rank in ranks) / rows
    if before is not None and after is not None:
        result.sent_bytes[kind] = after - before
    if not passes:  # Megatron's own layers make no marks
        return
    slowest = max(ranks, key=lambda rank: rank["exposed_s"])
    result.communication_s.setdefault(kind, []).append(slowest["communication_s"])
    result.exposed_s.setdefault(kind, []).append(slowest["exposed_s"])
    result.tensor_bytes[kind] = sum(rank["tensor_bytes"] for rank in ranks)
    first = passes[0].group
    result.timeline[kind] = [asdict(span) for one in passes if one.group == first for span in one.spans]
