"""A plan says where, inside a group's dense stream, the routed experts run. Standard library only.

The order of a group's steps follows from the plan alone, in forward and, mirrored, in backward. ``layer.py`` runs that
order, the tests compare what every rank recorded with it, and ``docs/draw_timeline.py`` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

START_DISPATCH = "start dispatch"
FINISH_DISPATCH = "finish dispatch"
EXPERTS = "experts"
START_COMBINE = "start combine"
FINISH_COMBINE = "finish combine"
CURRENT = "current "
"""What the steps of dgmoe's second flight, that of the current layer, are called before their name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the experts of one group run.

    Attributes:
        slot: the experts run before the ``slot``-th dense op behind the tap (from 1); the last slot lies behind them
        all. blocking: every collective is waited for where it starts: the sequential reference.
    """

    slot: int
    blocking: bool


def forward_order(dense_ops: Sequence[str], tap: int, plan: Plan, *, second_gate: bool = False) -> list[str]:
    """Steps of one group's forward, in the order of their launch (ScMoE, arXiv 2404.05019, section 3.3).

    Args:
        dense_ops: names of the residual ops in order, the shared expert last.
        tap: index of the op whose normed input the routed experts read.
        plan: where the experts run.
        second_gate: dgmoe: the current layer's tokens fly too, after the last dense op.
    """
    experts = [FINISH_DISPATCH, EXPERTS, START_COMBINE]
    steps: list[str] = []
    for index, op in enumerate(dense_ops):
        if index == tap:
            steps.append(START_DISPATCH)
        if index == tap + plan.slot - 1:
            steps += experts
        steps.append(op)
    if second_gate:
        steps.append(CURRENT + START_DISPATCH)
    if plan.slot == len(dense_ops) - tap + 1:
        steps += experts
    if second_gate:
        steps += [CURRENT + step for step in experts]
    return [*steps, FINISH_COMBINE, *([CURRENT + FINISH_COMBINE] if second_gate else [])]


def backward_order(dense_ops: Sequence[str], tap: int, plan: Plan, *, second_gate: bool = False) -> list[str]:
    """Steps of the same group's backward: the mirror image, in which a finish starts and a start finishes."""
    forward = forward_order(dense_ops, tap, plan, second_gate=second_gate)
    return [_mirrored(step) for step in reversed(forward)]


def _mirrored(step: str) -> str:
    if "start " in step:
        return step.replace("start ", "finish ")
    return step.replace("finish ", "start ")
