"""The saved arguments of a Megatron checkpoint as the config.json of a Hugging Face ScMoE model, and back."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from checkpoints.mappings.layers import MAMBA, carries_moe, pattern_of
from checkpoints.mappings.mamba import heads_of
from checkpoints.mappings.norms import SPECS
from checkpoints.tensors import CheckpointError
from megatron_scmoe.config.codec import CodecConfig
from megatron_scmoe.config.overlap import OverlapConfig

LLAMA3_ROPE = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
"""What Core's --use-rope-scaling does, that of Llama 3.1 and 3.3. Core 0.19.2 never reads --rope-scaling-factor."""

_OFF = (None, False, 0)

# Settings that change what the model computes and that no Hugging Face model here knows: the values that it can do
# without, the flag, and the rule.
_REFUSED: dict[str, tuple[tuple[object, ...], str, str]] = {
    "add_bias_linear": ((False,), "--disable-bias-linear", "its MLPs and output projections have no biases"),
    "layernorm_zero_centered_gamma": (_OFF, "--apply-layernorm-1p", "its norms multiply by their weights alone"),
    "apply_residual_connection_post_layernorm": (_OFF, "", "its residuals leave out the norms"),
    "qk_l2_norm": (_OFF, "", "its queries and keys have no norm without weights"),
    "attention_output_gate": (_OFF, "", "its attention has no output gate"),
    "softmax_type": ((None, "vanilla"), "", "its attention's softmax has no offset"),
    "window_size": (_OFF, "", "its attention reaches over the whole sequence"),
    "no_rope_freq": (_OFF, "", "all its blocks turn queries and keys, or none"),
    "rotary_interleaved": (_OFF, "", "its channels turn in halves"),
    "rope_scaling_factor": ((8, None), "", "its rotary positions stretch by 8, as those of Core 0.19.2"),
    "rotary_seq_len_interpolation_factor": (_OFF, "", "its rotary positions are not stretched"),
    "position_embedding_type": (("rope", "learned_absolute", "none"), "", "it has no other positions"),
    "mla_down_proj_fusion": (_OFF, "", "its down projections are two"),
    "experimental_attention_variant": (_OFF, "", "its attention is grouped-query or multi-latent attention"),
    "quick_geglu": (_OFF, "", "its activations are swiglu, gelu and squared relu"),
    "glu_linear_offset": (_OFF, "", "its activations are swiglu, gelu and squared relu"),
    "activation_func_clamp_value": (_OFF, "", "its activations are not clamped"),
    "moe_mlp_glu_interleave_size": (_OFF, "", "its gate and up projections are not interleaved"),
    "moe_shared_expert_glu_interleave_size": (_OFF, "", "its gate and up projections are not interleaved"),
    "moe_latent_size": (_OFF, "", "its experts read the hidden state"),
    "moe_apply_probs_on_input": (_OFF, "", "it weighs what experts give, not what they get"),
    "moe_router_force_load_balancing": (_OFF, "", "its router does not route by chance"),
    "moe_router_force_biased": (_OFF, "", "its router does not route by chance"),
    "mtp_num_layers": (_OFF, "", "it predicts one token"),
    "use_mup": (_OFF, "", "it does not scale embeddings and logits"),
    "heterogeneous_layers_config_path": (_OFF, "", "its blocks are alike"),
    "heterogeneous_layers_config_encoded_json": (_OFF, "", "its blocks are alike"),
    "spec": (_OFF, "", "its blocks are those of Core's own spec"),
    "transformer_impl": (SPECS, "", "names of other specs are not known"),
    "normalization": (("RMSNorm", "LayerNorm"), "", "it has no other norms"),
    "shortcut_landing": (_OFF, "", "its routed outputs are added at the end of their group"),
}
_ROUTING_REFUSED = ("sinkhorn", "quantile_balancing")

_ACTIVATIONS = ("swiglu", "squared_relu")  # else gelu
_ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}

# Settings that change their names alone, by those in config.json.
_MODEL = {
    **{"vocab_size": "padded_vocab_size", "hidden_size": "hidden_size", "num_hidden_layers": "num_layers"},
    **{"intermediate_size": "ffn_hidden_size", "normalization": "normalization", "norm_eps": "layernorm_epsilon"},
    **{"max_position_embeddings": "max_position_embeddings", "position_embedding": "position_embedding_type"},
    **{"qk_norm": "qk_layernorm", "num_attention_heads": "num_attention_heads"},
}
LATENT = {
    **{"q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_nope_head_dim": "qk_head_dim"},
    **{"qk_rope_head_dim": "qk_pos_emb_head_dim", "v_head_dim": "v_head_dim"},
}
_MAMBA = {
    **{"mamba_num_heads": "mamba_num_heads", "mamba_head_dim": "mamba_head_dim"},
    **{"mamba_num_groups": "mamba_num_groups", "mamba_state_size": "mamba_state_dim"},
}
_GROUPS = {name: name for name in ("shortcut", "moe_every", "moe_share_groups")}
_EXPERTS = {
    **{"num_experts": "num_experts", "num_experts_per_tok": "moe_router_topk", "router": "router"},
    **{"zero_experts": "zero_experts", "router_score_function": "moe_router_score_function"},
    **{"router_pre_softmax": "moe_router_pre_softmax", "router_num_groups": "moe_router_num_groups"},
    "router_group_topk": "moe_router_group_topk",
}

# What the Hugging Face model does not need and a training run does; no paths, which say something of a machine.
_KEPT = (
    *("transformer_impl", "seq_length", "vocab_size", "make_vocab_size_divisible_by", "tokenizer_type", "kv_channels"),
    *("attention_dropout", "hidden_dropout", "init_method_std", "rotary_scaling_factor", "mscale"),
    *("mscale_all_dim", "moe_token_dispatcher_type", "moe_router_load_balancing_type", "moe_aux_loss_coeff"),
    *("moe_z_loss_coeff", "moe_router_bias_update_rate", "moe_expert_capacity_factor", "moe_token_drop_policy"),
    *("moe_pad_expert_input_to_capacity", "moe_grouped_gemm", "num_query_groups", "hf_config"),
    *(field.name for field in fields(OverlapConfig) if field.name != "overlap_report"),
)
_CODEC = tuple(field.name for field in fields(CodecConfig))

_INFINITE = "inf"
"""What stands for a number that JSON does not have, as its flag takes it."""


def has_residual_maps(args: Namespace) -> bool:
    """Whether the codec of ``args`` has parameters of its own."""
    return args.a2a_codec == "lsh" and args.lsh_compensation == "lowrank"


def config_of(args: Namespace) -> dict[str, Any]:
    """The fields of ``ScMoEConfig`` (hf_scmoe/configuration_scmoe.py) for a checkpoint with these, ``complete``."""
    check_computed(args)
    kept = _KEPT if has_residual_maps(args) else (*_KEPT, *_CODEC)
    return {
        **theirs(args, _MODEL),
        "activation": next((name for name in _ACTIVATIONS if getattr(args, name)), "gelu"),
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        **(_latent_attention(args) if args.multi_latent_attention else _grouped_query_attention(args)),
        **_layers(args),
        **_groups(args),
        **(_experts(args) if args.num_experts else {"num_experts": 0}),
        "megatron": {name: _in_json(getattr(args, name)) for name in kept if _is_plain(getattr(args, name, None))},
    }


def theirs(args: Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """Settings that change their names alone, by those of Hugging Face, of which ``names`` has ours."""
    return {name: getattr(args, ours) for name, ours in names.items()}


def check_computed(args: Namespace) -> None:
    """Refuse settings that change what the model computes and that none of our Hugging Face models knows."""
    for name, (allowed, flag, rule) in _REFUSED.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            shown = "not set" if name == "add_bias_linear" else value
            raise CheckpointError(
                f"the Hugging Face model would be another one, {rule}: the checkpoint has "
                f"{flag or '--' + name.replace('_', '-')} {shown}; no way known"
            )
    if "farskip" in getattr(args, "shortcut_position", ()):
        raise CheckpointError(
            "the Hugging Face model would be another one, its shared expert reads what attention gave: the checkpoint "
            "has --shortcut-position farskip; no way known"
        )
    shared = getattr(args, "moe_share_groups", 1)
    if shared > (2 if getattr(args, "shortcut", "none") == "dgmoe" else 1):
        raise CheckpointError(
            "the Hugging Face model would be another one, groups share in pairs, in dgmoe alone: the checkpoint has "
            f"--shortcut {args.shortcut} and --moe-share-groups {shared}; no way known"
        )
    balancing = getattr(args, "moe_router_load_balancing_type", "none")
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind in _ROUTING_REFUSED:
            raise CheckpointError(
                "the Hugging Face model would be another one, its router chooses by scores: the checkpoint has "
                f"--moe-router-load-balancing-type {kind}; no way known"
            )


def _is_plain(value: object) -> bool:
    """Whether JSON keeps it as it is; nothing is worth keeping."""
    return all(isinstance(item, bool | int | float | str) for item in (value if isinstance(value, list) else [value]))


def _in_json(value: object) -> object:
    return _INFINITE if value == math.inf else value


def _grouped_query_attention(args: Namespace) -> dict[str, Any]:
    heads = args.num_attention_heads
    stretched = args.use_rope_scaling and not pattern_of(args)  # Core's HybridModel never reads it
    return {
        "attention": "grouped_query",
        "num_key_value_heads": args.num_query_groups if args.group_query_attention else heads,
        "head_dim": args.kv_channels or args.hidden_size // heads,
        "attention_bias": args.add_qkv_bias,
        "rope_parameters": {**_plain_rope(args), **(LLAMA3_ROPE if stretched else {})},
    }


def _latent_attention(args: Namespace) -> dict[str, Any]:
    query_size = args.qk_head_dim + args.qk_pos_emb_head_dim
    # Core stretches the scores by this whatever the kind of rotary positions is.
    stretch = _yarn_scale(args.rotary_scaling_factor, args.mscale_all_dim)
    # Its default is yarn, which with a factor of 1 is no other than rope.
    is_yarn = args.rope_type != "rope" and args.rotary_scaling_factor != 1
    return {
        "attention": "multi_latent",
        "head_dim": args.qk_pos_emb_head_dim,
        **theirs(args, LATENT),
        "latent_scaling": args.latent_scaling,
        "softmax_scale": None if stretch == 1 else stretch**2 / math.sqrt(query_size),
        "rope_parameters": _yarn(args) if is_yarn else _plain_rope(args),
    }


def _plain_rope(args: Namespace) -> dict[str, Any]:
    partial = {} if args.rotary_percent == 1 else {"partial_rotary_factor": args.rotary_percent}
    return {"rope_type": "default", "rope_theta": float(args.rotary_base), **partial}


def _yarn(args: Namespace) -> dict[str, Any]:
    factor = args.rotary_scaling_factor
    return {
        **{"rope_type": "yarn", "rope_theta": float(args.rotary_base), "factor": factor},
        **{"beta_fast": float(args.beta_fast), "beta_slow": float(args.beta_slow)},
        "original_max_position_embeddings": args.original_max_position_embeddings,
        "attention_factor": _yarn_scale(factor, args.mscale) / _yarn_scale(factor, args.mscale_all_dim),
    }


def _yarn_scale(factor: float, mscale: float) -> float:
    """YaRN's factor of attention (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _layers(args: Namespace) -> dict[str, Any]:
    """What layers other than blocks of attention and MLP or MoE are."""
    pattern = pattern_of(args)
    mamba = {**theirs(args, _MAMBA), "mamba_num_heads": heads_of(args)} if MAMBA in pattern else {}
    return {"layer_pattern": pattern, **mamba} if pattern else {}


def _groups(args: Namespace) -> dict[str, Any]:
    if args.shortcut != "none":
        return {**theirs(args, _GROUPS), "shortcut_position": list(args.shortcut_position)}
    pattern = [int(carries_moe(args, block)) for block in range(args.num_layers)]
    return {"shortcut": "none", "moe_every": 1, "moe_layer_pattern": pattern}


def _experts(args: Namespace) -> dict[str, Any]:
    combine = args.shortcut_combine if args.shortcut == "scmoe" else "cg1" if args.moe_shared_expert_gate else "add"
    return {
        **theirs(args, _EXPERTS),
        "shortcut_combine": combine,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or None,
        "router_expert_bias": args.moe_router_enable_expert_bias or args.router == "longcat",
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "router_dtype": _ROUTER_DTYPES[args.moe_router_dtype],
    }


# --- and back ----------------------------------------------------------------------------------------------------


def args_of(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The saved arguments of a Megatron checkpoint of a ``ScMoEConfig``, with weights of ``dtype``."""
    kept = config.megatron if isinstance(config.megatron, Mapping) else {}
    known = {name: value for name, value in kept.items() if name in (*_KEPT, *_CODEC) and _is_plain(value)}
    kept = {name: math.inf if value == _INFINITE else value for name, value in known.items()}
    theta = config.rope_parameters["rope_theta"]
    return {
        "transformer_impl": "local",
        "vocab_size": config.vocab_size,
        **kept,
        **_ours(config, _MODEL),
        **{name: config.activation == name for name in _ACTIVATIONS},
        "add_bias_linear": False,
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": config.rope_parameters.get("partial_rotary_factor", 1.0),
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": dtype,
        **(_args_of_latent(config, kept) if config.attention == "multi_latent" else _args_of_grouped(config)),
        **_args_of_layers(config),
        **_args_of_groups(config),
        **(_args_of_experts(config) if config.num_experts else {"num_experts": None, "moe_layer_freq": 1}),
    }


def _ours(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: getattr(config, name) for name, ours in names.items()}


def _args_of_grouped(config: Any) -> dict[str, Any]:
    grouped = config.num_key_value_heads != config.num_attention_heads
    return {
        "multi_latent_attention": False,
        "group_query_attention": grouped,
        "num_query_groups": config.num_key_value_heads if grouped else 1,
        "kv_channels": config.head_dim,
        "add_qkv_bias": config.attention_bias,
        "q_lora_rank": None,
        "use_rope_scaling": config.rope_parameters["rope_type"] == "llama3",
    }


def _args_of_latent(config: Any, kept: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.rope_parameters
    is_yarn = rope["rope_type"] == "yarn"
    if is_yarn and rope["factor"] != kept.get("rotary_scaling_factor"):
        raise CheckpointError(
            "Megatron's rotary positions are stretched by --rotary-scaling-factor: config.json has the factor "
            f"{rope['factor']} and kept {kept.get('rotary_scaling_factor')}; set both alike"
        )
    return {
        "multi_latent_attention": True,
        "kv_channels": kept.get("kv_channels", config.v_head_dim),
        **_ours(config, LATENT),
        "latent_scaling": config.latent_scaling,
        "rope_type": "yarn" if is_yarn else "rope",
    }


def _args_of_layers(config: Any) -> dict[str, Any]:
    if not config.layer_pattern:
        return {}
    mamba = _ours(config, _MAMBA) if MAMBA in config.layer_pattern else {}
    return {"hybrid_layer_pattern": config.layer_pattern, **mamba}


def _args_of_groups(config: Any) -> dict[str, Any]:
    if config.shortcut == "none":
        return {"shortcut": "none"}
    return {
        **_ours(config, _GROUPS),
        "shortcut_position": list(config.shortcut_position),
        "shortcut_combine": config.shortcut_combine if config.shortcut == "scmoe" else "cg1",
    }


def _args_of_experts(config: Any) -> dict[str, Any]:
    pattern = [int(config.carries_moe(block)) for block in range(config.num_hidden_layers)]
    factor = config.routed_scaling_factor
    return {
        **_ours(config, _EXPERTS),
        "moe_layer_freq": 1 if all(pattern) or config.layer_pattern else pattern,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": bool(config.shared_expert_intermediate_size) and config.shortcut_combine == "cg1",
        "moe_router_enable_expert_bias": config.router_expert_bias and config.router == "core",
        "moe_router_topk_scaling_factor": None if factor == 1 else factor,
        "moe_router_dtype": {name: ours for ours, name in _ROUTER_DTYPES.items()}[config.router_dtype],
    }
