"""A core attention for multi-latent attention in the local spec, where Core has none."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
