"""What the rooms agree on: dense ops, cargo, routed calls, and the plan of a group. The second file to read.

A group is a list of dense ops and a routed call. The call's tokens travel as a cargo, in as many chunks as the plan has
slots; the layer (``layers/group.py``) makes the cargo, hands it to the flights (``dispatch/flights.py``) and runs the
ops while they fly. Standard library alone where it runs, so that settings can be checked before torch is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseOp:
    """One residual op of the dense stream.

    Attributes:
        name: what runs, for marks.
        norm: from a hidden state [s, b, h] to the normed tensor that the op reads.
        run: ``run(hidden, norm(hidden), inputs)`` is the next hidden state; ``inputs`` is what Core hands to every
            block beside it (``mcore.blocks.AttentionInputs``).
    """

    name: str
    norm: Callable[[Tensor], Tensor]
    run: Callable[[Tensor, Tensor, Any], Tensor]


class Cargo(Protocol):
    """What the flights of one routing carry, a chunk each, of n tokens of width h. It is asked in this order::

        (counts of all ranks are exchanged)  pack ~~ dispatch ~~> unpack -> experts ~~ combine ~~> deliver ... join

    Attributes:
        dispatchers: of each chunk's flight; they know what every rank sends.
    """

    dispatchers: list[MoEAlltoAllTokenDispatcher]

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """What travels to the experts, [rows, ...] each, in the order of the experts."""

    def unpack(self, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Rows for the experts, [rows, h], and the weight of each row's output, [rows], from what arrived."""

    def deliver(self, chunk: int, outputs: Tensor) -> Tensor:
        """What can be done at home with the outputs of one chunk, [rows, h], before the others are there."""

    def join(self, delivered: list[Tensor]) -> Tensor:
        """Each token's sum over its experts, in the shape of the tokens, from what all chunks delivered."""


class RoutedCall(Protocol):
    """The tokens of one routing, on their way since it was made (``dispatch/flights.py``)."""

    def run_experts(self, slot: int | None = None) -> None:
        """Run the experts of the chunks whose slot this is; of all chunks for None."""

    def finish_combine(self) -> Tensor:
        """Wait for the outputs of every chunk; [s, b, h]."""


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
