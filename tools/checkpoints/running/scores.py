"""What a model that runs forward looks like, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

USUAL_LENGTH = 2048
"""Tokens of a window where a checkpoint does not say on how many it was trained."""


class Scores(NamedTuple):
    """What a model makes of one micro-batch, on the CPU.

    Attributes:
        losses: of each label, in nats, float32, [b, s].
        logits: float32, [b, s, vocabulary]; None unless asked for.
    """

    losses: Tensor
    logits: Tensor | None


class Model:
    """A model that is ready to run forward, or this rank's part of one; here of a single process.

    Attributes:
        vocab_size: token ids are below this.
        max_length: most tokens of a window.
        usual_length: tokens of a window in training, as far as the checkpoint says.
        length_multiple: windows have a multiple of this many tokens.
        micro_batches: in one call that keep all ranks of a pipeline busy.
        data_rank: which of ``data_size`` parts of the windows this rank gets.
        data_size: number of those parts.
        collects: whether this rank gets scores; all others get none.
        layout: of all ranks, in Megatron's words.
    """

    vocab_size: int
    max_length: int
    usual_length: int
    length_multiple = micro_batches = data_size = 1
    data_rank = 0
    collects = True
    layout: Mapping[str, int] = {"world_size": 1}

    def score(self, tokens: Tensor, labels: Tensor, *, with_logits: bool = False) -> list[Scores]:
        """Run forward; every rank calls it, with equal shapes. One for each micro-batch, where this rank collects.

        Args:
            tokens: of this rank's part, [micro-batches, b, s].
            labels: the token behind each of them.
            with_logits: whether logits are returned too; the same on every rank.
        """
        raise NotImplementedError

    def summed(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks."""
        return values

    def shared(self, value: Any) -> Any:
        """The value that rank 0 has."""
        return value
