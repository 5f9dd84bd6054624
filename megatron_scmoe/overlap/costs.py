"""From the marks and transfers of a step to a timeline of every span's passes, and to what its ops and calls cost.

A pass is one forward or backward of one span. Marks follow one another on the compute lane, so each lasts until the
next one; what a rank waits for is no computation, and is left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from statistics import fmean, median

from megatron_scmoe.contracts import SpanShape, TransferName
from megatron_scmoe.overlap.launch import ONCE
from megatron_scmoe.overlap.observe import BEGIN, END
from megatron_scmoe.overlap.plan import (
    CORE_ATTENTION,
    DECODE,
    ENCODE,
    EXPERTS,
    FINISH_COMBINE,
    FINISH_DISPATCH,
    GATHER,
    SPREAD,
    START_COMBINE,
    START_DISPATCH,
    WAIT,
)
from megatron_scmoe.overlap.recording import Mark, Recording, Transfer
from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts
from megatron_scmoe.overlap.spans import Interval, Lane, Span

# Packing precedes a start, but for what precedes a launch that was announced, and unpacking follows a finish: here are
# the ops that they belong to, in each direction.
_OP_OF = {
    False: {START_DISPATCH: WAIT, FINISH_DISPATCH: EXPERTS, START_COMBINE: EXPERTS, FINISH_COMBINE: DECODE},
    True: {START_COMBINE: DECODE, FINISH_COMBINE: EXPERTS, START_DISPATCH: EXPERTS, FINISH_DISPATCH: ENCODE},
}


_INSIDE = (SPREAD, GATHER)
"""Transfers inside a node, which are waited for where they start: their time is that of the experts."""


@dataclass(frozen=True, slots=True)
class GroupPass:
    """One forward or backward of one span.

    Attributes:
        group: index of its first group over the whole model.
        backward: which of the two.
        spans: computation and communication; computation without what it waited for.
        total_s: from the first op to the end of the last one, waiting included.
        sent_bytes: what this rank sent to other ranks.
        idle: when the compute lane may have had nothing enqueued (``Recording.idle``); None without a GPU.
        enqueue_s: what the host took for each dense op: on a GPU to enqueue it, else to compute it.
        enqueue_core_s: the part of it from the core attention on, of ops that are cut there.
        sent_by: ``sent_bytes`` of each transfer, without hops inside a node.
        plain_by: what these would be if no codec rounded.
    """

    group: int
    backward: bool
    spans: tuple[Span, ...]
    total_s: float
    sent_bytes: int
    idle: tuple[Interval, ...] | None = None
    enqueue_s: Mapping[int, float] = field(default_factory=dict)
    enqueue_core_s: Mapping[int, float] = field(default_factory=dict)
    sent_by: Mapping[str, int] = field(default_factory=dict)
    plain_by: Mapping[str, int] = field(default_factory=dict)


def passes_of(recording: Recording) -> list[GroupPass]:
    """The complete passes of one training step, in the order of their begin; evaluation behind it is left out.

    Args:
        recording: of a step; its forwards after the last backward are not part of training.
    """
    marks, idle = recording.marks, recording.idle
    last_backward = max((index for index, mark in enumerate(marks) if mark.backward), default=len(marks))
    transfers: dict[tuple[int, bool], list[Transfer]] = defaultdict(list)
    for transfer in recording.transfers:
        transfers[transfer.group, transfer.backward].append(transfer)
    open_passes: dict[tuple[int, bool], list[Mark]] = {}
    passes: list[GroupPass] = []
    for mark in marks[: last_backward + 1]:
        key = mark.group, mark.backward
        if mark.name == BEGIN:
            open_passes[key] = []  # one that never ended, where no gradient reached the span's input, is dropped
        if key not in open_passes:
            continue
        open_passes[key].append(mark)
        if mark.name == END:
            passes.append(_group_pass(open_passes.pop(key), transfers[key], idle))
    return passes


def _group_pass(marks: Sequence[Mark], transfers: Iterable[Transfer], idle: Sequence[Interval] | None) -> GroupPass:
    first, last = marks[0], marks[-1]
    all_ = [t for t in transfers if first.time_s <= t.start_s <= last.time_s]
    mine = {(t.name, t.index, t.call): t for t in all_ if t.name not in _INSIDE}
    spans = [_computation(mark, following.time_s, mine) for mark, following in pairwise(marks) if mark.name != BEGIN]
    # Events of two GPU streams compare to half a microsecond or so: what took no time may seem to end before its begin,
    # and a negative cost would stop this rank while the others wait for it.
    spans += [
        Span(t.name, Lane.COMMUNICATION, t.start_s, max(t.start_s, t.end_s), t.backward, t.index, t.call)
        for t in mine.values()
    ]
    dense = [pair for pair in pairwise(marks) if pair[0].call is None and pair[0].name != BEGIN]
    return GroupPass(
        first.group,
        first.backward,
        tuple(spans),
        total_s=last.time_s - first.time_s,
        sent_bytes=sum(t.sent_bytes for t in all_),
        idle=None if idle is None else tuple(_beginning_within(first.time_s, last.time_s, idle)),
        enqueue_s=_host_s(dense),
        enqueue_core_s=_host_s([pair for pair in dense if pair[0].name == CORE_ATTENTION]),
        sent_by=_by_transfer((t, t.sent_bytes) for t in mine.values()),
        plain_by=_by_transfer((t, t.plain_bytes) for t in mine.values()),
    )


def _by_transfer(counted: Iterable[tuple[Transfer, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for transfer, nbytes in counted:
        total[TransferName.of(transfer.name, backward=transfer.backward)] += nbytes
    return dict(total)


def _host_s(pairs: Iterable[tuple[Mark, Mark]]) -> dict[int, float]:
    """From a mark to the one behind it, by the host's clock, of each op."""
    total_s: dict[int, float] = defaultdict(float)
    for mark, following in pairs:
        total_s[mark.index] += following.host_s - mark.host_s
    return total_s


def _beginning_within(start_s: float, end_s: float, intervals: Sequence[Interval]) -> Sequence[Interval]:
    """Those of disjoint ``intervals`` in order that begin from ``start_s`` on and before ``end_s``."""
    return intervals[bisect_left(intervals, (start_s,)) : bisect_left(intervals, (end_s,))]


def _computation(mark: Mark, end_s: float, transfers: Mapping[tuple[str, int, int], Transfer]) -> Span:
    """The part of a step that is computation: packing before a launch, unpacking behind an arrival, or all of it."""
    start_s = mark.time_s
    half, _, collective = mark.name.partition(" ")
    transfer = None if mark.call is None else transfers.get((collective, mark.index, mark.call))
    if transfer and half == "start":
        end_s = max(start_s, min(end_s, transfer.start_s))  # a launch aside may begin before this lane comes by
    if transfer and half == "finish":
        start_s = min(end_s, max(start_s, transfer.end_s))
    return Span(mark.name, Lane.COMPUTE, start_s, end_s, mark.backward, mark.index, mark.call)


def costs_of(passes: Sequence[GroupPass], shape: SpanShape, chunks: int) -> SpanCosts | None:
    """What one span costs, from passes under a blocking plan of ``chunks`` chunks; None without a whole step.

    Costs are medians over the passes.
    """
    forward = [one for one in passes if not one.backward]
    backward = [one for one in passes if one.backward]
    if not forward or not backward:
        return None
    return SpanCosts(
        forward=pass_costs_of(forward, shape, chunks),
        backward=pass_costs_of(backward, shape, chunks),
        forward_runs=len(forward) / len(backward),
    )


def pass_costs_of(passes: Sequence[GroupPass], shape: SpanShape, chunks: int) -> PassCosts:
    """What one direction of one span costs, as the median over its passes."""
    return _combined([_pass_costs(one, shape, chunks) for one in passes], median)


def mean_costs(costs: Sequence[SpanCosts]) -> SpanCosts:
    """The mean over ranks."""
    return SpanCosts(
        forward=_combined([one.forward for one in costs], fmean),
        backward=_combined([one.backward for one in costs], fmean),
        forward_runs=fmean(one.forward_runs for one in costs),
    )


def _pass_costs(one: GroupPass, shape: SpanShape, chunks: int) -> PassCosts:
    ops = [0.0] * shape.num_ops
    cores = {} if one.backward else dict.fromkeys(shape.cut, 0.0)
    calls: list[dict[str, float]] = [defaultdict(float) for _ in shape.calls]
    for span in one.spans:
        seconds = span.end_s - span.start_s
        if span.call is None:
            ops[span.at] += seconds
            if span.name == CORE_ATTENTION:
                cores[span.at] += seconds
        else:
            calls[span.call][_OP_OF[one.backward].get(span.name, span.name)] += seconds
    if not one.backward:
        for call, its in zip(shape.calls, calls, strict=True):
            its["enqueue"] = one.enqueue_s.get(call.tap, 0.0)
            its["enqueue_core"] = one.enqueue_core_s.get(call.tap, 0.0)
    cut = {field.name: 1 if field.name in ONCE else chunks for field in fields(CallCosts)}
    costs = tuple(CallCosts(**{op: call[op] / cut[op] for op in cut}) for call in calls)
    return PassCosts(ops=tuple(ops), calls=costs, cores=cores)


def _combined(costs: Sequence[PassCosts], average: Callable[[Iterable[float]], float]) -> PassCosts:
    ops = tuple(average(seconds) for seconds in zip(*(one.ops for one in costs), strict=True))
    calls = tuple(
        CallCosts(**{field.name: average([getattr(call, field.name) for call in same]) for field in fields(CallCosts)})
        for same in zip(*(one.calls for one in costs), strict=True)
    )
    cores = {place: average([one.cores[place] for one in costs]) for place in costs[0].cores}
    return PassCosts(ops=ops, calls=calls, cores=cores)
