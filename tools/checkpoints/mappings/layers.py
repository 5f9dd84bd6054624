"""What a layer of a checkpoint's model is: a block of attention and feed-forward, or one symbol of a hybrid pattern."""

from __future__ import annotations

from argparse import Namespace
from typing import NamedTuple

ATTENTION, LATENT_ATTENTION, MAMBA, MLP, MOE = "*", "+", "M", "-", "E"
SYMBOLS = f"{MAMBA}{ATTENTION}{LATENT_ATTENTION}{MLP}{MOE}"
"""Of --hybrid-layer-pattern, those whose tensors are known here."""


class Parts(NamedTuple):
    """What is in a layer."""

    attention: bool
    mamba: bool
    feed_forward: bool


def pattern_of(args: Namespace) -> str:
    """The layers of a hybrid model, a symbol each, without cuts between pipeline stages; empty for a GPT model."""
    return (getattr(args, "hybrid_layer_pattern", None) or "").replace("|", "")


def parts_of(args: Namespace, layer: int) -> Parts:
    """What is in layer number ``layer``, counted from 0 over the whole model."""
    pattern = pattern_of(args)
    if not pattern:
        return Parts(attention=True, mamba=False, feed_forward=True)
    symbol = pattern[layer]
    return Parts(symbol in (ATTENTION, LATENT_ATTENTION), symbol == MAMBA, symbol in (MLP, MOE))


def carries_moe(args: Namespace, layer: int) -> bool:
    """Whether layer number ``layer`` has an MoE in the place of its MLP."""
    if pattern := pattern_of(args):
        return pattern[layer] == MOE
    if not args.num_experts:
        return False
    blocks = args.moe_layer_freq
    return layer % blocks == 0 if isinstance(blocks, int) else bool(blocks[layer])


def owns_moe(args: Namespace, layer: int) -> bool:
    """Whether the MoE of a layer that ``carries_moe`` is its own, and not that of a group before it."""
    if args.shortcut == "none":
        return True
    pattern = pattern_of(args)
    group = pattern[:layer].count(MOE) if pattern else layer // args.moe_every
    return group % args.moe_share_groups == 0
