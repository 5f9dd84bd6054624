"""A norm for the local spec under sequence parallelism, which Core's own refuses there."""

from __future__ import annotations

import copy

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelNorm:
    """Core's torch norm, with its parameters marked as seeing a part of the sequence.

    The mark is all that sequence parallelism asks of a norm: Core then sums their gradients over the tensor-parallel
    ranks.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        """Build the norm that ``config.normalization`` names; the arguments are those of Core's norm builders."""
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = WrappedTorchNorm(config=accepted, hidden_size=hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
