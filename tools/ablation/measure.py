"""Timing all arms by turns, at the link rate that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ablation.arms import Arm
from ablation.bench import KINDS, Bench, gathered
from ablation.link import Link
from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.adaptive import Plans
from megatron_scmoe.overlap.costs import passes_of
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.solver import predicted_s, solve
from megatron_scmoe.overlap.spans import communication_s, exposed_s

CHUNKS = (1, 2, 4)
RECORDED_STEPS = 5


@dataclass(slots=True)
class ArmResult:
    """What one arm did at one link rate; lists hold one value for each repetition.

    Attributes:
        arm: what was timed.
        plans: by group: slots for training and forward, and whether they block; empty for Megatron's own layers.
        seconds: of the slowest rank, by kind.
        limit_s: what no plan beats, by kind: the step without its groups, and the groups' limits. None for stock.
        predicted_s: the same with the solver's prediction for its plans, in the place of the limits.
        costs: what each group's ops cost in sequence at one chunk, by kind. None for Megatron's own layers.
        communication_s, exposed_s: of some recorded steps, on the rank where more is exposed, by kind.
        sent_bytes: a step's, from the interface counters, summed over ranks, by kind; empty without slow_link.
        tensor_bytes: the same from the sizes of what was sent; empty for Megatron's own layers.
        tokens_max_over_mean: load of the busiest expert in the recorded steps.
        sent_rate: rows that travelled over rows that were routed, on all ranks, in the last recorded step.
        timeline: spans of one group's passes on rank 0, by kind.
    """

    arm: Arm
    plans: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    limit_s: dict[str, float] | None = None
    predicted_s: dict[str, float] | None = None
    costs: dict[str, dict[str, Any]] | None = None
    communication_s: dict[str, list[float]] = field(default_factory=dict)
    exposed_s: dict[str, list[float]] = field(default_factory=dict)
    sent_bytes: dict[str, float] = field(default_factory=dict)
    tensor_bytes: dict[str, float] = field(default_factory=dict)
    tokens_max_over_mean: float | None = None
    sent_rate: float = 1.0
    timeline: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def measure(
    bench: Bench, link: Link, results: list[ArmResult], *, repetitions: int, say: Callable[[str], None]
) -> Iterator[None]:
    """Time the arms of ``results`` at the rate that the link has, and fill these; yields after each round of work."""
    plans: dict[str, dict[int, Plans]] = {}
    for name in dict.fromkeys(result.arm.model for result in results):
        if bench.groups(name):
            say(f"measuring what the ops of {name} cost")
            _solve(bench, name, [result for result in results if result.arm.model == name], plans)
            yield
    for repetition in range(-1, repetitions):
        # Each round begins with another arm, so that none is always behind the same one; round -1 warms up.
        first = repetition % len(results)
        turned = results[first:] + results[:first]
        for result in turned:
            _prepare(bench, result.arm, plans)
            for kind in KINDS:
                if result.arm.recorded:
                    seconds, _ = bench.recorded_step(result.arm.model, kind)
                else:
                    seconds = bench.step(result.arm.model, kind)
                if repetition >= 0:
                    result.seconds[kind].append(seconds)
        yield
    for result in results:
        _prepare(bench, result.arm, plans)
        _observe(bench, link, result)


def _prepare(bench: Bench, arm: Arm, plans: dict[str, dict[int, Plans]]) -> None:
    bench.set_routing(arm.model, arm.routing)
    if bench.groups(arm.model):
        bench.set_plans(arm.model, plans[arm.name])


def _solve(bench: Bench, model: str, results: list[ArmResult], plans: dict[str, dict[int, Plans]]) -> None:
    """Measure a model's ops, and from them the plans, predictions and limits of its arms."""
    bench.set_routing(model, "balanced")
    groups = bench.groups(model)
    costs = {chunks: bench.costs(model, chunks) for chunks in CHUNKS}
    forward = {chunks: bench.costs(model, chunks, "forward") for chunks in CHUNKS}
    rest_s = bench.rest_s(model)
    for result in results:
        arm = result.arm
        mine: dict[int, Plans] = {}
        predicted = dict(rest_s)
        for index, group in groups.items():
            by_chunks = {chunks: costs[chunks][index] for chunks in CHUNKS}
            forward_by_chunks = {chunks: forward[chunks][index] for chunks in CHUNKS}
            counts = CHUNKS if arm.mode == "adaptive chunks" else (1,)
            if arm.adaptive:
                best = solve(group.shape, {chunks: by_chunks[chunks] for chunks in counts})
                best_forward = solve(
                    group.shape, {chunks: forward_by_chunks[chunks] for chunks in counts}, forward_only=True
                )
                mine[index] = Plans(best.plan, best_forward.plan)
            else:
                plan = _fixed_plan(arm.mode, group.shape.num_slots)
                mine[index] = Plans(plan, plan)
            predicted["training"] += predicted_s(
                group.shape, by_chunks[mine[index].training.chunks], mine[index].training
            )
            predicted["forward"] += predicted_s(
                group.shape, forward_by_chunks[mine[index].forward.chunks], mine[index].forward, forward_only=True
            )
        plans[arm.name] = mine
        result.plans = {
            index: {
                "training": list(one.training.slots),
                "forward": list(one.forward.slots),
                "blocking": one.training.blocking,
            }
            for index, one in mine.items()
        }
        result.predicted_s = predicted
        result.costs = {
            "training": {str(index): asdict(costs[1][index]) for index in groups},
            "forward": {str(index): asdict(forward[1][index].forward) for index in groups},
        }
        result.limit_s = {
            "training": rest_s["training"] + sum(limit_s(groups[i].shape, costs[1][i]) for i in groups),
            "forward": rest_s["forward"]
            + sum(limit_s(groups[i].shape, forward[1][i], forward_only=True) for i in groups),
        }


def _fixed_plan(mode: str, num_slots: int) -> Plan:
    word, _, number = mode.partition(" ")
    if word == "off":
        return Plan((1,), blocking=True)
    if word == "slot":
        return Plan((int(number),))
    return Plan((num_slots,) * int(number))  # chunks: the shared expert runs while the first one travels


def _observe(bench: Bench, link: Link, result: ArmResult) -> None:
    """Some recorded steps of each kind: exposed time, bytes, load; of the last one a timeline."""
    for kind in KINDS:
        for _ in range(RECORDED_STEPS):
            _observe_step(bench, link, result, kind)


def _observe_step(bench: Bench, link: Link, result: ArmResult, kind: str) -> None:
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
