"""What multi-latent attention lacks in Core: a core attention for the local spec, its gradient there under tensor
parallelism, and LongCat-Flash's scaled latents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
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


class LatentCoreAttention(DotProductAttention):
    """Core's dot-product attention for heads whose values have another size than their queries and keys.

    Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) names the two sizes, which Core's local core
    attention does not take.

    Args:
        k_channels: size of a head's queries and keys. Only the scale depends on it, which the caller gives.
        v_channels: size of a head's values, and so of its output; None for Core's head size (Core builds an attention
            once more than it uses it, without these two).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend with query and key [s, b, heads, k_channels] and value [s, b, heads, v_channels].

        Keys and values come as parts of one projection, which Core's views cannot take as they lie. Returns
        [s, b, heads * v_channels].
        """
        return super().forward(query, key.contiguous(), value.contiguous(), *args, **kwargs)
