"""Settings of LongCat-Flash: Hugging Face's config.json <-> the arguments that a Megatron checkpoint saves."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from checkpoints.mappings.scmoe_settings import check_computed
from checkpoints.settings import COUNT, POSITIVE, ROPE, SIZE, check, optional, rotary_base
from checkpoints.tensors import CheckpointError

_OLDER_NAMES = {
    "intermediate_size": "ffn_hidden_size",
    "num_local_experts": "n_routed_experts",
    "num_experts_per_tok": "moe_topk",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}
_SIZES = (
    *("num_layers", "vocab_size", "hidden_size", "ffn_hidden_size", "expert_ffn_hidden_size", "n_routed_experts"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("moe_topk", "max_position_embeddings"),
)
_NUMBERS = ("routed_scaling_factor", "rms_norm_eps")
_RULES = {
    **dict.fromkeys(_SIZES, SIZE),
    **dict.fromkeys(_NUMBERS, POSITIVE),
    "zero_expert_num": optional(COUNT),
    **ROPE,
}
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "zero_expert_type": ((None, "identity"), "zero experts give a token back as it is"),
    "norm_topk_prob": ((None, False), "weights are not made to sum to one"),
    "attention_bias": ((None, False), "attention has no biases"),
    "tie_word_embeddings": ((None, False), "embedding and output layer are two tensors"),
    "hidden_act": ((None, "silu"), "MLPs are gated by silu"),
    "attention_method": ((None, "MLA"), "attention is multi-latent attention"),
    "n_group": ((None, 1), "all experts are one group"),
    "topk_group": ((None, 1), "all experts are one group"),
    "mla_scale_q_lora": ((None, True), "latents of queries are scaled"),
    "mla_scale_kv_lora": ((None, True), "latents of keys and values are scaled"),
}


def checked_config(source: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """config.json under one set of names.

    Args:
        source: what it holds.
        origin: where it is, for a message.

    Raises:
        CheckpointError: for what LongCat-Flash as published does not have.
    """
    config = dict(source)
    for older, name in _OLDER_NAMES.items():
        if older in config:
            config.setdefault(name, config[older])
    for name, (allowed, rule) in _REFUSED.items():
        if config.get(name) not in allowed:
            raise CheckpointError(
                f"LongCat-Flash: {rule}, and config.json has {name} {config[name]!r:.60}; no way known"
            )
    for name in config:
        if "ngram" in name or "n_gram" in name:
            raise CheckpointError(f"LongCat-Flash has no n-gram embeddings, and config.json has {name}; no way known")
    check(origin, config, _RULES, needed=(*_SIZES, *_NUMBERS))
    config["zero_expert_num"] = config.get("zero_expert_num") or 0
    choices = config["n_routed_experts"] + config["zero_expert_num"]
    if config["moe_topk"] > choices:
        raise CheckpointError(
            f"a token has {choices} experts to choose from: moe_topk is {config['moe_topk']} in {origin}; correct it"
        )
    rotary_base(origin, config)
    if config.get("head_dim", config["qk_rope_head_dim"]) != config["qk_rope_head_dim"]:
        raise CheckpointError(
            f"rotary positions turn all of a key's rotary part: head_dim is {config['head_dim']!r:.60} in {origin} and "
            f"qk_rope_head_dim is {config['qk_rope_head_dim']}; make them equal"
        )
    return config


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """The saved arguments of a checkpoint of this model, as builtin types: what differs from Megatron's defaults.

    Args:
        config: a LongcatFlash config.json, checked.
    """
    layers = config["num_layers"]
    return {
        "num_layers": 2 * layers,
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["ffn_hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["v_head_dim"],
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": rotary_base("config.json", config),
        "rope_type": "rope",
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "qk_layernorm": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": config["n_routed_experts"],
        "moe_ffn_hidden_size": config["expert_ffn_hidden_size"],
        "moe_shared_expert_intermediate_size": config["ffn_hidden_size"],
        "moe_router_topk": config["moe_topk"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_layer_freq": [0, 1] * layers,
        "shortcut": "scmoe",
        "shortcut_position": ["pos2"],
        "shortcut_combine": "add",
        "moe_every": 2,
        "router": "longcat",
        "zero_experts": config["zero_expert_num"] or 0,
        "latent_scaling": "longcat",
        "transformer_impl": "local",
        "hf_config": json.dumps(dict(config), sort_keys=True),
    }


def check_form(args: Namespace) -> None:
    """Refuse a checkpoint whose settings a LongcatFlash model cannot have.

    Raises:
        CheckpointError: for the first of them, by its name.
    """
    rules = {
        "shortcut": "scmoe",
        "shortcut_combine": "add",
        "moe_every": 2,
        "router": "longcat",
        "latent_scaling": "longcat",
        "multi_latent_attention": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "rope_type": "rope",
        "rotary_percent": 1.0,
        "mscale_all_dim": 0.0,
        "squared_relu": False,
        "moe_router_score_function": "softmax",
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "a2a_codec": "none",
    }
    defaults = {
        **dict.fromkeys(("shortcut", "latent_scaling", "a2a_codec"), "none"),
        "router": "core",
        "rotary_percent": 1.0,
        "mscale_all_dim": 0.0,
        "squared_relu": False,
        "moe_router_score_function": "softmax",
    }
    for name, value in rules.items():
        found = getattr(args, name, defaults.get(name))
        if found != value:
            raise CheckpointError(
                f"a LongcatFlash model has {name} {value}, and the checkpoint has {found}; use --to hf-scmoe"
            )
    if set(args.shortcut_position) != {"pos2"}:
        raise CheckpointError(
            "a LongcatFlash model has its shortcut at pos2, and the checkpoint has "
            f"{' '.join(args.shortcut_position)}; use --to hf-scmoe"
        )
    if args.moe_shared_expert_intermediate_size != args.ffn_hidden_size:
        raise CheckpointError(
            "both dense MLPs of a LongcatFlash layer have one size: ffn_hidden_size is "
            f"{args.ffn_hidden_size} and moe_shared_expert_intermediate_size is "
            f"{args.moe_shared_expert_intermediate_size}; use --to hf-scmoe"
        )
    if not SIZE.holds(getattr(args, "q_lora_rank", None)):
        raise CheckpointError(
            "a LongcatFlash model has latents of queries, and the checkpoint has q_lora_rank "
            f"{getattr(args, 'q_lora_rank', None)}; use --to hf-scmoe"
        )
    check_computed(args)


def hf_config(args: Namespace) -> dict[str, Any]:
    """config.json of a checkpoint: the one it was made from, if any, with the sizes and settings that it has now."""
    config = json.loads(getattr(args, "hf_config", "{}"))
    config.pop("auto_map", None)  # names Python files, which are not here
    for name in ("rope_scaling", *_OLDER_NAMES):  # which would be another word for what is written below
        config.pop(name, None)
    theta = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    return {
        "pad_token_id": None,
        **config,
        "model_type": "longcat_flash",
        "architectures": ["LongcatFlashForCausalLM"],
        "num_layers": args.num_layers // 2,
        "vocab_size": args.padded_vocab_size,
        "hidden_size": args.hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "expert_ffn_hidden_size": args.moe_ffn_hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "max_position_embeddings": args.max_position_embeddings,
        "q_lora_rank": args.q_lora_rank,
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_head_dim,
        "qk_rope_head_dim": args.qk_pos_emb_head_dim,
        "head_dim": args.qk_pos_emb_head_dim,
        "v_head_dim": args.v_head_dim,
        "n_routed_experts": args.num_experts,
        "zero_expert_num": args.zero_experts,
        "moe_topk": args.moe_router_topk,
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": theta,
        "rope_theta": theta["rope_theta"],  # for readers of before rope_parameters
        "tie_word_embeddings": False,
    }
