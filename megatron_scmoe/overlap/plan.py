"""What follows from a plan: the names of a span's steps and their order. Standard library only.

The order follows from the shape and the plan alone, in forward and, mirrored, in backward. ``layers/span.py`` runs that
order, the solver plays it, the tests compare what every rank recorded with it, and ``docs/draw_timeline.py`` draws it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from megatron_scmoe.contracts import Launch, Plan, SpanShape

ATTENTION = "attention"
CORE_ATTENTION = "core attention"
MLP = "MLP"
MAMBA = "Mamba"
SHARED_EXPERT = "shared expert"
ADD = "add"
ROUTE = "route"
ENCODE = "encode"
WAIT = "wait"
START_DISPATCH = "start dispatch"
FINISH_DISPATCH = "finish dispatch"
EXPERTS = "experts"
START_COMBINE = "start combine"
FINISH_COMBINE = "finish combine"
DECODE = "decode"
SPREAD = "spread"
GATHER = "gather"

OF_A_CALL = (
    ROUTE, ENCODE, WAIT, START_DISPATCH, FINISH_DISPATCH, EXPERTS, START_COMBINE, FINISH_COMBINE, DECODE,
)  # fmt: skip
"""Steps of a routed call, in their order; all others are dense ops. WAIT, in forward alone, is the host's for the
counts, and all that it does before a launch."""


class Step(NamedTuple):
    """One step of a span.

    Attributes:
        name: what runs: a dense op, the rest of one that is cut (CORE_ATTENTION), or one of ``OF_A_CALL``.
        at: which dense op, or which token chunk.
        call: number of the routed call; None for a dense op.
    """

    name: str
    at: int
    call: int | None = None


def even_slots(num_slots: int, chunks: int) -> tuple[int, ...]:
    """Slots that spread the experts of ``chunks`` chunks evenly over a window."""
    return tuple(max(1, (chunk + 1) * (num_slots + 1) // (chunks + 1)) for chunk in range(chunks))


def even_plan(shape: SpanShape, chunks: int) -> Plan:
    """The plan that spreads the experts of every call evenly over its window: where nothing was measured."""
    return Plan(tuple(even_slots(call.num_slots, chunks) for call in shape.calls))


def sequential_plan(shape: SpanShape, chunks: int = 1) -> Plan:
    """The plan that waits for every collective where it starts: the reference, under which single ops are measured."""
    return Plan(((1,) * chunks,) * len(shape.calls), blocking=True)


def forward_order(op_names: Sequence[str], shape: SpanShape, plan: Plan) -> list[Step]:
    """Steps of a span's forward, in the order of their launch (ScMoE, arXiv 2404.05019, section 3.3).

    Args:
        op_names: names of the ops in order, the ends of the groups among them.
        shape: of the span; ``SpanShape`` says what comes first at one place.
        plan: where the experts run, and dispatches are launched.
    """
    chunks = range(plan.chunks)
    aside, cut = shape.launched_aside(plan.launch), shape.cut
    steps: list[Step] = []
    for place, name in enumerate(op_names):
        late = shape.landing_before(place)
        for call in late:
            steps += _experts(shape, plan, call, place)
            steps += [Step(half, chunk, call) for chunk in chunks for half in (FINISH_COMBINE, DECODE)]
        for call in shape.tapped_at(place):
            steps.append(Step(ROUTE, 0, call))
            for chunk in chunks:
                steps.append(Step(ENCODE, chunk, call))
                if call not in aside:
                    steps += _launch(call, chunk)
        for call in range(len(shape.calls)):
            if call not in late:
                steps += _experts(shape, plan, call, place)
        for call in shape.landing_in(place):
            steps += [Step(half, chunk, call) for chunk in chunks for half in (FINISH_COMBINE, DECODE)]
        op, rest = [Step(name, place)], [Step(CORE_ATTENTION, place)] * (place in cut)
        here = aside.intersection(shape.tapped_at(place))
        launches = [step for call in here for chunk in chunks for step in _launch(call, chunk)]
        steps += op + launches + rest if plan.launch is Launch.WITHIN else op + rest + launches
    return steps


def backward_order(op_names: Sequence[str], shape: SpanShape, plan: Plan) -> list[Step]:
    """Steps of the same span's backward: the mirror image, in which a finish starts and a start finishes.

    Where forward launches a dispatch makes no difference: backward waits for its gradient where it was packed.
    """
    steps = forward_order(op_names, shape, replace(plan, launch=Launch.BEFORE))
    only_forward = (WAIT, CORE_ATTENTION)
    return [step._replace(name=_mirrored(step.name)) for step in reversed(steps) if step.name not in only_forward]


def _launch(call: int, chunk: int) -> list[Step]:
    start = Step(START_DISPATCH, chunk, call)
    return [start] if chunk else [Step(WAIT, 0, call), start]


def _experts(shape: SpanShape, plan: Plan, call: int, place: int) -> Iterator[Step]:
    for chunk, slot in enumerate(plan.slots[call]):
        if shape.calls[call].tap + slot - 1 == place:
            for name in (FINISH_DISPATCH, EXPERTS, START_COMBINE):
                yield Step(name, chunk, call)


def _mirrored(name: str) -> str:
    if "start " in name:
        return name.replace("start ", "finish ")
    return name.replace("finish ", "start ")
