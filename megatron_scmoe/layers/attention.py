"""What multi-latent attention lacks in Core beside a core attention for the local spec (``core_attention.py``): its
gradient there under tensor parallelism, and LongCat-Flash's scaled latents.
"""

from __future__ import annotations

import math

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

LONGCAT_EPSILON = 1e-6


class LatentSelfAttention(MLASelfAttention):
    """Core's multi-latent attention for down projections that are split over tensor-parallel ranks.

    The key's rotary part serves the heads of all ranks, so its gradient is a sum over them. Core gathers it from the
    split projection of the local spec by an op whose backward cuts out a part and sums nothing (seen in 0.19.2). Handed
    out as Transformer Engine's unsplit projection would, it is gathered by one that does.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of queries and of keys and values, whole, on this rank's part of the sequence."""
        query, key_value = super()._qkv_down_projection(hidden_states)
        if key_value.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            key_value = gather_from_tensor_model_parallel_region(key_value)
            key_value = scatter_to_sequence_parallel_region(key_value)
        return query, key_value


def longcat_norm(build: LayerNormBuilder) -> LayerNormBuilder:
    """Norms of latents as LongCat-Flash has them (arXiv 2509.01322, section 2.2), made by ``build``.

    Their epsilon is 1e-6 and their output is multiplied by sqrt(hidden size / rank), so that latents of any rank have
    the variance of the hidden state. Parameters and their names are those of the norm that ``build`` makes.
    """

    def scaled(config: TransformerConfig, hidden_size: int, eps: float = LONGCAT_EPSILON) -> torch.nn.Module:
        norm = build(config=config, hidden_size=hidden_size, eps=LONGCAT_EPSILON)
        scale = math.sqrt(config.hidden_size / hidden_size)
        norm.register_forward_hook(lambda _norm, _inputs, output: output * scale)
        return norm

    return scaled
