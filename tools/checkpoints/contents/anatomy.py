"""What a checkpoint is, in words and numbers: architecture, layout, parameters by kind; from headers alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from checkpoints.disk.torch_dist import OPTIMIZER, MegatronCheckpoint
from checkpoints.settings import COUNT
from checkpoints.tensors import Checkpoint, TensorInfo

ROUTED = "routed experts"
# The first that fits a name, in any format.
_KINDS = (
    ("norms", r"norm"),
    ("embedding", r"(^|\.)(word_embeddings|position_embeddings|embed_tokens|embed_positions|wte|wpe)\."),
    ("output layer", r"(^|\.)(output_layer|lm_head)\."),
    ("codec", r"\.residual_map\."),
    ("gates", r"\.gate_weight$|\.combine_gate\.|\.shared_expert_gate\."),
    ("router", r"\.router\.|\.(mlp|moe)\.gate\."),
    ("shared experts", r"\.shared_experts?\."),
    (ROUTED, r"\.experts\."),
    ("latent projections", r"\.fc[12]_latent_proj\."),
    ("prediction projections", r"\.eh_proj\."),
    ("attention", r"attention\.|attn\."),
    ("Mamba", r"\.(mixer|mamba)\."),
    ("dense MLP", r"\.mlps?\."),
)
KINDS = (*(kind for kind, _ in _KINDS), "other")

# Settings of a Megatron checkpoint as they are shown, behind the one without which they mean nothing.
_ARCHITECTURE = (
    ("", "num_layers hidden_size"),
    ("hybrid_layer_pattern", "hybrid_layer_pattern mamba_num_heads mamba_head_dim mamba_num_groups mamba_state_dim"),
    ("shortcut", "shortcut shortcut_position shortcut_combine moe_every moe_share_groups"),
    ("", "num_attention_heads"),
    ("group_query_attention", "num_query_groups"),
    ("", "kv_channels multi_latent_attention"),
    ("multi_latent_attention", "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim latent_scaling"),
    ("", "ffn_hidden_size swiglu normalization layernorm_epsilon"),
    ("num_experts", "num_experts zero_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size"),
    ("num_experts", "moe_latent_size moe_layer_freq router moe_router_score_function moe_router_enable_expert_bias"),
    ("a2a_codec", "a2a_codec lsh_compensation"),
    ("", "position_embedding_type rotary_base max_position_embeddings seq_length vocab_size padded_vocab_size"),
    ("", "untie_embeddings_and_output_weights transformer_impl tokenizer_type tokenizer_model"),
)
_LAYOUT = """
world_size tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
expert_tensor_parallel_size context_parallel_size data_parallel_size
"""


def kind_of(name: str) -> str:
    """What a tensor is part of, one of ``KINDS``."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that headers say, as plain types."""
    settings, infos = checkpoint.settings, checkpoint.infos
    others = Counter(checkpoint.others.values())
    if isinstance(checkpoint, MegatronCheckpoint):
        result = {
            "format": "Megatron, torch_dist",
            "iteration": checkpoint.iteration,
            "architecture": _architecture(settings),
            "layout": {name: settings[name] for name in _LAYOUT.split() if settings.get(name) is not None},
        }
    else:
        plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float | list)}
        result = {"format": "Hugging Face, safetensors", "architecture": plain}
    return {
        "folder": str(checkpoint.folder),
        **result,
        "optimizer": OPTIMIZER in others,
        "others": dict(others),
        "dtypes": dict(Counter(info.dtype_name for info in infos.values())),
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "files": {"count": len(checkpoint.files), "bytes": sum(path.stat().st_size for path in checkpoint.files)},
        "parameters": parameters(infos, settings),
    }


def parameters(infos: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by kind, in all, and active: all but those of routed experts that a token does not visit.

    With zero experts a token visits fewer real ones, the more of its choices are zero experts; here all experts are
    chosen alike.
    """
    by_kind: Counter[str] = Counter()
    for name, info in infos.items():
        by_kind[kind_of(name)] += math.prod(info.shape)
    total = by_kind.total()
    experts = _first(settings, "num_experts", "n_routed_experts", "num_local_experts")
    topk = _first(settings, "moe_router_topk", "moe_topk", "num_experts_per_tok", "router_topk", "top_k")
    zero = _first(settings, "zero_experts", "zero_expert_num") or 0
    active = None
    if not by_kind[ROUTED]:
        active = total
    elif experts and topk:
        active = round(total - by_kind[ROUTED] * (1 - min(topk / (experts + zero), 1)))
    return {"by_kind": {kind: by_kind[kind] for kind in KINDS if by_kind[kind]}, "total": total, "active": active}


def _first(settings: Mapping[str, Any], *names: str) -> int | None:
    return next((settings[name] for name in names if COUNT.holds(settings.get(name))), None)


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that mean something beside the others."""
    result: dict[str, Any] = {}
    for switch, names in _ARCHITECTURE:
        if not switch or settings.get(switch) not in (None, False, 0, "none"):
            result |= {name: settings[name] for name in names.split() if settings.get(name) is not None}
    return result
