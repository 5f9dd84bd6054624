"""Settings of LongCat-Flash: Hugging Face's config.json <-> the arguments that a Megatron checkpoint saves."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from checkpoints.mappings.scmoe_settings import LATENT, check_computed, theirs
from checkpoints.settings import COUNT, POSITIVE, ROPE, SIZE, by_name, check, optional, rotary_base
from checkpoints.tensors import CheckpointError

MODEL_TYPE = "longcat_flash"
_OLDER_NAMES = {
    "intermediate_size": "ffn_hidden_size",
    "num_local_experts": "n_routed_experts",
    "num_experts_per_tok": "moe_topk",
    "moe_intermediate_size": "expert_ffn_hidden_size",
}
# Settings that change their names alone, by those in config.json.
_NAMES = {
    **{name: name for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")},
    **{"vocab_size": "padded_vocab_size", "n_routed_experts": "num_experts", "moe_topk": "moe_router_topk"},
    **{"expert_ffn_hidden_size": "moe_ffn_hidden_size", "rms_norm_eps": "layernorm_epsilon", **LATENT},
    "zero_expert_num": "zero_experts",
}
_NUMBERS = ("routed_scaling_factor", "rms_norm_eps")
_SIZES = ("num_layers", *(name for name in _NAMES if name not in (*_NUMBERS, "zero_expert_num")))
_RULES = {
    **by_name((SIZE, " ".join(_SIZES)), (POSITIVE, " ".join(_NUMBERS)), (optional(COUNT), "zero_expert_num")),
    **ROPE,
}
# What every model of this form has in Megatron's arguments, and what else those of another form may have.
_FORM = {
    **{"shortcut": "scmoe", "shortcut_combine": "add", "moe_every": 2, "router": "longcat", "swiglu": True},
    **{"latent_scaling": "longcat", "multi_latent_attention": True, "normalization": "RMSNorm", "rope_type": "rope"},
    **{"add_bias_linear": False, "untie_embeddings_and_output_weights": True},
}
_ELSE = {
    **{"rotary_percent": 1.0, "mscale_all_dim": 0.0, "squared_relu": False, "moe_router_score_function": "softmax"},
    **{"moe_router_num_groups": None, "moe_router_group_topk": None, "a2a_codec": "none", "hybrid_layer_pattern": None},
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
    """config.json under one set of names; what LongCat-Flash as published does not have is refused."""
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
    """The saved arguments of a checkpoint of this model, as builtin types: what differs from Megatron's defaults."""
    return {
        **_FORM,
        **{ours: config[name] for name, ours in _NAMES.items()},
        "num_layers": 2 * config["num_layers"],
        "moe_layer_freq": [0, 1] * config["num_layers"],
        "kv_channels": config["v_head_dim"],
        "vocab_size": config["vocab_size"],
        "position_embedding_type": "rope",
        "rotary_base": rotary_base("config.json", config),
        "qk_layernorm": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_shared_expert_intermediate_size": config["ffn_hidden_size"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "shortcut_position": ["pos2"],
        "transformer_impl": "local",
        "hf_config": json.dumps(dict(config), sort_keys=True),
    }


def check_form(args: Namespace) -> None:
    """Refuse a checkpoint whose settings, ``complete``, a LongcatFlash model cannot have."""
    for name, value in {**_FORM, **_ELSE}.items():
        if (found := getattr(args, name, None)) != value:
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
    if not args.q_lora_rank:
        raise CheckpointError(
            f"a LongcatFlash model has latents of queries, and the checkpoint has q_lora_rank {args.q_lora_rank}; use "
            "--to hf-scmoe"
        )
    check_computed(Namespace(**{**vars(args), "mtp_num_layers": None}))  # mappings/prediction.py has rules of its own


def hf_config(args: Namespace) -> dict[str, Any]:
    """config.json of a checkpoint: the one it was made from, if any, with the sizes and settings that it has now."""
    config = json.loads(getattr(args, "hf_config", "{}"))
    # Names of Python files, which are not here, and what would be another word for what is written below.
    for name in ("auto_map", "rope_scaling", *_OLDER_NAMES):
        config.pop(name, None)
    theta = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    return {
        "pad_token_id": None,
        **config,
        "model_type": MODEL_TYPE,
        "architectures": ["LongcatFlashForCausalLM"],
        **theirs(args, _NAMES),
        "num_layers": args.num_layers // 2,
        "head_dim": args.qk_pos_emb_head_dim,
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "rope_parameters": theta,
        "rope_theta": theta["rope_theta"],  # for readers of before rope_parameters
        "tie_word_embeddings": False,
    }
