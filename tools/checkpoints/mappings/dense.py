"""Settings of dense Hugging Face models, Llama and its relatives, as Megatron's: what upcycling starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.tensors import CheckpointError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models of one shape: pre-norm blocks with RMSNorm, grouped-query attention with rotary positions, gated MLPs."""


def dense_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """The saved arguments of a dense Megatron checkpoint of this model, as builtin types.

    Args:
        config: config.json.

    Raises:
        CheckpointError: for a model that has another shape.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"dense models of the types {', '.join(MODEL_TYPES)} can be read: config.json has model_type {kind!r}; "
            "use --from hf-longcat or hf-scmoe for theirs"
        )
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    stretched = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000
    if theta != int(theta):
        raise CheckpointError(f"the rotary base is a whole number in Megatron: config.json has {theta!r}; no way known")
    refused = {
        "rotary positions are not stretched here": ("rope_scaling", stretched),
        "attention reaches over the whole sequence": (
            "sliding_window",
            config.get("sliding_window") if config.get("use_sliding_window", kind == "mistral") else None,
        ),
        "MLPs have no biases": ("mlp_bias", config.get("mlp_bias") or None),
        "attention's output has no bias": ("attention_bias", config.get("attention_bias") or None),
    }
    for rule, (name, value) in refused.items():
        if value is not None:
            raise CheckpointError(f"{rule}: config.json has {name} {value!r}; no way known")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"MLPs are gated by silu: config.json has hidden_act {config['hidden_act']!r}; no way known"
        )
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
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
        "rotary_base": int(theta),
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
