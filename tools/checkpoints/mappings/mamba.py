"""Tensors of a Mamba-2 layer: Megatron saves the parts of joined rows by name, Hugging Face the rows as they are."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KERNEL = 4
"""Tokens that the convolution sees; Core has no setting for it."""
EXPANSION = 2
"""Inner channels for each of the hidden state, where no number of heads is set."""


class Rows(NamedTuple):
    """A tensor of Megatron's, and the rows of a Hugging Face tensor that it is.

    Attributes:
        ours: name of our tensor.
        shape: of it.
        theirs: name of theirs.
        first: of their rows.
        rows: that theirs has in all.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: str
    first: int
    rows: int


def heads_of(args: Namespace) -> int:
    """Heads of a mixer; ``args`` are ``complete``."""
    return args.mamba_num_heads or EXPANSION * args.hidden_size // args.mamba_head_dim


def mixer_rows(args: Namespace) -> Iterator[Rows]:
    """Every tensor of a mixer, by names inside it; ``args`` are ``complete``."""
    heads, hidden = heads_of(args), args.hidden_size
    inner, state = heads * args.mamba_head_dim, args.mamba_num_groups * args.mamba_state_dim
    convolved = {"x": inner, "B": state, "C": state}
    yield from _joined("in_proj.weight", {"z": inner, **convolved, "dt": heads}, (hidden,))
    yield from _joined("conv1d.weight", convolved, (1, KERNEL))
    yield from _joined("conv1d.bias", convolved, ())
    whole = {**dict.fromkeys(("A_log", "D", "dt_bias"), (heads,)), "norm.weight": (inner,)}
    for name, shape in {**whole, "out_proj.weight": (hidden, inner)}.items():
        yield Rows(name, shape, name, 0, shape[0])


def _joined(name: str, parts: Mapping[str, int], rest: tuple[int, ...]) -> Iterator[Rows]:
    first = 0
    for part, rows in parts.items():
        yield Rows(f"{name}.{part}", (rows, *rest), name, first, sum(parts.values()))
        first += rows
