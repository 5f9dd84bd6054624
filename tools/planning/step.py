"""The time of a training step: passes of pipeline stages, their bubble, the reduction of gradients, the optimizer."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache
from math import lcm
from statistics import fmean

from planning.counts import Parameters, model_flops, parameters
from planning.hardware import Machine
from planning.passes import Passes, Pricing, Seconds
from planning.prediction import OpTime, Prediction, SpanTime, StageTime
from planning.spans import SpanPricing
from planning.training import Training
from planning.workload import Op, Span, Stage, Workload

BUCKETS = 8
"""Parts in which gradients are reduced: the last one has nothing left beside which it could."""


def predict(workload: Workload, machine: Machine, *, forward_only: bool = False) -> Prediction:
    """The time of a step of ``workload`` on ``machine``.

    Args:
        workload: what runs.
        machine: where.
        forward_only: evaluation: no backward, reduction or optimizer.
    """
    pricing = Pricing(workload, machine, forward_only=forward_only)
    spans: dict[Span, SpanTime] = {}
    stages = [_stage(stage, pricing, machine, spans) for stage in workload.stages]
    micro_batches = workload.micro_batches
    slowest = max(stages, key=_seconds)
    _hand_on(slowest, pricing)
    bubble_s = (workload.layout.pp - 1) / workload.layout.vp * fmean(map(_seconds, stages))
    parts: Seconds = defaultdict(float)
    for name in (*slowest.forward, *slowest.backward):
        parts[name] = micro_batches * (slowest.forward[name] + slowest.backward[name])
    parts["pipeline bubble"] = bubble_s
    if not forward_only:
        _finish(parts, slowest, pricing, machine)
    step_s = sum(parts.values())
    per_gpu = step_s * workload.layout.gpus
    wires = tuple(wire if wire.group in ("DP", "EDP") else wire.times(micro_batches) for wire in slowest.wires.values())
    return Prediction(
        step_s=step_s,
        parts={name: seconds for name, seconds in parts.items() if seconds},
        stages=tuple(map(_stage_time, stages)),
        wires=wires,
        spans=tuple(spans.values()),
        tokens_per_s=workload.global_batch * workload.seq_length / per_gpu,
        model_flops=model_flops(workload) * (1 / 3 if forward_only else 1) / per_gpu,
        a2a_s=sum(wire.seconds for wire in wires if wire.group == "EP"),
    )


def _stage(stage: Stage, pricing: Pricing, machine: Machine, spans: dict[Span, SpanTime]) -> Passes:
    """One micro-batch of a stage."""
    stock, passes = Passes(), Passes()
    alike = _without_stages(pricing.workload)
    for op, count in Counter(stage).items():
        its, time = _priced(op, alike, machine, pricing.forward_only)
        if isinstance(op, Span) and time is not None:
            before = spans[op].count if op in spans else 0
            spans[op] = replace(time, count=before + count)
            passes.add(its, count)
        else:
            stock.add(its, count)
    if pricing.training.overlap_moe:
        _overlap_micro_batches(stock, pricing.workload.micro_batches)
    passes.add(stock)
    return passes


def _without_stages(workload: Workload) -> Workload:
    """What an op's time depends on: neither stages nor data parallel ranks."""
    layout = workload.layout
    gpus = lcm(layout.tp * layout.cp, layout.ep * layout.etp)
    alone = replace(layout, gpus=gpus, pp=1, vp=1)
    return replace(workload, stages=((),), layout=alone, global_batch=workload.micro_batch * alone.dp)


@lru_cache(maxsize=1 << 16)
def _priced(op: Op, workload: Workload, machine: Machine, forward_only: bool) -> tuple[Passes, SpanTime | None]:
    """An op, of which a search asks again with other stages; nobody changes what is found. A span's time, too."""
    pricing = Pricing(workload, machine, forward_only=forward_only)
    if not isinstance(op, Span):
        return pricing.op(op), None
    pricer = SpanPricing(pricing)
    time = pricer.time(op, 1)
    return pricer.passes(time), time


def _overlap_micro_batches(passes: Passes, micro_batches: int) -> None:
    """One micro-batch's exchanges run beside another's computation, of which there is none at both ends of a step."""
    waits = [passes.forward["exposed EP"], passes.backward["exposed EP"]]
    computing = _seconds(passes) - sum(waits)
    left = max(sum(waits) / micro_batches, sum(waits) - computing) / sum(waits) if sum(waits) else 0.0
    passes.forward["exposed EP"], passes.backward["exposed EP"] = (left * wait for wait in waits)
    for key, wire in passes.wires.items():
        if wire.group == "EP":
            passes.wires[key] = wire.exposing(left)


def _hand_on(stage: Passes, pricing: Pricing) -> None:
    """What goes to the next stage and comes back; interleaved stages send beside the next chunk's computation."""
    layout = pricing.workload.layout
    sent = pricing.groups.handed_on(pricing.ops.own_tokens).times(layout.vp)
    exposed = 1.0 if layout.vp == 1 else 0.0
    for seconds in (stage.forward,) if pricing.forward_only else (stage.forward, stage.backward):
        seconds["exposed PP"] += exposed * sent.seconds
        stage.wire("PP", "point-to-point", sent, exposed * sent.seconds)


def _finish(parts: Seconds, stage: Passes, pricing: Pricing, machine: Machine) -> None:
    """Reduce gradients, update, gather parameters: of the stage with the most parameters."""
    workload, training = pricing.workload, pricing.training
    held = max((_held(stage, workload) for stage in workload.stages), key=sum)
    shard = 0.0
    forward_s, backward_s = sum(stage.forward.values()), sum(stage.backward.values())
    if training.overlap_moe:
        forward_s = backward_s = (forward_s + backward_s) / 2  # they run interleaved
    beside = {"reduce-scatter": backward_s, "all-reduce": backward_s, "all-gather": forward_s}
    for group, size, ranks in zip(("DP", "EDP"), held, (pricing.groups.dp, pricing.groups.expert_dp), strict=True):
        shard += size / ranks.size if training.distributed_optimizer else size
        for kind, count, overlaps in _reduction(training):
            sent = ranks.ring(size * count)
            hidden_s = min(sent.seconds * (1 - 1 / BUCKETS), beside[kind]) if overlaps else 0.0
            beside[kind] -= hidden_s  # both kinds of parameters hide behind the same pass
            stage.wire(group, kind, sent, sent.seconds - hidden_s)
            parts[f"exposed {group}"] += sent.seconds - hidden_s
    moved = shard * training.update_bytes + sum(held) * training.grad_bytes
    parts["optimizer"] = moved / (machine.hardware.memory_bandwidth * machine.constants.memory)


def _reduction(training: Training) -> tuple[tuple[str, int, bool], ...]:
    """What data parallel ranks send for each parameter: kind, bytes of a ring's half, whether it runs beside a pass."""
    if not training.distributed_optimizer:
        return (("all-reduce", 2 * training.grad_bytes, training.overlap_grad_reduce),)
    return (
        ("reduce-scatter", training.grad_bytes, training.overlap_grad_reduce),
        ("all-gather", training.param_bytes, training.overlap_param_gather),
    )


def _held(stage: Stage, workload: Workload) -> Parameters:
    """Parameters of one rank of a stage."""
    layout = workload.layout
    counted = sum((parameters(op, workload).times(count) for op, count in Counter(stage).items()), Parameters())
    return Parameters(counted.dense / layout.tp, counted.expert / (layout.ep * layout.etp))


def _seconds(passes: Passes) -> float:
    return sum(passes.forward.values()) + sum(passes.backward.values())


def _stage_time(passes: Passes) -> StageTime:
    names = {**passes.forward, **passes.backward}
    return StageTime(
        forward_s=sum(passes.forward.values()),
        backward_s=sum(passes.backward.values()),
        ops={
            name: OpTime(forward_s=passes.forward[name], backward_s=passes.backward[name])
            for name in names
            if not name.startswith("exposed ")
        },
        exposed_s={
            name.removeprefix("exposed "): passes.forward[name] + passes.backward[name]
            for name in names
            if name.startswith("exposed ")
        },
    )
