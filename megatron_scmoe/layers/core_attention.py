"""The core attention of the local spec: Core's own, for parts of a sequence, for documents, for heads of two sizes.

Transformer Engine's attention does all three on GPUs. Everything around it (rotary positions, batches, routers, losses)
is the same code with both specs, so what runs here differs from Transformer Engine's path in this class alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class LocalCoreAttention(DotProductAttention):
    """Core's dot-product attention, told by a mask what a token may read.

    * Context parallelism: a rank has two chunks of every sequence, and gathers the keys and values of all ranks; their
      gradients come back by a reduce-scatter.
    * Packed sequences: a token reads what precedes it in its own document.
    * Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): values of a head have another size than its
      queries and keys, which Core's local core attention does not take.

    Without any of these it is Core's, bit for bit.

    Args:
        k_channels: size of a head's queries and keys. Only the scale depends on it, which the caller gives.
        v_channels: size of a head's values, which they have themselves.
        The other arguments are those of Core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # Core's insists on it
        super().__init__(whole, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        self.cp_group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])).cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: of this rank's tokens, [s, b, heads, k_channels]; of packed ones [t, heads, k_channels].
            key: as ``query``, a head for each group of queries.
            value: as ``key``, with v_channels.
            attention_mask: True where a token does not read another one, [b, 1, s, s * CP]; None for a causal one.
            packed_seq_params: where documents begin among t tokens, or None.
            **kwargs: of Core's forward.

        Returns:
            [s, b, heads * v_channels]; of packed tokens [t, heads * v_channels].

        Raises:
            ValueError: for packed sequences with context parallelism.
        """
        if packed_seq_params is not None:
            return self._attend_documents(query, key, value, packed_seq_params, **kwargs)
        if self.cp_group.size() > 1:
            own, of_all = _positions(len(query), self.cp_group, query.device)
            key, value = (gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value))
            if attention_mask is None:
                attention_mask = (of_all > own.unsqueeze(1))[None, None]
            else:
                attention_mask = attention_mask[..., of_all]
        return self._attend(query, key, value, attention_mask, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        # Core's views take keys and values that are parts of one tensor only as a copy.
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * value.shape[-1]
        return super().forward(query, key.contiguous(), value.contiguous(), mask, **kwargs)

    def _attend_documents(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams, **kwargs: Any
    ) -> Tensor:
        if self.cp_group.size() > 1:
            raise ValueError(
                f"documents are not cut: packed_seq_params is given and {self.cp_group.size()} context-parallel ranks "
                "share a sequence; use one"
            )
        # No document reaches over the end of a sample, so samples are apart, and no token is compared with others'.
        tokens = len(query)
        length = packed.tokens_per_sample or tokens
        mask = _mask_of_documents(packed, tokens, length, query.device)
        query, key, value = (part.view(-1, length, *part.shape[1:]).transpose(0, 1) for part in (query, key, value))
        output = self._attend(query, key, value, mask, **kwargs)
        return output.transpose(0, 1).reshape(tokens, -1)


def zigzag(length: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
    """Positions of a context-parallel rank's ``length`` tokens in the whole sequence, as Core's batches are cut.

    It has chunks ``rank`` and ``2 * size - 1 - rank`` of ``2 * size`` equal ones, so that all ranks have as much to
    attend to.
    """
    chunk = torch.arange(length // 2, device=device)
    return torch.cat([chunk + number * len(chunk) for number in (rank, 2 * size - 1 - rank)])


def _positions(length: int, group: torch.distributed.ProcessGroup, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of this rank's tokens, and of those of all ranks in the order in which they are gathered."""
    of_ranks = [zigzag(length, rank, group.size(), device) for rank in range(group.size())]
    return of_ranks[group.rank()], torch.cat(of_ranks)


def _mask_of_documents(packed: PackedSeqParams, tokens: int, length: int, device: torch.device) -> Tensor:
    """True where a token does not read another one of its sample, [samples, 1, length, length]."""
    begins = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    positions = torch.arange(tokens, dtype=begins.dtype, device=device)
    document = torch.searchsorted(begins[1:], positions, right=True).view(-1, 1, length)
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    return (document.unsqueeze(2) != document.unsqueeze(3)) | future
