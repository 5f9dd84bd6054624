"""What a layer of a checkpoint's model is: a block of attention and feed-forward, or one symbol of a hybrid pattern."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

from megatron_scmoe.config.groups import layers_of_pattern, predicted_by_pattern

ATTENTION, LATENT_ATTENTION, MAMBA, MLP, MOE = "*", "+", "M", "-", "E"
SYMBOLS = f"{MAMBA}{ATTENTION}{LATENT_ATTENTION}{MLP}{MOE}"
"""Of --hybrid-layer-pattern, those whose tensors are known here."""


class Parts(NamedTuple):
    """What is in a layer."""

    attention: bool
    mamba: bool
    feed_forward: bool


class Layer(NamedTuple):
    """A layer of a model, or of a prediction layer.

    Attributes:
        ours: what the names of its tensors begin with in a checkpoint of Megatron's.
        theirs: the same in a Hugging Face folder, with names like Llama's.
        args: of the model that has it: a prediction layer is one of its own.
        number: of the layer in it, counted from 0.
    """

    ours: str
    theirs: str
    args: Namespace
    number: int


def pattern_of(args: Namespace) -> str:
    """The layers of a hybrid model, a symbol each, without cuts between pipeline stages; empty for a GPT model.

    Without its prediction layers: those are ``prediction_patterns(args)``.
    """
    return layers_of_pattern(_whole_pattern(args))


def prediction_patterns(args: Namespace) -> list[str]:
    """The layers in each prediction layer of a hybrid model."""
    return predicted_by_pattern(_whole_pattern(args))


def _whole_pattern(args: Namespace) -> str:
    return getattr(args, "hybrid_layer_pattern", None) or ""


def layers_of(args: Namespace) -> Iterator[Layer]:
    """Every layer of the model of ``args``, ``complete``, and then of its prediction layers."""
    for number in range(args.num_layers):
        yield Layer(f"decoder.layers.{number}.", f"model.layers.{number}.", args, number)
    for depth, inner in enumerate(prediction_models(args)):
        within = "mtp_model_layer.layers.{}." if pattern_of(args) else "transformer_layer."
        for number in range(inner.num_layers):
            ours = f"mtp.layers.{depth}.{within.format(number)}"
            yield Layer(ours, f"model.mtp.layers.{depth}.layers.{number}.", inner, number)


def prediction_models(args: Namespace) -> list[Namespace]:
    """Arguments, each of the layers in one prediction layer alone: stock ones, in no group.

    Megatron's GPT model predicts by a block like its last one, and LongCat-Flash's by one without experts.
    """
    depths = 1 if args.mtp_num_layers and args.mtp_use_repeated_layer else args.mtp_num_layers or 0
    stock = {**vars(args), "shortcut": "none", "shortcut_norms": "none", "router": "core", "mtp_num_layers": None}
    if pattern_of(args):
        patterns = prediction_patterns(args)[:depths]
        return [Namespace(**stock | {"hybrid_layer_pattern": one, "num_layers": len(one)}) for one in patterns]
    has_experts = args.router == "core" and carries_moe(args, args.num_layers - 1)
    return [Namespace(**stock | {"num_layers": 1, "moe_layer_freq": [int(has_experts)]})] * depths


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
