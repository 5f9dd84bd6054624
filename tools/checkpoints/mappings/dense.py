"""Settings of dense Hugging Face models, Llama and its relatives, as Megatron's: what upcycling starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.mappings.scmoe_settings import LLAMA3_ROPE
from checkpoints.settings import FLAG, POSITIVE, ROPE, SIZE, by_name, check, check_multiple, optional, rotary_base
from checkpoints.tensors import CheckpointError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models of one shape: pre-norm blocks with RMSNorm, grouped-query attention with rotary positions, gated MLPs."""

# Settings that change their names alone, by those in config.json.
_NAMES = {
    **{"num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size"},
    **{"num_attention_heads": "num_attention_heads", "max_position_embeddings": "max_position_embeddings"},
    **{"vocab_size": "padded_vocab_size", "rms_norm_eps": "layernorm_epsilon"},
}
_RULES = {
    **dict.fromkeys(_NAMES, SIZE),
    **by_name(
        (optional(SIZE), "num_key_value_heads head_dim"),
        (optional(FLAG), "tie_word_embeddings use_sliding_window"),
        (POSITIVE, "rms_norm_eps"),
    ),
    **ROPE,
}


def dense_args(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The saved arguments of a dense Megatron checkpoint of this model, of one of ``MODEL_TYPES``, as builtin types.

    Models of another shape are refused.
    """
    check(origin, config, _RULES, needed=tuple(_NAMES))
    kind, stretched = config["model_type"], _is_stretched(origin, config)
    base = rotary_base(origin, config, default=10000, kinds=("default", "llama3"))
    _check_shape(origin, config)
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    check_multiple(origin, {**config, "num_key_value_heads": groups}, "num_attention_heads", "num_key_value_heads")
    if not config.get("head_dim"):
        check_multiple(origin, config, "hidden_size", "num_attention_heads")
    return {
        **{ours: config[name] for name, ours in _NAMES.items()},
        "vocab_size": config["vocab_size"],
        "group_query_attention": groups != heads,
        "num_query_groups": groups if groups != heads else 1,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        **{"position_embedding_type": "rope", "rotary_base": base, "use_rope_scaling": stretched},
        **{"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False},
        **{"add_qkv_bias": kind == "qwen2", "qk_layernorm": kind == "qwen3"},
        **{"multi_latent_attention": False, "q_lora_rank": None, "attention_dropout": 0.0, "hidden_dropout": 0.0},
        **{"num_experts": None, "moe_layer_freq": 1, "transformer_impl": "local"},
    }


def _check_shape(origin: str, config: Mapping[str, Any]) -> None:
    has_window = config["model_type"] == "mistral" or config.get("use_sliding_window", False)
    window = config.get("sliding_window", 4096) if has_window else None  # as transformers takes nothing said
    rope = config.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    for rule, name, value, allowed in (
        ("attention reaches over the whole sequence", "sliding_window", window, (None,)),
        ("all channels of a head turn", "partial_rotary_factor", part, (None, 1)),
        ("MLPs have no biases", "mlp_bias", config.get("mlp_bias") or None, (None,)),
        ("attention's output has no bias", "attention_bias", config.get("attention_bias") or None, (None,)),
        ("MLPs are gated by silu", "hidden_act", config.get("hidden_act", "silu"), ("silu",)),
    ):
        if value not in allowed:
            raise CheckpointError(f"{rule}: {name} is {value!r:.60} in {origin}; no way known")


def _is_stretched(origin: str, config: Mapping[str, Any]) -> bool:
    """Whether rotary positions are stretched, which they may be as those of Llama 3.1 are; other ways are refused."""
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
