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

_MIRROR = {
    START_DISPATCH: FINISH_DISPATCH,
    FINISH_DISPATCH: START_DISPATCH,
    START_COMBINE: FINISH_COMBINE,
    FINISH_COMBINE: START_COMBINE,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the experts of one group run.

    Attributes:
        slot: the experts run before the ``slot``-th dense op behind the tap (from 1); the last slot lies behind them
        all. blocking: every collective is waited for where it starts: the sequential reference.
    """

    slot: int
    blocking: bool


def forward_order(dense_ops: Sequence[str], tap: int, plan: Plan) -> list[str]:
    """Steps of one group's forward, in the order of their launch (ScMoE, arXiv 2404.05019, section 3.3).

    Args:
        dense_ops: names of the residual ops in order, the shared expert last.
        tap: index of the op whose normed input the routed experts read.
        plan: where the experts run.
    """
    steps: list[str] = []
    for index, op in enumerate(dense_ops):
        if index == tap:
            steps.append(START_DISPATCH)
        if index == tap + plan.slot - 1:
            steps += [FINISH_DISPATCH, EXPERTS, START_COMBINE]
        steps.append(op)
    if plan.slot == len(dense_ops) - tap + 1:
        steps += [FINISH_DISPATCH, EXPERTS, START_COMBINE]
    return [*steps, FINISH_COMBINE]


def backward_order(dense_ops: Sequence[str], tap: int, plan: Plan) -> list[str]:
    """Steps of the same group's backward: the mirror image, in which a finish starts and a start finishes."""
    return [_MIRROR.get(step, step) for step in reversed(forward_order(dense_ops, tap, plan))]
