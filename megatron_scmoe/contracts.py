"""What the rooms agree on: dense ops, cargo, routed calls, and the plan of a span. The second file to read.

A span is one group, or several neighbouring ones: a list of dense ops and a list of routed calls. A call's tokens
travel as a cargo, in as many chunks as the plan has slots for the call; the layer (``layers/span.py``) makes the cargo,
hands it to the flights (``dispatch/flights.py``) and runs the ops while they fly. Standard library alone where it runs,
so that settings can be checked before torch is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Stream(NamedTuple):
    """What flows through the ops of a span.

    Attributes:
        hidden: the residual stream, [s, b, h].
        shared_input: what the shared expert read, [s, b, h], from then on until the end of its group adds it.
        shared: what it made of it, as long.
        routed: outputs of the calls that land at the end of a group, [s, b, h] each, for that op.
        entry: ``hidden`` as it entered the group, and what has landed since, where an op reads it; else None.
        late_weight: what cg2 weighs routed outputs with that land behind the end of their group, [s, b, 1].
    """

    hidden: Tensor
    shared_input: Tensor | None = None
    shared: Tensor | None = None
    routed: tuple[Tensor, ...] = ()
    entry: Tensor | None = None
    late_weight: Tensor | None = None

    @property
    def newest(self) -> Tensor:
        """What the last op made."""
        return self.hidden if self.shared is None else self.shared


@dataclass(frozen=True, slots=True)
class DenseOp:
    """One op of a span: a residual op, the shared expert, or the end of a group, which adds what is pending.

    Attributes:
        name: what runs, for marks.
        norm: from the stream to the normed tensor that the op, and the calls tapped at it, read, [s, b, h]; None where
            nothing reads one.
        run: ``run(stream, norm(stream), inputs)`` is the stream behind the op; ``inputs`` is what Core hands to every
            block beside it (``mcore.blocks.AttentionInputs``).
        cut: a ``run`` within ``cut(act)`` calls ``act`` once, behind an attention's projections, before its core
            attention; None where there is no such place.
    """

    name: str
    norm: Callable[[Stream], Tensor] | None
    run: Callable[[Stream, Any, Any], Stream]
    cut: Callable[[Callable[[], None]], AbstractContextManager[None]] | None = None


class RowCounts(Protocol):
    """How many rows of a cargo ranks send to one another (``mcore/token_dispatcher.py``)."""

    def split_rows(self, chunk: int) -> tuple[list[int] | None, list[int] | None]:
        """Rows that this rank sends to and receives from each rank of the cargo's group; None for equal parts."""

    def tell(self, dispatcher: MoEAlltoAllTokenDispatcher, chunk: int) -> None:
        """Tell the dispatcher of a flight what arrives."""


class TransferName(StrEnum):
    """The four transfers of a flight: to the experts and back, and the gradients of both."""

    DISPATCH_FORWARD = "dispatch-forward"
    COMBINE_FORWARD = "combine-forward"
    DISPATCH_BACKWARD = "dispatch-backward"
    COMBINE_BACKWARD = "combine-backward"

    @classmethod
    def of(cls, collective: str, *, backward: bool) -> TransferName:
        """That of a ``collective``, "dispatch" or "combine", in one direction."""
        return cls(f"{collective}-{'backward' if backward else 'forward'}")


class Form(Protocol):
    """What travels in the place of rows, and rows again (``codec/rounding.py``); gradients go straight through."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What travels of ``rows`` [n, w]: tensors of n rows each."""

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Rows, [n, w], of ``dtype``, from what arrived of such tensors."""


class Cargo(Protocol):
    """What the flights of one routing carry, a chunk each, of n tokens of width h, of which experts read w.

    w is h, but with --moe-latent-size that of the latents. A cargo is asked in this order::

        (counts of all ranks are exchanged)
        pack ~~ dispatch ~~> unpack -> experts -> collect ~~ combine ~~> deliver ... join

    Attributes:
        group: the ranks that exchange rows: all expert-parallel ones, or one of each node.
        dispatchers: of each chunk's flight.
        apart: whether each tensor of ``pack`` travels as a collective of its own; the same on all ranks.
        forms: in which rows travel, of transfers in which they do not as they are.
    """

    group: ProcessGroup
    dispatchers: list[MoEAlltoAllTokenDispatcher]
    apart: bool
    forms: Mapping[TransferName, Form]

    @property
    def counts(self) -> RowCounts:
        """Of all chunks, on their way since the cargo was made."""

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """What travels to the experts, [rows, ...] each, by expert, or by their ranks or nodes; integers last."""

    def unpack(self, chunk: int, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Rows for the experts, [rows, w], and the weight of each row's output, from what arrived.

        Weights are [rows], or [rows, experts of this rank] where the dispatcher spreads rows to these.
        """

    def collect(self, chunk: int, outputs: Tensor) -> Tensor:
        """What travels back, a row for each that arrived, from what the rows of ``unpack`` became, [rows, w]."""

    def deliver(self, chunk: int, outputs: Tensor) -> Tensor:
        """What can be done at home with the outputs of one chunk, [rows, w], before the others are there."""

    def join(self, delivered: list[Tensor]) -> Tensor:
        """Each token's sum over its experts, in the shape of the tokens, from what all chunks delivered."""


class Flying(Protocol):
    """The tokens of one routed call, announced or on their way since it was made (``dispatch/flights.py``)."""

    def launch(self) -> None:
        """Send off what was only announced."""

    def run_experts(self, slot: int) -> None:
        """Run the experts of the chunks whose slot this is."""

    def finish_combine(self) -> Tensor:
        """Wait for the outputs of every chunk; [s, b, h]."""


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """One routing of a span: what its experts read, and where their output is added.

    Attributes:
        tap: index of the op whose normed input the experts read; their tokens take off just before it.
        landing: index of the op in which the output is added, the end of the call's group; where late, before which.
        late: whether it lands behind the end of its group.
        group: whose call it is, counted from 0 within the span.
    """

    tap: int
    landing: int
    late: bool = False
    group: int = 0

    @property
    def num_slots(self) -> int:
        """Places from the tap to the landing where the experts may run."""
        return self.landing - self.tap + 1


class Launch(StrEnum):
    """Where the dispatches of a call are launched, by the op at its tap."""

    BEFORE = "before"
    """As soon as they are packed, before the op: the transfer begins as early as it can."""
    WITHIN = "within"
    """Between an attention's projections and its core attention: the host has enqueued the former."""
    BEHIND = "behind"
    """Behind the op: the host has enqueued all of it."""


@dataclass(frozen=True, slots=True)
class SpanShape:
    """What a plan has to know of a span.

    At one place, before op p, things have this order: late calls that land there run the experts that are left, and
    land; the calls tapped there take off; experts whose slot this is run, by the number of their call; calls that land
    in op p finish their combine; op p runs; what was tapped there and only announced is launched, within the op or
    behind it.

    Attributes:
        num_ops: ops of the span, the ends of its groups among them.
        calls: in the order of their taps.
        waits_to_pack: whether the host has to know the counts before it can pack, as with a codec, unique tokens, a
            capacity or zero experts: there is nothing to announce then.
        attentions: indices of the ops that have a place within them for a launch, before their core attention.
    """

    num_ops: int
    calls: tuple[RoutedCall, ...]
    waits_to_pack: bool = False
    attentions: frozenset[int] = frozenset()

    def first_call_of(self, part: int) -> int:
        """Number of the first call of the span's group ``part``."""
        return next(number for number, call in enumerate(self.calls) if call.group == part)

    def tapped_at(self, place: int) -> list[int]:
        """Numbers of the calls that take off just before op ``place``."""
        return [number for number, call in enumerate(self.calls) if call.tap == place]

    def landing_before(self, place: int) -> list[int]:
        """Numbers of the late calls whose outputs are added before op ``place``."""
        return [number for number, call in enumerate(self.calls) if call.late and call.landing == place]

    def landing_in(self, place: int) -> list[int]:
        """Numbers of the calls whose outputs op ``place``, the end of their group, adds."""
        return [number for number, call in enumerate(self.calls) if not call.late and call.landing == place]

    def launched_aside(self, launch: Launch) -> frozenset[int]:
        """Numbers of the calls that plans of this launch only announce before the op at their tap.

        Their experts may run behind that op, and no other call is under way there, whose experts or landing would come
        between. Other calls of the span are launched before the op, whatever the plan says.
        """
        if launch is Launch.BEFORE or self.waits_to_pack:
            return frozenset()
        return frozenset(
            number
            for number, call in enumerate(self.calls)
            if call.num_slots > 1
            and self._alone_at_tap(call)
            and (launch is Launch.BEHIND or call.tap in self.attentions)
        )

    @property
    def cut(self) -> frozenset[int]:
        """Indices of the ops that run in two steps in forward: a plan may launch between them."""
        return frozenset(self.calls[number].tap for number in self.launched_aside(Launch.WITHIN))

    def has(self, plan: Plan) -> bool:
        """Whether ``plan`` is for these calls, each slot is one of theirs, and its launch has a place."""
        aside = self.launched_aside(plan.launch)
        return (
            len(plan.slots) == len(self.calls)
            and all(slots[-1] <= call.num_slots for slots, call in zip(plan.slots, self.calls, strict=True))
            and (bool(aside) or plan.launch is Launch.BEFORE)
            and all(plan.slots[number][0] > 1 for number in aside)
        )

    def _alone_at_tap(self, call: RoutedCall) -> bool:
        here = call.tap
        under_way = (c for c in self.calls if c.tap <= here < c.landing or (here == c.landing and not c.late))
        return all(other is call for other in under_way)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the experts of one span run, and where dispatches are launched.

    Attributes:
        slots: for each routed call, and each token chunk of it, the place where its experts run: slot k lies before the
            k-th op from the tap on (from 1), the last one where the call lands. Chunks travel in order, so that slots
            never decrease; all calls have the same number of chunks.
        blocking: every collective is waited for where it starts: the sequential reference.
        launch: where dispatches are launched, where that can be (``SpanShape.launched_aside``): what the host has
            enqueued before it waits for the counts.

    Raises:
        ValueError: for no call, no chunk, calls of different numbers of chunks, a slot below 1, or a chunk before the
            one that travels ahead of it.
    """

    slots: tuple[tuple[int, ...], ...]
    blocking: bool = False
    launch: Launch = Launch.BEFORE

    def __post_init__(self) -> None:
        for slots in self.slots:
            if not slots or slots[0] < 1 or list(slots) != sorted(slots):
                raise ValueError(f"a call needs slots from 1 that never decrease, one for each chunk: not {slots}")
        if len({len(slots) for slots in self.slots}) != 1:
            raise ValueError(f"a plan needs calls with the same number of chunks: not {self.slots}")

    @property
    def chunks(self) -> int:
        """Number of token chunks of each call."""
        return len(self.slots[0])
