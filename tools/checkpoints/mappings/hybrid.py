"""Checkpoints of Megatron's two containers: a block of its GPT model is two layers of a hybrid one.

The tensors are the same, under other names. So a hybrid checkpoint whose layers pair up is read as that of the GPT
model, and every mapping knows one kind of names; what is to be a hybrid checkpoint is made of a GPT's, last of all.
Hybrid models that are no row of blocks, with Mamba layers for instance, keep their own names.
"""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.layers import (
    ATTENTION,
    LATENT_ATTENTION,
    MAMBA,
    MLP,
    MOE,
    carries_moe,
    layers_of,
    pattern_of,
    prediction_models,
    prediction_patterns,
)
from checkpoints.mappings.links import expected_tensors
from checkpoints.mappings.megatron_settings import check_saved, complete
from checkpoints.mappings.norms import HYBRID as HYBRID_NAMES
from checkpoints.mappings.norms import renamed_norms
from checkpoints.plan import Conversion, Piece, Read, Target
from checkpoints.tensors import Checkpoint, CheckpointError
from megatron_scmoe.config import MOE_EVERY_CHOICES
from megatron_scmoe.config.groups import BEHIND, CUT

GPT, HYBRID = "gpt", "hybrid"

_BLOCK = re.compile(r"(decoder\.layers\.\d+\.|mtp\.layers\.\d+\.transformer_layer\.)(.+)")
_LAYER = re.compile(r"((?:decoder|mtp\.layers\.\d+\.mtp_model_layer)\.layers\.\d+\.)(.+)")
_OF_ATTENTION = ("input_layernorm.", "self_attention.")
_FINAL_NORM = {"decoder.final_layernorm.": "decoder.final_norm."}
_MOE_EVERY = 2  # the default of the flag, which a hybrid model has to have

# What Core's HybridModel computes otherwise than its GPTModel, or has no place for: values that make no difference, and
# the rule.
_OFF = (None, False, 0)
_NOT_IN_HYBRID: dict[str, tuple[tuple[object, ...], str]] = {
    "qk_l2_norm": (_OFF, "its layers have no norms of queries and keys without weights"),
    "rotary_interleaved": (_OFF, "its channels turn in halves"),
    "no_rope_freq": (_OFF, "its layers have other numbers than blocks"),
    "window_attn_skip_freq": (_OFF, "its layers have other numbers than blocks"),
    "position_embedding_type": (("learned_absolute", "rope", "none"), "it has no other positions"),
    "use_mup": (_OFF, "its scaling is experimental in Core"),
    "experimental_attention_variant": (_OFF, "its layers say what attention they are"),
    "heterogeneous_layers_config_path": (_OFF, "its layers are those of the pattern"),
    "heterogeneous_layers_config_encoded_json": (_OFF, "its layers are those of the pattern"),
    "spec": (_OFF, "its layers are those of Core's own spec"),
}


class BlocksOfHybrid(MegatronCheckpoint):
    """A hybrid checkpoint whose layers pair up, as that of the GPT model with the same tensors.

    Attributes:
        pattern: of the hybrid model, with its cuts between pipeline stages.
    """

    def __init__(self, path: Path) -> None:
        """As ``MegatronCheckpoint``, with a GPT's names and arguments; ``why_no_gpt`` knows no reason against it."""
        super().__init__(path)
        self.pattern = str(self.args.hybrid_layer_pattern)
        self.args = Namespace(**gpt_args(self.args))
        name_of = _names_in_gpt(complete(self.args))
        self._keys = {name_of(name): place for name, place in self._keys.items()}
        self.infos = {name_of(name): info for name, info in self.infos.items()}


def opened(path: Path) -> MegatronCheckpoint:
    """A checkpoint of Megatron's; a hybrid one as that of a GPT model, if it can be."""
    source = MegatronCheckpoint(path)
    if not getattr(source.args, "hybrid_layer_pattern", None):
        return source
    check_saved(source)
    return source if why_no_gpt(source.args) else BlocksOfHybrid(path)


def container_of(source: Checkpoint) -> str | None:
    """The container of the checkpoint in the folder of ``source``; None where that is not Megatron's."""
    if not isinstance(source, MegatronCheckpoint):
        return None
    return HYBRID if isinstance(source, BlocksOfHybrid) or pattern_of(source.args) else GPT


def unchanged(source: MegatronCheckpoint) -> Target:
    """The same checkpoint: what a change of the container alone begins with."""
    pieces = tuple(Piece(name=name, info=info, reads=(Read(name),)) for name, info in source.infos.items())
    expected = expected_tensors(source.args, source.infos)
    return Target(
        conversion=Conversion(pieces=pieces, expected=expected, dropped=source.others), args=vars(source.args)
    )


def in_container(target: Target, container: str | None, source: Checkpoint) -> Target:
    """``target``, a checkpoint of Megatron's made of ``source``, in a ``container``; refuses what that cannot hold.

    None: in that of the source, or if it has none, in GPT's unless only the other one can hold it.
    """
    args = Namespace(**(target.args or {}))
    if pattern_of(args):
        if container == GPT:
            raise CheckpointError(f"a GPT model cannot hold this: {why_no_gpt(args)}; use --container {HYBRID}")
        _check_norms(complete(args))
        return target
    if (container or container_of(source)) != HYBRID:
        return target
    return _as_hybrid(target, cuts=source.pattern if isinstance(source, BlocksOfHybrid) else "")


# --- hybrid to GPT ---------------------------------------------------------------------------------------------------


def why_no_gpt(args: Namespace) -> str | None:
    """Why no GPT model has the layers of this hybrid one, in words; None where one has."""
    pattern = pattern_of(args)
    shown = f"hybrid_layer_pattern is {pattern[:60]}"
    if MAMBA in pattern:
        return f"its blocks have no Mamba layers, and {shown}"
    if not re.fullmatch(rf"([{ATTENTION}{LATENT_ATTENTION}][{MLP}{MOE}])+", pattern):
        return f"its blocks are an attention and an MLP or MoE each, and {shown}"
    if getattr(args, "shortcut", "none") != "none" and _moe_every(pattern) not in MOE_EVERY_CHOICES:
        return f"its groups have all one size of 1 to 4 blocks, and {shown}"
    gpt = complete(Namespace(**gpt_args(args)))
    if set(prediction_patterns(args)) - {_symbols(inner, 0) for inner in prediction_models(gpt)}:
        return f"it predicts by a block like its last one (--router longcat by one without experts), and {shown}"
    return None


def _moe_every(pattern: str) -> int | None:
    """Blocks in each group of ``pattern``, whose layers pair up; None where they differ, or some are in no group."""
    *groups, behind = pattern.split(MOE)
    sizes = {(len(group) + 1) // 2 for group in groups}
    return sizes.pop() if len(sizes) == 1 and not behind else None


def gpt_args(args: Namespace) -> dict[str, Any]:
    """Saved arguments of the GPT model with the layers of a hybrid one, ``args``; there is one."""
    pattern = pattern_of(args)
    moes = [int(symbol == MOE) for symbol in pattern[1::2]]
    changes = {
        "hybrid_layer_pattern": None,
        "num_layers": len(moes),
        "moe_layer_freq": 1 if all(moes) or not getattr(args, "num_experts", None) else moes,
        "moe_every": _MOE_EVERY if getattr(args, "shortcut", "none") == "none" else _moe_every(pattern),
        "use_rope_scaling": False,  # Core's HybridModel never reads it
    }
    return {**vars(args), **changes}


def _names_in_gpt(args: Namespace) -> Callable[[str], str]:
    """From names in a hybrid model to those in the GPT model of ``args``; those of other layers stay."""
    norms = {hybrid: name for name, hybrid in _hybrid_norms(args).items()}
    final = {hybrid: name for name, hybrid in _FINAL_NORM.items()}

    block_of = {layer: block for block, layers in _layers_of_blocks(args).items() for layer in layers}

    def renamed(name: str) -> str:
        if not (found := _LAYER.fullmatch(name)) or found[1] not in block_of:
            return _with_prefix(name, final)
        name = block_of[found[1]] + found[2]
        return norms.get(name, name)

    return renamed


# --- GPT to hybrid ---------------------------------------------------------------------------------------------------


def _as_hybrid(target: Target, *, cuts: str) -> Target:
    saved = dict(target.args or {})
    args = complete(Namespace(**saved))
    _check_hybrid_has_it(args)
    _check_norms(args)
    name_of = _names_in_hybrid(args)
    conversion = replace(
        target.conversion,
        pieces=tuple(replace(piece, name=name_of(piece.name)) for piece in target.conversion.pieces),
        expected={name_of(name): info for name, info in target.conversion.expected.items()},
    )
    return replace(target, conversion=conversion, args={**saved, **hybrid_args(args, cuts)})


def hybrid_args(args: Namespace, cuts: str = "") -> dict[str, Any]:
    """What a hybrid model with the blocks of a GPT model, ``args``, ``complete``, has for other saved arguments.

    ``cuts`` is a pattern of as many layers, cut where the new one is to be cut between pipeline stages.
    """
    pattern = "".join(_symbols(args, block) for block in range(args.num_layers))
    behind = [BEHIND + _symbols(inner, 0) for inner in prediction_models(args)[:1]] * (args.mtp_num_layers or 0)
    return {
        "hybrid_layer_pattern": "".join([_with_cuts(pattern, cuts) if cuts else pattern, *behind]),
        "num_layers": len(pattern),
        "moe_layer_freq": 1,
        "moe_every": _MOE_EVERY,
    }


def _symbols(args: Namespace, block: int) -> str:
    attention = LATENT_ATTENTION if args.multi_latent_attention else ATTENTION
    return attention + (MOE if carries_moe(args, block) else MLP)


def _with_cuts(pattern: str, cuts: str) -> str:
    symbols = iter(pattern)
    return "".join(CUT if symbol == CUT else next(symbols) for symbol in cuts.partition(BEHIND)[0])


def _check_hybrid_has_it(args: Namespace) -> None:
    rules = {name: (getattr(args, name, None), *rule) for name, rule in _NOT_IN_HYBRID.items()}
    # Latent attention turns by itself, in both containers alike.
    stretches = args.use_rope_scaling and not args.multi_latent_attention
    rules["use_rope_scaling"] = (stretches, _OFF, "its rotary positions are not stretched")
    for name, (value, allowed, rule) in rules.items():
        if value not in allowed:
            raise CheckpointError(
                f"a hybrid model would be another one, {rule}: the checkpoint has --{name.replace('_', '-')} "
                f"{str(value)[:60]}; use --container {GPT}"
            )


def _check_norms(args: Namespace) -> None:
    fused = args.transformer_impl == "transformer_engine" and getattr(args, "latent_scaling", "none") == "none"
    if fused and args.qk_layernorm:  # those of longcat's latents are in layers of ours
        raise CheckpointError(
            "Core's hybrid layers of Transformer Engine have no norms of queries, keys and latents: the checkpoint has "
            "--qk-layernorm and --transformer-impl transformer_engine; use --transformer-impl local"
        )


def _names_in_hybrid(args: Namespace) -> Callable[[str], str]:
    """From names in the GPT model of ``args`` to those in a hybrid model; those of other blocks stay."""
    norms, layers_of_block = _hybrid_norms(args), _layers_of_blocks(args)

    def renamed(name: str) -> str:
        name = norms.get(name, name)
        if not (found := _BLOCK.fullmatch(name)) or found[1] not in layers_of_block:
            return _with_prefix(name, _FINAL_NORM)
        attention, feed_forward = layers_of_block[found[1]]
        return (attention if found[2].startswith(_OF_ATTENTION) else feed_forward) + found[2]

    return renamed


def _layers_of_blocks(args: Namespace) -> dict[str, tuple[str, ...]]:
    """Of each block of a GPT model, ``args``, ``complete``, and of its two layers in a hybrid one: how names begin."""
    hybrid = Namespace(**{**vars(args), **hybrid_args(args)})
    pairs = itertools.batched((layer.ours for layer in layers_of(hybrid)), 2)
    return {block.ours: pair for block, pair in zip(layers_of(args), pairs, strict=True)}


def _hybrid_norms(args: Namespace) -> dict[str, str]:
    """Names that the norms of a GPT model have in a hybrid one, but for the layers' numbers."""
    return renamed_norms(args, Namespace(**{**vars(args), "transformer_impl": HYBRID_NAMES}))


def _with_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
