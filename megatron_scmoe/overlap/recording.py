"""What one listener heard of a step, and when this rank's GPU may have had nothing to do.

Moments are CUDA events where there is a GPU, and host clock readings elsewhere, where every operation is done when it
returns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_scmoe.overlap.spans import Interval

WAKE_S = 50e-6
"""A host that waits for an event sees within this time that the device is there."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The begin of one step on this rank's compute lane; it lasts until the next mark of its group and direction.

    Attributes:
        name: what begins, e.g. ``"start dispatch"``, or ``BEGIN`` and ``END`` of a group's pass.
        index: which dense op, or which token chunk.
        call: number of the routed call whose step it is; None for the others.
        group: whose step it is, counted over the whole model; of a span, its first one.
        backward: whether it is the backward of that step.
        time_s: seconds since the recording began.
        host_s: when the host was there, in seconds by its own clock.
    """

    name: str
    index: int
    call: int | None
    group: int
    backward: bool
    time_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective, from its launch to its completion, on the communication lane.

    Attributes:
        name, index, call, group, backward: as in ``Mark``.
        start_s: when it was launched, in seconds since the recording began.
        end_s: when it was complete.
        sent_bytes: what this rank sent to other ranks.
        plain_bytes: what the same rows would have taken in their own type.
    """

    name: str
    index: int
    call: int
    group: int
    backward: bool
    start_s: float
    end_s: float
    sent_bytes: int
    plain_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """How evenly one routing spread this rank's tokens.

    Attributes:
        group: whose routing it is; of a span, its first one.
        part: which group of the span.
        tokens_per_expert: tokens of this rank that each expert of the model gets, after capacity.
        dropped: tokens' choices that capacity dropped.
    """

    group: int
    part: int
    tokens_per_expert: Tensor
    dropped: Tensor


@dataclass(frozen=True, slots=True)
class Compression:
    """How alike the rows of one flight were, and what of them did not travel.

    Attributes:
        group: whose flight it was.
        rows: tokens' choices.
        clusters: rows that travelled in their place.
        largest: rows of the largest cluster.
        residual: mean over the rows of the residual's norm relative to the row's.
    """

    group: int
    rows: int
    clusters: int
    largest: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """A place in the order of a stream's work.

    Attributes:
        host_s: when the host was there, by its own clock; the device gets there later.
        event: that the device gets to; None without a GPU.
    """

    host_s: float
    event: torch.cuda.Event | None

    @classmethod
    def now(cls) -> Moment:
        """Behind all that was launched into the current stream."""
        if not torch.cuda.is_available():
            return cls(time.perf_counter(), None)
        event = torch.cuda.Event(enable_timing=True)
        moment = cls(time.perf_counter(), event)  # read before, so that no event is reached before its host_s
        event.record()
        return moment


@dataclass(slots=True)
class Flying:
    """A collective whose end is not known yet; the attributes are those of ``Transfer``."""

    name: str
    index: int
    call: int
    group: int
    backward: bool
    start: Moment
    sent_bytes: int
    plain_bytes: int
    end: Moment | None = None


@dataclass(frozen=True, slots=True)
class _End:
    """Where a recording ended, and by the host's clock when the host saw that the device was there."""

    moment: Moment
    seen_s: float


type Step = tuple[str, int, int | None, int, bool]
"""What begins at a mark: the fields of ``Mark`` up to its time."""


@dataclass(slots=True)
class Recording:
    """What one listener heard; read it when the recording is over."""

    _began: Moment = field(default_factory=Moment.now)
    _lane: list[tuple[Step | None, Moment]] = field(default_factory=list)
    _flying: list[Flying] = field(default_factory=list)
    _end: _End | None = None
    _lane_s: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    compressions: list[Compression] = field(default_factory=list)

    def reach(self, step: Step | None, moment: Moment) -> None:
        """The host comes to a moment of the compute lane: ``step`` begins, or all of one is launched."""
        self._lane.append((step, moment))

    def launch(self, flying: Flying) -> None:
        """A collective is under way."""
        self._flying.append(flying)

    def end(self) -> None:
        """Nothing more is heard. Waits until the GPU is here, the one time that a recording waits for it."""
        moment = Moment.now()
        if moment.event is not None:
            moment.event.synchronize()
        self._end = _End(moment, time.perf_counter())

    @property
    def marks(self) -> list[Mark]:
        """All marks in the order in which the host made them."""
        return [
            Mark(*step, time_s, moment.host_s)
            for (step, moment), time_s in zip(self._lane, self._lane_times(), strict=True)
            if step is not None
        ]

    @property
    def transfers(self) -> list[Transfer]:
        """All collectives that completed, in the order of their launch."""
        found = []
        for one in self._flying:
            if one.end is not None:
                if one.end.event is not None and not one.end.event.query():
                    one.end.event.synchronize()  # on a stream of its own, which nothing of the compute lane waits for
                times, nbytes = (self._seconds(one.start), self._seconds(one.end)), (one.sent_bytes, one.plain_bytes)
                found.append(Transfer(one.name, one.index, one.call, one.group, one.backward, *times, *nbytes))
        return found

    @property
    def idle(self) -> list[Interval] | None:
        """When the compute lane may have had nothing enqueued, as disjoint intervals in order; None without a GPU.

        From when the device is at a moment until the host is at the next one, what lies between the two may not have
        been launched yet, so that the lane may be empty. From then on it is not: the device has yet to get to the next
        moment. So the lane was never empty outside of these intervals. Within one it may have worked for a while:
        kernels that were launched one by one, each just in time, are not told from none.
        """
        if self._began.event is None:
            return None
        began_s = self._device_began_s()
        found = []
        for reached_s, (_, following) in zip(self._lane_times(), self._lane[1:], strict=False):
            launched_s = following.host_s - began_s
            if reached_s < launched_s:
                found.append((reached_s, launched_s))
        return found

    def _device_began_s(self) -> float:
        """The host's clock when the device was where the recording begins: an early reading rather than a late one.

        It was there early enough for no moment to be reached before the host was there, and for the end not to be seen
        before it was reached. Where the lane ran dry the first bound is exact but for a launch, else the second one but
        for the host's waking.
        """
        assert self._end is not None, "a recording is read when it is over"
        end_s = self._seconds(self._end.moment)
        reached = zip((moment.host_s for _, moment in self._lane), self._lane_times(), strict=True)
        bounds = [self._began.host_s, self._end.moment.host_s - end_s, self._end.seen_s - end_s - WAKE_S]
        return max(*bounds, *(host_s - reached_s for host_s, reached_s in reached))

    def _lane_times(self) -> list[float]:
        """``_seconds`` of the moments of the compute lane, each of which is asked once."""
        self._lane_s += [self._seconds(moment) for _, moment in self._lane[len(self._lane_s) :]]
        return self._lane_s

    def _seconds(self, moment: Moment) -> float:
        """From the begin of the recording to ``moment``, by the device's clock if there is one; it has been there."""
        began, event = self._began, moment.event
        if began.event is None or event is None:
            return moment.host_s - began.host_s
        return began.event.elapsed_time(event) / 1e3
