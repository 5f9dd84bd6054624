"""Settings of dense Hugging Face models, Llama and its relatives, as Megatron's: what upcycling starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.mappings.scmoe_settings import LLAMA3_ROPE
from checkpoints.settings import FLAG, POSITIVE, ROPE, SIZE, check, check_multiple, optional, rotary_base
from checkpoints.tensors import CheckpointError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models of one shape: pre-norm blocks with RMSNorm, grouped-query attention with rotary positions, gated MLPs."""

_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    "max_position_embeddings",
)
_RULES = {
    **dict.fromkeys(_SIZES, SIZE),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), optional(SIZE)),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), optional(FLAG)),
    "rms_norm_eps": POSITIVE,
    **ROPE,
}


def dense_args(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The saved arguments of a dense Megatron checkpoint of this model, as builtin types.

    Args:
        config: a config.json of one of ``MODEL_TYPES``.
        origin: where it is, for a message.

    Raises:
        CheckpointError: for a model that has another shape.
    """
    check(origin, config, _RULES, needed=(*_SIZES, "rms_norm_eps"))
    kind, stretched = config["model_type"], _is_stretched(origin, config)
    base = rotary_base(origin, config, default=10000, kinds=("default", "llama3"))
    has_window = kind == "mistral" or config.get("use_sliding_window", False)
    refused = {
        "attention reaches over the whole sequence": (
            "sliding_window",
            config.get("sliding_window", 4096) if has_window else None,  # as transformers takes nothing said
        ),
        "all channels of a head turn": ("partial_rotary_factor", _partial(config)),
        "MLPs have no biases": ("mlp_bias", config.get("mlp_bias") or None),
        "attention's output has no bias": ("attention_bias", config.get("attention_bias") or None),
    }
    for rule, (name, value) in refused.items():
        if value is not None:
            raise CheckpointError(f"{rule}: {name} is {value!r:.60} in {origin}; no way known")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"MLPs are gated by silu: hidden_act is {config['hidden_act']!r:.60} in {origin}; no way known"
        )
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    check_multiple(origin, {**config, "num_key_value_heads": groups}, "num_attention_heads", "num_key_value_heads")
    if not config.get("head_dim"):
        check_multiple(origin, config, "hidden_size", "num_attention_heads")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "position_embedding_type": "rope",
        "rotary_base": base,
        "use_rope_scaling": stretched,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": kind == "qwen2",
        "qk_layernorm": kind == "qwen3",
        "multi_latent_attention": False,
        "q_lora_rank": None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "num_experts": None,
        "moe_layer_freq": 1,
        "transformer_impl": "local",
    }


def _is_stretched(origin: str, config: Mapping[str, Any]) -> bool:
    """Whether rotary positions are stretched, which they may be as those of Llama 3.1 are.

    Raises:
        CheckpointError: where they are stretched by other constants than Core has.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return False
    found = {"rope_type": "llama3", **rope}  # older ones call it type
    for name, value in LLAMA3_ROPE.items():
        if found.get(name) != value:
            raise CheckpointError(
                f"Megatron-Core stretches rotary positions with {name} {value}: it is {found.get(name)!r:.60} in "
                f"{origin}; no way known"
            )
    return True


def _partial(config: Mapping[str, Any]) -> Any:
    """The part of a head's channels that turn, where it is not all of them."""
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return None if part == 1 else part
