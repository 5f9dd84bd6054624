"""Arms of the overlap's ablation: their measured steps, and what the solver's schedule makes of their measured ops.

The ops were measured in sequence; a kept result has their costs at one chunk and the limit of each arm. What a step
takes beside its groups is its limit without theirs. Costs of plans in several chunks are not kept: these are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from ablation.arms import MODELS, Model

from megatron_scmoe.config import Position, ScMoEConfig, Shortcut
from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts, predicted_s
from planning.judging import Judged

KINDS = ("training", "forward")


def judged(result: Path) -> list[Judged]:
    """Each arm of a kept result whose plan's ops were measured, at each link, in both kinds of step."""
    points = json.loads(result.read_text())["points"]
    return [
        Judged(
            what=f"{arm['arm']['name']}, {kind}, all-to-all {point['share']:.2f} of the layer ({point['rate']})",
            measured=median(arm["seconds"][kind]),
            predicted=predicted(arm, kind),
            group=result.parent.name,
        )
        for point in points
        for arm in point["arms"]
        for kind in KINDS
        if arm["costs"] and _is_in_one_chunk(arm, kind)
    ]


def predicted(arm: dict[str, Any], kind: str) -> float:
    """Seconds of a step of one arm by the solver's schedule on its measured ops."""
    model = MODELS[arm["arm"]["model"]]
    costs = {index: _costs(its, kind) for index, its in arm["costs"][kind].items()}
    shapes = {index: _shape(model, its) for index, its in costs.items()}
    plans = {index: _plan(plan, kind) for index, plan in arm["plans"].items()}
    only = kind == "forward"
    rest_s = arm["limit_s"][kind] - sum(limit_s(shapes[i], costs[i], forward_only=only) for i in costs)
    return rest_s + sum(predicted_s(shapes[i], costs[i], plans[i], forward_only=only) for i in costs)


def _is_in_one_chunk(arm: dict[str, Any], kind: str) -> bool:
    """Costs of one chunk are kept, and no others."""
    return all(len(call) == 1 for plan in arm["plans"].values() for call in plan[kind])


def _plan(plan: dict[str, Any], kind: str) -> Plan:
    slots = tuple(tuple(call) for call in plan[kind])
    return Plan(slots, blocking=plan["blocking"], launch=Launch(plan.get("launches", {}).get(kind, Launch.BEFORE)))


def _shape(model: Model, costs: SpanCosts) -> SpanShape:
    if model.shortcut == "none":
        num_ops = len(costs.forward.ops)
        return SpanShape(num_ops=num_ops, calls=(RoutedCall(tap=0, landing=num_ops - 1),))
    scmoe = ScMoEConfig(
        shortcut=Shortcut(model.shortcut),
        shortcut_position=(Position(model.position),),
        moe_every=model.moe_every,
        shortcut_span=model.span,
        shortcut_landing=int(model.span > 1),
    )
    return scmoe.span_shape(0, [2 * model.moe_every - 1] * model.span)


def _costs(told: dict[str, Any], kind: str) -> SpanCosts:
    if kind == "forward":
        forward = _pass(told)
        return SpanCosts(forward=forward, backward=forward)
    return SpanCosts(
        forward=_pass(told["forward"]), backward=_pass(told["backward"]), forward_runs=told.get("forward_runs", 1.0)
    )


def _pass(told: dict[str, Any]) -> PassCosts:
    return PassCosts(ops=tuple(told["ops"]), calls=tuple(CallCosts(**call) for call in told["calls"]))
