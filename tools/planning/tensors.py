"""What tensor parallel ranks send for an op: which collectives, of which width, beside what.

As Core 0.19.2 has it (tensor_parallel/layers.py, transformer/multi_latent_attention.py; Transformer Engine's linear
layers send the same). With sequence parallelism tokens are gathered before the first linear layer of an op, and the
sums of its last one scattered; backward gathers their gradients, and once more the op's input, beside the product that
makes that input's gradient, which is scattered beside the product for the weights. Without it ranks add up what the
last layer makes, and backward the gradient of the input beside the product for the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planning.workload import Attention, Embedding, Mamba, Mlp, Moe, Output, Single


class Collective(NamedTuple):
    """One collective of an op.

    Attributes:
        kind: all-gather, reduce-scatter or all-reduce.
        width: of a token.
        forward: how often it is waited for.
        backward: as often.
        beside: how often backward starts it beside a product of the op's first linear layer.
    """

    kind: str
    width: float
    forward: int = 0
    backward: int = 0
    beside: int = 0


def collectives(op: Single, hidden: int, *, sequence_parallel: bool) -> Iterator[Collective]:
    """Of ``op`` on tensor parallel ranks; ``hidden`` is the width of the residual stream."""
    read, again, made = _widths(op, hidden)
    if sequence_parallel:
        yield Collective("all-gather", read, forward=1)
        yield Collective("all-gather", again, beside=1)
        yield Collective("reduce-scatter", read, beside=1)
        yield Collective("reduce-scatter", made, forward=1)
        yield Collective("all-gather", made, backward=1)
    else:
        yield Collective("all-reduce", made, forward=1)
        yield Collective("all-reduce", again, beside=1)


def _widths(op: Single, hidden: int) -> tuple[float, float, float]:
    """Of what is read of other ranks' tokens, of what of that is gathered again backward, and of what is made."""
    match op:
        case Attention() if op.q_latent or op.kv_latent:
            # Down projections are whole on each rank: their latents are gathered, and the part that is turned.
            latents = (op.q_latent or hidden) + (op.kv_latent or hidden)
            return latents + op.rope_dim, latents, hidden
        case Attention() | Mamba() | Mlp():
            return hidden, hidden, hidden
        case Moe() if op.shared:
            return hidden, hidden, hidden
        case Embedding():
            return 0, 0, hidden
        case Output():
            return hidden, hidden, 0
        case _:
            return 0, 0, 0
