"""What ran, when, on this rank: marks of the compute lane and spans of the communication lane. Imports nothing of ours.

Nothing is recorded, and nothing is added to autograd's graph, while nobody listens: then a mark is one look-up, so the
hot path may carry them always. Moments are CUDA events where there is a GPU, and host clock readings elsewhere, where
every operation is done when it returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

BEGIN = "begin"
END = "end"

_listeners: list[Recording] = []


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
    """

    name: str
    index: int
    call: int | None
    group: int
    backward: bool
    time_s: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective, from its launch to its completion, on the communication lane.

    Attributes:
        name, index, call, group, backward: as in ``Mark``.
        start_s: when it was launched, in seconds since the recording began.
        end_s: when it was complete.
        sent_bytes: what this rank sent to other ranks.
    """

    name: str
    index: int
    call: int
    group: int
    backward: bool
    start_s: float
    end_s: float
    sent_bytes: int


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


type _Moment = float | torch.cuda.Event


def _now() -> _Moment:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(slots=True)
class _Flying:
    """A collective whose end is not known yet."""

    name: str
    index: int
    call: int
    group: int
    backward: bool
    start: _Moment
    sent_bytes: int
    end: _Moment | None = None


@dataclass(slots=True)
class Recording:
    """What one listener heard; read it when the recording is over."""

    _began: _Moment = field(default_factory=_now)
    _marks: list[tuple[str, int, int | None, int, bool, _Moment]] = field(default_factory=list)
    _flying: list[_Flying] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    compressions: list[Compression] = field(default_factory=list)

    @property
    def marks(self) -> list[Mark]:
        """All marks in the order in which the host made them. Waits for the GPU."""
        return [
            Mark(name, index, call, group, backward, self._seconds(moment))
            for name, index, call, group, backward, moment in self._marks
        ]

    @property
    def transfers(self) -> list[Transfer]:
        """All collectives that completed, in the order of their launch. Waits for the GPU."""
        return [
            Transfer(
                one.name,
                one.index,
                one.call,
                one.group,
                one.backward,
                self._seconds(one.start),
                self._seconds(one.end),
                one.sent_bytes,
            )
            for one in self._flying
            if one.end is not None
        ]

    def _seconds(self, moment: _Moment) -> float:
        if isinstance(moment, float):
            assert isinstance(self._began, float)
            return moment - self._began
        assert isinstance(self._began, torch.cuda.Event)
        moment.synchronize()
        return self._began.elapsed_time(moment) / 1e3


@contextmanager
def recording() -> Iterator[Recording]:
    """Listen for the time of a ``with`` block; what it yields fills as things happen."""
    recorded = start()
    try:
        yield recorded
    finally:
        stop(recorded)


def start() -> Recording:
    """Listen until ``stop`` is called with what this returns."""
    recorded = Recording()
    _listeners.append(recorded)
    return recorded


def stop(recorded: Recording) -> None:
    """End a recording."""
    _listeners[:] = [listener for listener in _listeners if listener is not recorded]


def _nothing(_work: dist.Work) -> None: ...


class Marker:
    """Makes the marks of one span.

    Args:
        group: index of its first group over the whole model.
    """

    def __init__(self, group: int) -> None:
        self.group = group

    def now(self, name: str, index: int = 0, *, call: int | None = None, backward: bool = False) -> None:
        """A step begins here."""
        if _listeners:
            moment = _now()
            for recorded in _listeners:
                recorded._marks.append((name, index, call, self.group, backward, moment))

    def in_backward(self, name: str, output: Tensor, index: int = 0, *, call: int | None = None) -> None:
        """The backward of a step begins when the gradient of its ``output`` is complete."""
        if _listeners and output.requires_grad:
            output.register_hook(lambda _grad: self.now(name, index, call=call, backward=True))

    def moment(self) -> _Moment | None:
        """The moment before a launch, for ``transfer``; None while nobody listens."""
        # A GPU's communication stream waits for what was recorded before the launch, and for nothing behind it: a short
        # transfer may be over before an event that is recorded when the launch has returned.
        return _now() if _listeners else None

    def transfer(
        self,
        work: dist.Work,
        begin: _Moment | None,
        name: str,
        index: int,
        sent_bytes: int,
        *,
        call: int,
        backward: bool,
    ) -> Callable[[dist.Work], None]:
        """A collective was launched at ``begin``, which ``moment`` returned; its end is noted when it comes.

        Returns:
            What is to be called with the collective just before it is waited for.
        """
        if begin is None:
            return _nothing
        flying = _Flying(name, index, call, self.group, backward, begin, sent_bytes)
        for recorded in _listeners:
            recorded._flying.append(flying)

        def landed(_future: torch.futures.Future[list[Tensor]]) -> None:
            flying.end = _now()

        def listen(work: dist.Work) -> None:  # which must not be kept alive from here: it holds what arrives
            work.get_future().then(landed)

        # Under NCCL a listener is called at once, on a stream that waits for the transfer. Where CUDA has one queue,
        # what is launched behind that waits, too: so what is to hide the transfer has to be launched before.
        if torch.cuda.is_available():
            return listen
        listen(work)
        return _nothing

    def load(self, probs: Tensor, routing_map: Tensor, choices: int | None, *, part: int = 0) -> None:
        """A routing was made. Only what gradients will flow through counts: neither evaluation nor, under full
        recompute, the first of two equal forwards.

        Args:
            probs: gate weights after capacity, [n, e].
            routing_map: which expert gets which token, after capacity, bool, [n, e].
            choices: experts that the router chose for each token, before capacity; None where it drops none.
            part: which group of the span routed.
        """
        if _listeners and torch.is_grad_enabled():
            # Rows that pad an expert to its capacity have no weight: they are not load.
            tokens_per_expert = (routing_map & (probs > 0)).sum(dim=0)
            kept = tokens_per_expert.sum()
            dropped = torch.zeros_like(kept) if choices is None else probs.shape[0] * choices - kept
            load = Load(self.group, part, tokens_per_expert, dropped)
            for recorded in _listeners:
                recorded.loads.append(load)

    def compression(self, rows: Tensor, centroids: Tensor, ids: Tensor, sizes: Tensor) -> None:
        """Rows were clustered. What counts is what counts for ``load``.

        Args:
            rows: [n, h].
            centroids: that travel in their place, [m, h].
            ids: centroid of each row, [n].
            sizes: rows of each centroid, at least m of them.
        """
        if _listeners and torch.is_grad_enabled() and rows.shape[0]:
            with torch.no_grad():
                norms = torch.linalg.vector_norm(rows - centroids[ids], dim=-1, dtype=torch.float32)
                residual = (norms / torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)).nan_to_num().mean()
            one = Compression(self.group, rows.shape[0], centroids.shape[0], sizes.max(), residual)
            for recorded in _listeners:
                recorded.compressions.append(one)
