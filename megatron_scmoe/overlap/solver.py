"""From measured costs to the plan with the smallest predicted time. Pure, standard library only.

The model: a compute lane that does a span's work in the order the plan gives, and a communication lane that carries
collectives in the order of their launch. For two chunks at slots 1 and 2 behind tap 0::

    compute        route encode encode | experts | op 0 | experts | op 1 ... | decode decode | end
    communication               dispatch dispatch   combine          combine

ScMoE's own rule (arXiv 2404.05019, section 3.3) is the case of one chunk and forward only: it takes the slot with the
smallest ``|before - dispatch| + |after - combine|``, where ``before`` and ``after`` are the dense times between the tap
and the experts and behind the experts. The time predicted here is a constant + ``max(before, dispatch)`` +
``max(after, combine)``. As ``max(a, b) = (a + b + |a - b|) / 2`` and ``before + after`` is the same at every slot, both
are smallest at the same slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from megatron_scmoe.contracts import Launch, Plan, SpanShape
from megatron_scmoe.overlap.launch import gained_s, launched_s
from megatron_scmoe.overlap.plan import (
    CORE_ATTENTION,
    START_DISPATCH,
    WAIT,
    Step,
    backward_order,
    forward_order,
)
from megatron_scmoe.overlap.search import Search
from megatron_scmoe.overlap.spans import Lane, Span, communication_s, exposed_s, hidden_share

TIE = 1e-9
"""Plans whose predicted times differ by less than this part count as equal: far above rounding, far below measuring."""

MAX_STEPS = 16_000
"""How much is searched for a solution, in all chunk counts together: less than a second's worth, but counted, so that
the plan does not depend on the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCosts:
    """What one direction of one routed call costs at one chunk count, in seconds.

    Attributes:
        route: choosing the experts, once for all chunks.
        encode: projecting one chunk's tokens to latents, where experts read these, sorting them by expert and packing.
        dispatch: carrying one chunk to its experts.
        experts: the experts on one chunk.
        combine: carrying one chunk's results back.
        decode: unpacking and weighing one chunk's results, projecting them back, and adding them where they land late.
        wait: before the first launch, where the host waits for the counts of all chunks; in forward alone.
        enqueue: what the host takes for the op at the tap; in forward alone.
        enqueue_core: part of that, from its core attention on, where the op is cut there.
    """

    route: float
    encode: float
    dispatch: float
    experts: float
    combine: float
    decode: float
    wait: float = 0.0
    enqueue: float = 0.0
    enqueue_core: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """What one direction of one span costs at one chunk count, in seconds.

    Attributes:
        ops: each op, in forward order, the ends of the groups among them.
        calls: each routed call.
        cores: part of the ops that are cut, by their index: from their core attention on; in forward alone.

    Raises:
        ValueError: for a cost that is no finite number from 0.
    """

    ops: tuple[float, ...]
    calls: tuple[CallCosts, ...]
    cores: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [(f"op {index}", seconds) for index, seconds in enumerate(self.ops)]
        named += [(f"core of op {index}", seconds) for index, seconds in self.cores.items()]
        named += [(f"{op} of call {n}", s) for n, call in enumerate(self.calls) for op, s in asdict(call).items()]
        for name, seconds in named:
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"cost of {name} is {seconds} s: a cost is a finite number from 0")

    def seconds(self, step: Step) -> float:
        """What a step costs on the lane that it occupies; a start or finish is that of its collective."""
        if step.call is None:
            core = self.cores.get(step.at, 0.0)
            return core if step.name == CORE_ATTENTION else self.ops[step.at] - core
        return getattr(self.calls[step.call], step.name.removeprefix("start ").removeprefix("finish "))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCosts:
    """What one span costs at one chunk count.

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
        predicted_s: time of the span's passes.
        hidden_share: part of the communication that runs beside computation.
        exact: whether it is proven that no plan is faster.
    """

    plan: Plan
    predicted_s: float
    hidden_share: float
    exact: bool


def solve(
    shape: SpanShape, costs: Mapping[int, SpanCosts], *, forward_only: bool = False, max_steps: int = MAX_STEPS
) -> Solution:
    """The plan with the smallest predicted time (``search.py`` says how it is found).

    Of plans whose times differ by less than ``TIE`` it takes the one with the fewest chunks, among those one that
    launches before the ops at the taps, or else within them, and among those the earliest slots, compared call by call
    and chunk by chunk: rounding does not decide.

    Args:
        shape: the span.
        costs: what the span costs at each chunk count that may be chosen.
        forward_only: choose for evaluation, where no backward follows.
        max_steps: how much is searched, in all chunk counts together.
    """
    searches = [
        Search(shape, costs[chunks], chunks, forward_only=forward_only, launch=launch)
        for chunks in sorted(costs)
        for launch in Launch
        if launch is Launch.BEFORE or _gains(shape, costs[chunks].forward, launch)
    ]
    chosen, limit_s, steps = searches[0], math.inf, max_steps
    for number, search in enumerate(searches):
        if search.least_s < limit_s:
            in_question = sum(other.least_s < limit_s for other in searches[number:])
            search.find(limit_s, TIE, steps // in_question)
            steps -= search.steps
            if search.fastest_s < limit_s:
                chosen, limit_s = search, search.fastest_s / (1 + TIE)
    plan = chosen.earliest(chosen.fastest_s * (1 + TIE))
    its_costs = costs[plan.chunks]
    return Solution(
        plan,
        predicted_s(shape, its_costs, plan, forward_only=forward_only),
        predicted_hidden_share(shape, its_costs, plan, forward_only=forward_only),
        all(search.exact for search in searches),
    )


def _gains(shape: SpanShape, costs: PassCosts, launch: Launch) -> bool:
    return gained_s(costs, shape, launch) > TIE * sum(costs.ops)


def predicted_s(shape: SpanShape, costs: SpanCosts, plan: Plan, *, forward_only: bool = False) -> float:
    """Time of the span's passes under a plan: forward and backward, or one forward.

    Args:
        shape: the span.
        costs: what it costs at the plan's chunk count.
        plan: where the experts run.
        forward_only: leave backward out.
    """
    forward_s = _time_of_pass(shape, costs.forward, plan, backward=False)
    if forward_only:
        return forward_s
    return costs.training_s(forward_s, _time_of_pass(shape, costs.backward, plan, backward=True))


def predicted_hidden_share(shape: SpanShape, costs: SpanCosts, plan: Plan, *, forward_only: bool = False) -> float:
    """Part of the communication that runs beside computation under a plan; the arguments of :func:`predicted_s`."""
    forward = schedule(shape, costs.forward, plan, backward=False)
    exposed, communication = exposed_s(forward), communication_s(forward)
    if not forward_only:
        backward = schedule(shape, costs.backward, plan, backward=True)
        exposed = costs.training_s(exposed, exposed_s(backward))
        communication = costs.training_s(communication, communication_s(backward))
    return hidden_share(exposed, communication)


def schedule(shape: SpanShape, costs: PassCosts, plan: Plan, *, backward: bool) -> list[Span]:
    """The simulated timeline of one pass, from 0 seconds, in the order of launch.

    Args:
        shape: the span.
        costs: those of this direction at the plan's chunk count.
        plan: where the experts run.
        backward: the mirror image of forward: the last step first, collectives in the other direction.
    """
    return [
        Span(name, lane, start_s, end_s, backward, at, call)
        for (name, at, call), lane, start_s, end_s in _play(shape, costs, plan, backward=backward)
    ]


def _play(
    shape: SpanShape, costs: PassCosts, plan: Plan, *, backward: bool
) -> Iterator[tuple[Step, Lane, float, float]]:
    """Every op and collective of a pass with its lane, start and end."""
    assert shape.has(plan), (plan, shape)
    steps = (backward_order if backward else forward_order)(["op"] * shape.num_ops, shape, plan)
    aside_s = launched_s(costs, shape, plan.launch)
    compute_free_s = communication_free_s = op_start_s = 0.0
    arrival_s: dict[Step, float] = {}
    launch_s: dict[int | None, float] = {}  # of calls that are not launched before the op at their tap
    for step in steps:
        half, _, collective = step.name.partition(" ")
        if half == "start":
            carried = step._replace(name=collective)
            ready_s = launch_s.get(step.call, compute_free_s) if step.name == START_DISPATCH else compute_free_s
            sent_s = max(ready_s, communication_free_s)
            communication_free_s = arrival_s[carried] = sent_s + costs.seconds(step)
            yield carried, Lane.COMMUNICATION, sent_s, communication_free_s
            if plan.blocking:
                compute_free_s = max(compute_free_s, communication_free_s)
        elif half == "finish":
            compute_free_s = max(compute_free_s, arrival_s[step._replace(name=collective)])
        else:
            start_s, compute_free_s = compute_free_s, compute_free_s + costs.seconds(step)
            if step.call is None and step.name != CORE_ATTENTION:
                op_start_s = start_s
            if step.name == WAIT and step.call in aside_s:
                launch_s[step.call] = op_start_s + aside_s[step.call]
                compute_free_s = max(start_s, launch_s[step.call])
            yield step, Lane.COMPUTE, start_s, compute_free_s


def _time_of_pass(shape: SpanShape, costs: PassCosts, plan: Plan, *, backward: bool) -> float:
    return max(end_s for _, _, _, end_s in _play(shape, costs, plan, backward=backward))
