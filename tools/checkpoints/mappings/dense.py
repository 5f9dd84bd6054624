"""Dense Hugging Face models, Llama and its relatives, in Megatron's names and layouts: what upcycling starts from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.mappings.norms import norm_names
from checkpoints.plan import Read, as_it_is
from checkpoints.tensors import CheckpointError, TensorInfo

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Models of one shape: pre-norm blocks with RMSNorm, grouped-query attention with rotary positions, gated MLPs."""

_Parts = tuple[TensorInfo, tuple[Read, ...], Callable[..., Tensor]]


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


def dense_recipes(source: HFFolder, args: Namespace) -> dict[str, _Parts]:
    """Every tensor of the Megatron model, by its name there: what it is, what it is made of, and how."""
    return dict(_recipes(source, args))


def _recipes(source: HFFolder, args: Namespace) -> Iterator[tuple[str, _Parts]]:
    def one(ours: str, theirs: str) -> tuple[str, _Parts]:
        return ours, (_info(source, theirs), (Read(theirs),), as_it_is)

    yield one("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for block in range(args.num_layers):
        yield from _block(source, args, block)
    yield one("decoder.final_layernorm.weight", "model.norm.weight")
    if args.untie_embeddings_and_output_weights:
        yield one("output_layer.weight", "lm_head.weight")


def _block(source: HFFolder, args: Namespace, block: int) -> Iterator[tuple[str, _Parts]]:
    ours, theirs = f"decoder.layers.{block}.", f"model.layers.{block}."
    norms = norm_names(args, args.transformer_impl, block)

    def made(name: str, parts: tuple[str, ...], make: Callable[..., Tensor]) -> tuple[str, _Parts]:
        infos = [_info(source, theirs + part) for part in parts]
        rows = sum(info.shape[0] for info in infos)
        info = TensorInfo((rows, *infos[0].shape[1:]), infos[0].dtype)
        return ours + name, (info, tuple(Read(theirs + part) for part in parts), make)

    yield made(norms["input_layernorm"] + "weight", ("input_layernorm.weight",), as_it_is)
    yield made(norms["pre_mlp_layernorm"] + "weight", ("post_attention_layernorm.weight",), as_it_is)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for part in ("weight", "bias") if args.add_qkv_bias else ("weight",):
        names = tuple(f"self_attn.{kind}_proj.{part}" for kind in "qkv")
        yield made(f"self_attention.linear_qkv.{part}", names, partial(_by_group, groups=groups))
    yield made("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), as_it_is)
    if args.qk_layernorm:
        for kind in "qk":
            yield made(f"self_attention.{kind}_layernorm.weight", (f"self_attn.{kind}_norm.weight",), as_it_is)
    yield made("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), _behind_one_another)
    yield made("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), as_it_is)


def _info(source: HFFolder, name: str) -> TensorInfo:
    # A tensor that the source lacks is named by the account of the conversion; any shape will do until then.
    return source.infos.get(name, TensorInfo((0,), torch.float32))


def _behind_one_another(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _by_group(query: Tensor, key: Tensor, value: Tensor, *, groups: int) -> Tensor:
    """Rows by query group: its query heads, its key head, its value head; as Megatron lays them out."""
    rows = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in (query, key, value)]
    return torch.cat(rows, dim=1).flatten(0, 1).contiguous()
