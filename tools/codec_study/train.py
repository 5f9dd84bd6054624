"""One training of the study: the real entry script, in which an arm without a codec replaces what travels.

    python -m codec_study.train CARGO <flags of pretrain_gpt_scmoe.py>

The control is here, and no flag of the package, because nobody trains it for its own sake: experts that compute
E(x) + x are the path that compensation adds, E(c) + (x - c), without any compression.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

import pretrain_gpt_scmoe  # before anything that imports Megatron
from megatron_scmoe.codec import CargoMaker, Tokens

if TYPE_CHECKING:
    from megatron.core.transformer.moe.moe_layer import MoELayer


class TokensPlusInput(Tokens):
    """Tokens as they are; to each expert's output for one, the token is added at home before the gate weight.

    Args: those of ``Tokens``.
    """

    def __init__(
        self, moe: MoELayer, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, *, chunks: int
    ) -> None:
        super().__init__(moe, hidden_states, probs, routing_map, chunks=chunks)
        weights = (probs * routing_map).sum(dim=-1)
        self._inputs = (hidden_states * weights.view(*hidden_states.shape[:-1], 1)).to(hidden_states.dtype)

    def join(self, delivered: list[Tensor]) -> Tensor:
        """See ``Cargo``: sum over the token's experts of p (E(x) + x)."""
        return super().join(delivered) + self._inputs


CARGOES: dict[str, type[Tokens] | None] = {"codec": None, "tokens": Tokens, "tokens-plus-input": TokensPlusInput}
"""By name: what travels in the place of what the flags say; None leaves it to them."""


def replace_cargo(kind: type[Tokens]) -> None:
    """Let every group of this process carry ``kind``, whatever its codec is."""

    def cargo(
        _maker: CargoMaker, moe: MoELayer, hidden_states: Tensor, probs: Tensor, routing_map: Tensor, **settings: Any
    ) -> Tokens:
        return kind(moe, hidden_states, probs, routing_map, chunks=settings["chunks"])

    CargoMaker.cargo = cargo  # type: ignore[assignment, method-assign]


def main() -> None:
    """Take the cargo from the command line, and train by the rest of it."""
    kind = CARGOES[sys.argv.pop(1)]
    if kind is not None:
        replace_cargo(kind)
    pretrain_gpt_scmoe.main()
    from megatron.training import get_tensorboard_writer  # noqa: PLC0415 - only now: the entry script decides first

    if (writer := get_tensorboard_writer()) is not None:
        writer.close()  # it writes from a thread, which ends with this process


if __name__ == "__main__":
    main()
