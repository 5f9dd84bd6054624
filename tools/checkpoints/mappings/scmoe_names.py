"""This plugin's checkpoints <-> Hugging Face folders with a model of their own (hf_scmoe/modeling_scmoe.py).

Tensors get readable names; the rows of joined projections are taken apart and experts get a tensor each. No value
changes on either way. The vocabulary keeps the rows that Megatron padded it with, so that the way back is bit-equal.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import Target
from checkpoints.mappings import scmoe_settings
from checkpoints.mappings.links import dtype_of, hf_pieces, links, megatron_pieces
from checkpoints.mappings.megatron_settings import RULES, check_args
from checkpoints.mappings.tokenizer import Tokenizer, tokenizer_of
from checkpoints.plan import Conversion
from checkpoints.settings import (
    COUNT,
    FLAG,
    POSITIVE,
    SHARE,
    SIZE,
    TABLE,
    WORD,
    check,
    check_layers,
    each,
    one_of,
    optional,
    whole,
)
from checkpoints.tensors import CheckpointError

CODE = Path(__file__).with_name("hf_scmoe")
CODE_FILES = ("configuration_scmoe.py", "modeling_scmoe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_scmoe.ScMoEConfig",
    "AutoModel": "modeling_scmoe.ScMoEModel",
    "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
}
"""Which class of these files transformers takes for what."""

_COMPENSATION = "a learned compensation of the codec lsh: the Hugging Face model sends nothing, and so has no residuals"
_TIED = "the output layer is the embedding"
_RULES = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim", "moe_every", "num_experts_per_tok", "moe_intermediate_size"),
        ),
        SIZE,
    ),
    **dict.fromkeys(("q_lora_rank", "router_num_groups", "router_group_topk"), optional(SIZE)),
    **dict.fromkeys(("num_experts", "zero_experts"), COUNT),
    "shared_expert_intermediate_size": optional(COUNT),
    **dict.fromkeys(("tie_word_embeddings", "qk_norm", "attention_bias"), FLAG),
    **dict.fromkeys(("router_pre_softmax", "router_expert_bias"), FLAG),
    **dict.fromkeys(("norm_eps", "routed_scaling_factor"), POSITIVE),
    "softmax_scale": optional(POSITIVE),
    "moe_share_groups": whole(1, 2),
    "shortcut_position": each(WORD),
    "moe_layer_pattern": each(one_of(0, 1)),
    "rope_parameters": optional(TABLE),
    "megatron": optional(TABLE),
}
_ROPE_RULES = {
    **dict.fromkeys(("rope_theta", "factor", "beta_fast", "beta_slow"), POSITIVE),
    "original_max_position_embeddings": SIZE,
    "attention_factor": optional(POSITIVE),
    "partial_rotary_factor": SHARE,
    "rope_type": WORD,
}


def from_megatron(source: MegatronCheckpoint) -> Target:
    """A checkpoint of this plugin, or of stock Megatron, as a Hugging Face folder with its own model.

    Raises:
        CheckpointError: for a setting that the Hugging Face model does not know, and for a tensor of another shape than
            the saved settings say.
    """
    args = scmoe_settings.complete(source.args)
    config = scmoe_settings.config_of(args)
    tokenizer = tokenizer_of(source)
    pieces, expected = hf_pieces(source.infos, links(args))
    maps = _residual_maps(source, args)
    return Target(
        conversion=Conversion(
            pieces=tuple(pieces),
            expected=expected,
            dropped={**source.others, **dict.fromkeys(maps, _COMPENSATION)},
            notes=(*_notes(args), *tokenizer.notes),
        ),
        args=None,
        files=_files(config, tokenizer, dtype_of(source.infos, ["embedding.word_embeddings.weight"])),
    )


def to_megatron(source: HFFolder) -> Target:
    """A Hugging Face folder that ``from_megatron`` wrote, or that was trained on from one, as a checkpoint.

    Raises:
        CheckpointError: for another model, and for a tensor of another shape than config.json says.
    """
    origin = str(source.folder / CONFIG)
    config = _loaded_config(source, origin)
    saved = scmoe_settings.args_of(config, dtype_of(source.infos, ["model.embed_tokens.weight"]))
    check_args(origin, Namespace(**saved), source.infos)
    args = scmoe_settings.complete(Namespace(**saved))
    _check_kept(config, scmoe_settings.config_of(args))
    pieces, expected = megatron_pieces(source.infos, links(args))
    tied = config.tie_word_embeddings and "lm_head.weight" in source.infos
    dropped = {"lm_head.weight": _TIED} if tied else {}
    return Target(conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped), args=saved, files={})


def _check_kept(config: Any, again: Mapping[str, Any]) -> None:
    """Refuse a configuration that would come back from Megatron's arguments as another one."""
    here, there = config.rope_parameters or {}, again.get("rope_parameters") or {}
    kind = here.get("rope_type", "default")
    names = ("rope_type",) if kind == "default" else tuple(here)
    lost = [f"rope_parameters {name} {here.get(name)!r}" for name in names if here.get(name) != there.get(name)]
    if config.softmax_scale != again.get("softmax_scale"):
        lost.append(f"softmax_scale {config.softmax_scale!r}")
    if lost:
        raise CheckpointError(f"Megatron has no setting for what config.json says: {', '.join(lost)}; no way known")


def _residual_maps(source: MegatronCheckpoint, args: Namespace) -> list[str]:
    if not scmoe_settings.has_residual_maps(args):
        return []
    return [name for name in source.infos if ".residual_map." in name]


def _notes(args: Namespace) -> Iterator[str]:
    if args.a2a_codec == "lsh":
        yield (
            "trained with --a2a-codec lsh, whose means depend on which tokens travel together: the Hugging Face model "
            "sends every token as it is, and gives other numbers than a forward with the codec"
        )
    if getattr(args, "moe_expert_capacity_factor", None) is not None:
        yield (
            f"trained with --moe-expert-capacity-factor {args.moe_expert_capacity_factor}: experts of the Hugging Face "
            "model have room for every token"
        )


def _files(config: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, bytes]:
    config = {
        "model_type": "scmoe",
        "architectures": ["ScMoEForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        **config,
        **tokenizer.ids,
    }
    code = {name: (CODE / name).read_bytes() for name in CODE_FILES}
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **code, **tokenizer.files}


def _loaded_config(source: HFFolder, origin: str) -> Any:
    """config.json as a ``ScMoEConfig``: what is missing gets its default, and what is there is checked."""
    check(origin, source.config, _RULES)
    check(origin, source.config.get("rope_parameters") or {}, _ROPE_RULES)
    check(f"{origin}, megatron", source.config.get("megatron") or {}, RULES)
    if "num_hidden_layers" in source.config:
        check_layers(origin, source.config, "num_hidden_layers", source.infos)
    try:
        from checkpoints.mappings.hf_scmoe.configuration_scmoe import ScMoEConfig  # noqa: PLC0415 (slow, and needed here alone)
    except ImportError as error:
        raise CheckpointError("transformers reads config.json, and is missing; pip install transformers") from error
    try:
        return ScMoEConfig(**source.config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{origin} describes no ScMoE model: {reason}; correct it, or get it anew") from error
