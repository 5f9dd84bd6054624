"""What follows from a plan: the names of a group's steps and their order. Standard library only.

The order follows from the plan alone, in forward and, mirrored, in backward. ``layers/group.py`` runs that
order, the tests compare what every rank recorded with it, and ``docs/draw_timeline.py`` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_scmoe.contracts import Plan

ATTENTION = "attention"
MLP = "MLP"
SHARED_EXPERT = "shared expert"
ROUTE = "route"
ENCODE = "encode"
START_DISPATCH = "start dispatch"
FINISH_DISPATCH = "finish dispatch"
EXPERTS = "experts"
START_COMBINE = "start combine"
FINISH_COMBINE = "finish combine"
DECODE = "decode"
TAIL = "add"
CURRENT = "current "
"""What the steps of dgmoe's second flight, that of the current layer, are called before their name."""


class Step(NamedTuple):
    """One step of a group.

    Attributes:
        name: what runs: a dense op, or one of the names above.
        at: which dense op, or which token chunk.
    """

    name: str
    at: int


def even_plan(num_slots: int, chunks: int) -> Plan:
    """The plan that spreads the experts of ``chunks`` chunks evenly over the window: where nothing was measured."""
    return Plan(tuple(max(1, (chunk + 1) * (num_slots + 1) // (chunks + 1)) for chunk in range(chunks)))


def forward_order(dense_ops: Sequence[str], tap: int, plan: Plan, *, second_gate: bool = False) -> list[Step]:
    """Steps of one group's forward, in the order of their launch (ScMoE, arXiv 2404.05019, section 3.3).

    Args:
        dense_ops: names of the residual ops in order, the shared expert last.
        tap: index of the op whose normed input the routed experts read; their number where the experts read behind all.
        plan: where the experts run.
        second_gate: dgmoe: the current layer's tokens fly too, after the last dense op.
    """
    chunks = range(plan.chunks)
    steps: list[Step] = []
    for index in range(len(dense_ops) + 1):
        if index == tap:
            steps += [Step(START_DISPATCH, chunk) for chunk in chunks]
        if index == len(dense_ops) and second_gate:
            steps += [Step(CURRENT + START_DISPATCH, chunk) for chunk in chunks]
        steps += _experts(plan.chunks_at(index - tap + 1))
        if index < len(dense_ops):
            steps.append(Step(dense_ops[index], index))
    if second_gate:
        steps += _experts(chunks, CURRENT)
    steps += [Step(FINISH_COMBINE, chunk) for chunk in chunks]
    return steps + ([Step(CURRENT + FINISH_COMBINE, chunk) for chunk in chunks] if second_gate else [])


def backward_order(dense_ops: Sequence[str], tap: int, plan: Plan, *, second_gate: bool = False) -> list[Step]:
    """Steps of the same group's backward: the mirror image, in which a finish starts and a start finishes."""
    forward = forward_order(dense_ops, tap, plan, second_gate=second_gate)
    return [Step(_mirrored(name), at) for name, at in reversed(forward)]


def _experts(chunks: Sequence[int], prefix: str = "") -> list[Step]:
    names = (FINISH_DISPATCH, EXPERTS, START_COMBINE)
    return [Step(prefix + name, chunk) for chunk in chunks for name in names]


def _mirrored(name: str) -> str:
    if "start " in name:
        return name.replace("start ", "finish ")
    return name.replace("finish ", "start ")
