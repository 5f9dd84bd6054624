"""What the arguments that a Megatron checkpoint saves may be, as far as they are read here."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings import scmoe_settings
from checkpoints.mappings.norms import SPECS, carries_moe
from checkpoints.settings import (
    COUNT,
    FLAG,
    NUMBER,
    POSITIVE,
    SHARE,
    SIZE,
    WORD,
    Rule,
    check,
    check_experts,
    check_layers,
    check_multiple,
    each,
    either,
    one_of,
    optional,
    whole,
)
from checkpoints.tensors import CheckpointError, TensorInfo


def _is_json_object(value: object) -> bool:
    try:
        return isinstance(value, str) and isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


_NEEDED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "padded_vocab_size"),
    "max_position_embeddings",
)
_LATENT = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
RULES: dict[str, Rule] = {
    **dict.fromkeys((*_NEEDED, *_LATENT, "moe_every", "moe_router_topk", "original_max_position_embeddings"), SIZE),
    **dict.fromkeys(
        (
            *("kv_channels", "num_query_groups", "q_lora_rank", "vocab_size", "seq_length", "moe_ffn_hidden_size"),
            *("moe_router_num_groups", "moe_router_group_topk"),
        ),
        optional(SIZE),
    ),
    **dict.fromkeys(("num_experts", "moe_shared_expert_intermediate_size"), optional(COUNT)),
    "zero_experts": COUNT,
    **dict.fromkeys(
        (
            *("group_query_attention", "multi_latent_attention", "add_qkv_bias", "qk_layernorm", "swiglu"),
            *("squared_relu", "add_bias_linear", "untie_embeddings_and_output_weights", "moe_shared_expert_gate"),
            *("moe_router_pre_softmax", "moe_router_enable_expert_bias"),
        ),
        FLAG,
    ),
    **dict.fromkeys(("layernorm_epsilon", "rotary_base", "rotary_scaling_factor", "beta_fast", "beta_slow"), POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim", "init_method_std"), NUMBER),
    "rotary_percent": SHARE,
    "use_rope_scaling": FLAG,
    "rope_scaling_factor": POSITIVE,
    "moe_router_topk_scaling_factor": optional(POSITIVE),
    "moe_share_groups": whole(1, 2),
    "moe_layer_freq": either(SIZE, each(one_of(0, 1))),
    "moe_router_score_function": one_of("softmax", "sigmoid", "sqrtsoftplus"),
    "moe_router_dtype": one_of(None, "fp32", "fp64"),
    "moe_router_load_balancing_type": either(WORD, each(WORD)),
    "position_embedding_type": one_of("learned_absolute", "rope", "yarn", "mrope", "relative", "none"),
    "rope_type": one_of(None, "rope", "yarn"),
    "normalization": one_of("LayerNorm", "RMSNorm"),
    "transformer_impl": one_of(*SPECS),
    "shortcut": one_of("none", "scmoe", "dgmoe"),
    "shortcut_position": each(one_of("pos1", "pos2", "pos3")),
    "shortcut_combine": one_of("add", "cg1", "cg2"),
    "router": one_of("core", "longcat"),
    "latent_scaling": one_of("none", "longcat"),
    "a2a_codec": one_of("none", "lsh"),
    "lsh_compensation": one_of("paper", "none", "lowrank"),
    "hf_config": Rule("a JSON object as text", _is_json_object),
}


def check_saved(source: MegatronCheckpoint) -> None:
    """Refuse saved arguments that no model has.

    Raises:
        CheckpointError: for the first of them, by its name.
    """
    check_args(f"the saved arguments of {source.folder}", source.args, source.infos)


def check_args(origin: str, args: Namespace, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse arguments that no model has, or none with these tensors.

    Args:
        origin: where they are, for a message.
        args: of a Megatron checkpoint, as builtin types.
        infos: tensors of the checkpoint, or of the Hugging Face folder that becomes one.

    Raises:
        CheckpointError: for the first of them, by its name.
    """
    check(origin, vars(args), RULES, needed=_NEEDED)
    settings = vars(scmoe_settings.complete(args))
    check_layers(origin, settings, "num_layers", infos)
    _check_heads(origin, settings)
    _check_groups(origin, settings)
    if settings["num_experts"]:
        _check_experts(origin, settings, infos)


def _check_heads(origin: str, settings: Mapping[str, Any]) -> None:
    if settings["multi_latent_attention"]:
        check(origin, settings, {}, needed=_LATENT)
        return
    if not settings["kv_channels"]:
        check_multiple(origin, settings, "hidden_size", "num_attention_heads")
    if settings["group_query_attention"]:
        check(origin, settings, {"num_query_groups": SIZE})
        check_multiple(origin, settings, "num_attention_heads", "num_query_groups")


def _check_groups(origin: str, settings: Mapping[str, Any]) -> None:
    layers, pattern = settings["num_layers"], settings["moe_layer_freq"]
    if isinstance(pattern, list | tuple) and len(pattern) != layers:
        raise CheckpointError(
            f"moe_layer_freq has {len(pattern)} values in {origin}, and should have one for each of {layers} layers"
        )
    if settings["shortcut"] == "none":
        return
    check_multiple(origin, settings, "num_layers", "moe_every")
    check(origin, settings, {"num_experts": SIZE})
    positions, groups = settings["shortcut_position"], layers // settings["moe_every"]
    if len(positions) not in (1, groups):
        raise CheckpointError(
            f"shortcut_position has {len(positions)} values in {origin}, and should have one for all or for each of "
            f"{groups} groups"
        )


def _check_experts(origin: str, settings: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    args = Namespace(**settings)
    num_moes = sum(carries_moe(args, block) for block in range(args.num_layers))
    shared = 1 if args.shortcut == "none" else args.moe_share_groups
    check_experts(origin, settings, "num_experts", infos, num_moes=num_moes // shared)
    choices = args.num_experts + args.zero_experts
    if args.moe_router_topk > choices:
        raise CheckpointError(
            f"moe_router_topk is {args.moe_router_topk} in {origin}, and a token has {choices} experts to choose from; "
            "correct it, or get it anew"
        )
