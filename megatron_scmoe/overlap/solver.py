"""From measured costs to the plan with the smallest predicted time. Pure, standard library only.

The model: a compute lane that does a group's work in the order the plan gives, and a communication lane that carries
collectives in the order of their launch. For two chunks at slots 1 and 2 behind tap 0::

    compute        route encode encode | experts | dense 0 | experts | dense 1 ... | decode decode tail
    communication               dispatch dispatch   combine             combine

ScMoE's own rule (arXiv 2404.05019, section 3.3) is the case of one chunk and forward only: it takes the slot with the
smallest ``|before - dispatch| + |after - combine|``, where ``before`` and ``after`` are the dense times between the tap
and the experts and behind the experts. The time predicted here is a constant + ``max(before, dispatch)`` +
``max(after, combine)``. As ``max(a, b) = (a + b + |a - b|) / 2`` and ``before + after`` is the same at every slot, both
are smallest at the same slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, auto
from itertools import combinations_with_replacement
from typing import NamedTuple

from megatron_scmoe.contracts import GroupShape, Plan
from megatron_scmoe.overlap.plan import CURRENT
from megatron_scmoe.overlap.spans import Lane, Span, communication_s, exposed_s, hidden_share

TIE = 1e-9
"""Plans whose predicted times differ by less than this part count as equal: far above rounding, far below measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """What one direction of one group costs at one chunk count, in seconds.

    Attributes:
        dense: each op of the dense stream, in forward order.
        route: choosing the experts, once for all chunks.
        encode: sorting one chunk's tokens by expert and packing them.
        dispatch: carrying one chunk to its experts.
        experts: the experts on one chunk.
        combine: carrying one chunk's results back.
        decode: unpacking and weighing one chunk's results.
        tail: what follows the last decode.
    """

    dense: tuple[float, ...]
    route: float
    encode: float
    dispatch: float
    experts: float
    combine: float
    decode: float
    tail: float

    def __post_init__(self) -> None:
        for name, seconds in self.by_name().items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"cost of {name} is {seconds} s: a cost is a finite number from 0")

    def by_name(self) -> dict[str, float]:
        """Seconds of each op by its name in a schedule."""
        dense = {_dense(index): seconds for index, seconds in enumerate(self.dense)}
        return dense | {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dense"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCosts:
    """What one group costs at one chunk count.

    Attributes:
        forward: the forward pass, once.
        backward: the backward pass.
        forward_runs: forward passes for each backward pass: 2 under full recompute.
    """

    forward: PassCosts
    backward: PassCosts
    forward_runs: float = 1.0

    def training_s(self, forward_s: float, backward_s: float) -> float:
        """Time of a training step's passes from that of each."""
        return self.forward_runs * forward_s + backward_s


@dataclass(frozen=True, slots=True)
class Solution:
    """The best plan and what it is expected to give.

    Attributes:
        plan: the plan.
        predicted_s: time of the group's passes.
        hidden_share: part of the communication that runs beside computation.
    """

    plan: Plan
    predicted_s: float
    hidden_share: float


def candidate_plans(shape: GroupShape, chunk_counts: Iterable[int]) -> Iterator[Plan]:
    """Every plan with these chunk counts, in the order given: of each count the earlier slots first."""
    for num_chunks in chunk_counts:
        for slots in combinations_with_replacement(range(1, shape.num_slots + 1), num_chunks):
            yield Plan(slots=slots)


def solve(shape: GroupShape, costs: Mapping[int, GroupCosts], *, forward_only: bool = False) -> Solution:
    """The plan with the smallest predicted time, by trying all.

    Of plans whose times differ by less than ``TIE`` it takes the one with the fewest chunks and, among those, the
    earliest slots, compared chunk by chunk: rounding does not decide.

    Args:
        shape: the group.
        costs: what the group costs at each chunk count that may be chosen.
        forward_only: choose for evaluation, where no backward follows.
    """
    predicted = {
        plan: predicted_s(shape, costs[plan.chunks], plan, forward_only=forward_only)
        for plan in candidate_plans(shape, sorted(costs))
    }
    fastest_s = min(predicted.values())
    plan = next(plan for plan, seconds in predicted.items() if seconds <= fastest_s * (1 + TIE))
    share = predicted_hidden_share(shape, costs[plan.chunks], plan, forward_only=forward_only)
    return Solution(plan, predicted[plan], share)


def predicted_s(shape: GroupShape, costs: GroupCosts, plan: Plan, *, forward_only: bool = False) -> float:
    """Time of the group's passes under a plan: forward and backward, or one forward.

    Args:
        shape: the group.
        costs: what it costs at the plan's chunk count.
        plan: where the experts run.
        forward_only: leave backward out.
    """
    steps = _forward_steps(shape, plan)
    forward_s = _time_of_pass(steps, costs.forward, plan)
    if forward_only:
        return forward_s
    return costs.training_s(forward_s, _time_of_pass(_mirrored(steps), costs.backward, plan))


def predicted_hidden_share(shape: GroupShape, costs: GroupCosts, plan: Plan, *, forward_only: bool = False) -> float:
    """Part of the communication that runs beside computation under a plan; the arguments of :func:`predicted_s`."""
    forward = schedule(shape, costs.forward, plan, backward=False)
    exposed, communication = exposed_s(forward), communication_s(forward)
    if not forward_only:
        backward = schedule(shape, costs.backward, plan, backward=True)
        exposed = costs.training_s(exposed, exposed_s(backward))
        communication = costs.training_s(communication, communication_s(backward))
    return hidden_share(exposed, communication)


def schedule(shape: GroupShape, costs: PassCosts, plan: Plan, *, backward: bool) -> list[Span]:
    """The simulated timeline of one pass, from 0 seconds, in the order of launch.

    Args:
        shape: the group.
        costs: those of this direction at the plan's chunk count.
        plan: where the experts run.
        backward: the mirror image of forward: the last step first, collectives in the other direction.
    """
    steps = _forward_steps(shape, plan)
    return [
        Span(CURRENT + step.op if step.current else step.op, lane, start_s, end_s, backward, step.chunk)
        for step, lane, start_s, end_s in _play(_mirrored(steps) if backward else steps, costs, plan)
    ]


class _Action(Enum):
    RUN = auto()
    LAUNCH = auto()
    WAIT = auto()


class _Step(NamedTuple):
    """What the compute lane does next: runs an op, launches a collective or waits for it."""

    action: _Action
    op: str
    chunk: int | None = None
    current: bool = False


_MIRRORED = {_Action.RUN: _Action.RUN, _Action.LAUNCH: _Action.WAIT, _Action.WAIT: _Action.LAUNCH}


def _dense(index: int) -> str:
    return f"dense {index}"


def _forward_steps(shape: GroupShape, plan: Plan) -> list[_Step]:
    """A group's forward in the order of its launch, as the group's own ``forward`` has it."""
    assert all(1 <= slot <= shape.num_slots for slot in plan.slots), (plan, shape)
    chunks = range(plan.chunks)
    flights = (False, True) if shape.second_gate else (False,)
    steps = [_Step(_Action.RUN, _dense(index)) for index in range(shape.tap)]
    steps += _start_steps(chunks, current=False)
    for slot in range(1, shape.num_slots + 1):
        if slot == shape.num_slots and shape.second_gate:
            steps += _start_steps(chunks, current=True)
        steps += _expert_steps(plan.chunks_at(slot), current=False)
        if slot < shape.num_slots:
            steps.append(_Step(_Action.RUN, _dense(shape.tap + slot - 1)))
    if shape.second_gate:
        steps += _expert_steps(chunks, current=True)
    for current in flights:
        for chunk in chunks:
            steps += [_Step(_Action.WAIT, "combine", chunk, current), _Step(_Action.RUN, "decode", chunk, current)]
    return [*steps, _Step(_Action.RUN, "tail")]


def _start_steps(chunks: Iterable[int], *, current: bool) -> Iterator[_Step]:
    yield _Step(_Action.RUN, "route", None, current)
    for chunk in chunks:
        yield _Step(_Action.RUN, "encode", chunk, current)
        yield _Step(_Action.LAUNCH, "dispatch", chunk, current)


def _expert_steps(chunks: Iterable[int], *, current: bool) -> Iterator[_Step]:
    for chunk in chunks:
        yield _Step(_Action.WAIT, "dispatch", chunk, current)
        yield _Step(_Action.RUN, "experts", chunk, current)
        yield _Step(_Action.LAUNCH, "combine", chunk, current)


def _mirrored(steps: Sequence[_Step]) -> list[_Step]:
    return [_Step(_MIRRORED[action], op, chunk, current) for action, op, chunk, current in reversed(steps)]


def _play(steps: Iterable[_Step], costs: PassCosts, plan: Plan) -> Iterator[tuple[_Step, Lane, float, float]]:
    """Every op of the steps with its lane, start and end."""
    seconds = costs.by_name()
    compute_free_s = communication_free_s = 0.0
    arrival_s: dict[tuple[str, int | None, bool], float] = {}
    for step in steps:
        action, op, chunk, current = step
        if action is _Action.RUN:
            start_s, compute_free_s = compute_free_s, compute_free_s + seconds[op]
            yield step, Lane.COMPUTE, start_s, compute_free_s
            continue
        if action is _Action.LAUNCH:
            start_s = max(compute_free_s, communication_free_s)
            communication_free_s = arrival_s[op, chunk, current] = start_s + seconds[op]
            yield step, Lane.COMMUNICATION, start_s, communication_free_s
        if action is _Action.WAIT or plan.blocking:
            compute_free_s = max(compute_free_s, arrival_s[op, chunk, current])


def _time_of_pass(steps: Iterable[_Step], costs: PassCosts, plan: Plan) -> float:
    return max(end_s for _, _, _, end_s in _play(steps, costs, plan))
