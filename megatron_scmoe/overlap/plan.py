"""A plan says where, inside a group's dense stream, the routed experts of each token chunk run. Standard library only.

The order of a group's steps follows from the plan alone, in forward and, mirrored, in backward. ``layer.py`` runs that
order, the tests compare what every rank recorded with it, and ``docs/draw_timeline.py`` draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What a plan has to know of a group.

    Attributes:
        tap: index of the dense op whose normed input the routed experts read; the number of dense ops where they read
            behind all.
        num_dense_ops: ops in the dense stream.
        second_gate: dgmoe: a second flight starts behind the last dense op.
    """

    tap: int
    num_dense_ops: int
    second_gate: bool = False

    @property
    def num_slots(self) -> int:
        """Places behind the tap where experts may run."""
        return self.num_dense_ops - self.tap + 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the experts of one group run.

    Attributes:
        slots: for each token chunk, the place behind the tap where its experts run: before the k-th dense op behind the
            tap (from 1); the last slot lies behind them all. Chunks travel in order, so slots never decrease.
        blocking: every collective is waited for where it starts: the sequential reference.

    Raises:
        ValueError: for no chunk, a slot below 1, or a chunk before the one that travels ahead of it.
    """

    slots: tuple[int, ...]
    blocking: bool = False

    def __post_init__(self) -> None:
        if not self.slots or self.slots[0] < 1 or list(self.slots) != sorted(self.slots):
            raise ValueError(f"a plan needs slots from 1 that never decrease, one for each chunk: not {self.slots}")

    @property
    def chunks(self) -> int:
        """Number of token chunks."""
        return len(self.slots)

    def chunks_at(self, slot: int) -> list[int]:
        """The chunks whose experts run at ``slot``."""
        return [chunk for chunk, its_slot in enumerate(self.slots) if its_slot == slot]


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
