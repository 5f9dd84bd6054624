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

from checkpoints import settings as rules
from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings import scmoe_settings
from checkpoints.mappings.links import dtype_of, hf_pieces, links, megatron_pieces
from checkpoints.mappings.megatron_settings import RULES, check_args, complete
from checkpoints.mappings.tokenizer import Tokenizer, tokenizer_of
from checkpoints.plan import Conversion, Target
from checkpoints.settings import COUNT, FLAG, POSITIVE, SHARE, SIZE, TABLE, WORD, check, each, one_of, optional
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
_RULES = rules.by_name(
    (SIZE, "vocab_size hidden_size num_hidden_layers intermediate_size max_position_embeddings num_attention_heads"),
    (SIZE, "num_key_value_heads head_dim moe_every"),
    (optional(SIZE), "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (SIZE, "num_experts_per_tok moe_intermediate_size"),
    (optional(SIZE), "q_lora_rank router_num_groups router_group_topk"),
    (COUNT, "num_experts zero_experts"),
    (optional(COUNT), "shared_expert_intermediate_size"),
    (FLAG, "tie_word_embeddings qk_norm attention_bias router_pre_softmax router_expert_bias"),
    (POSITIVE, "norm_eps routed_scaling_factor"),
    (optional(POSITIVE), "softmax_scale"),
    (SIZE, "mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_size"),
    (WORD, "layer_pattern"),
    (rules.whole(1, 2), "moe_share_groups"),
    (each(WORD), "shortcut_position"),
    (each(one_of(0, 1)), "moe_layer_pattern"),
    (optional(TABLE), "rope_parameters megatron"),
)
_ROPE_RULES = rules.by_name(
    (POSITIVE, "rope_theta factor beta_fast beta_slow"),
    (SIZE, "original_max_position_embeddings"),
    (optional(POSITIVE), "attention_factor"),
    (SHARE, "partial_rotary_factor"),
    (WORD, "rope_type"),
)


def from_megatron(source: MegatronCheckpoint) -> Target:
    """A checkpoint of this plugin, or of stock Megatron, as a Hugging Face folder with its own model.

    Settings that the Hugging Face model does not know are refused.
    """
    args = complete(source.args)
    config = scmoe_settings.config_of(args)
    tokenizer = tokenizer_of(source)
    pieces, expected = hf_pieces(source.infos, links(args))
    has_maps = scmoe_settings.has_residual_maps(args)
    maps = [name for name in source.infos if has_maps and ".residual_map." in name]
    return Target(
        conversion=Conversion(
            pieces=tuple(pieces),
            expected=expected,
            dropped={**source.others, **dict.fromkeys(maps, _COMPENSATION)},
            notes=(*_notes(args), *tokenizer.notes),
        ),
        files=_files(config, tokenizer, dtype_of(source.infos, ["embedding.word_embeddings.weight"])),
    )


def to_megatron(source: HFFolder) -> Target:
    """A Hugging Face folder that ``from_megatron`` wrote, or that was trained on from one, as a checkpoint."""
    origin = str(source.folder / CONFIG)
    config = _loaded_config(source, origin)
    saved = scmoe_settings.args_of(config, dtype_of(source.infos, ["model.embed_tokens.weight"]))
    check_args(origin, Namespace(**saved), source.infos)
    args = complete(Namespace(**saved))
    _check_kept(config, scmoe_settings.config_of(args))
    pieces, expected = megatron_pieces(source.infos, links(args))
    tied = config.tie_word_embeddings and "lm_head.weight" in source.infos
    dropped = {"lm_head.weight": _TIED} if tied else {}
    return Target(conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped), args=saved)


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


def _notes(args: Namespace) -> Iterator[str]:
    if args.a2a_codec == "lsh":
        yield (
            "trained with --a2a-codec lsh, whose means depend on which tokens travel together: the Hugging Face model "
            "sends every token as it is, and gives other numbers than a forward with the codec"
        )
    elif args.a2a_codec != "none":
        yield (
            f"trained with --a2a-codec {args.a2a_codec}, which rounds rows on their way: the Hugging Face model sends "
            "none, and its numbers differ by that rounding"
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
    return {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), **code, **tokenizer.files}


def _loaded_config(source: HFFolder, origin: str) -> Any:
    """config.json as a ``ScMoEConfig``: what is missing gets its default, and what is there is checked."""
    check(origin, source.config, _RULES)
    check(origin, source.config.get("rope_parameters") or {}, _ROPE_RULES)
    check(f"{origin}, megatron", source.config.get("megatron") or {}, RULES)
    if "num_hidden_layers" in source.config:
        rules.check_layers(origin, source.config, "num_hidden_layers", source.infos)
    try:
        from checkpoints.mappings.hf_scmoe.configuration_scmoe import ScMoEConfig  # noqa: PLC0415 (slow, and needed here alone)
    except ImportError as error:
        raise CheckpointError("transformers reads config.json, and is missing; pip install transformers") from error
    try:
        return ScMoEConfig(**source.config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{origin} describes no ScMoE model: {reason}; correct it, or get it anew") from error
