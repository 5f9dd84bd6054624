"""A learned answer to the residual that did not travel: ``A_e B_e (x - c)``, kept where the tokens are.

LSH-MoE (arXiv 2411.08446) adds the residual x - c itself to the expert's output for the centroid c. But an expert is
no identity: how its output changes with x - c is nearer to a linear map, and one of low rank is small enough to be
known to every rank, for all experts. This is ours, not the paper's.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.mcore import blocks


class ResidualMap(MegatronModule):
    """One map of rank r for each of e experts; all of them zero at first.

    Args:
        config: Core's configuration; gives the width w of what experts read, their number and the dtype.
        rank: r; a multiple of 8, as grouped matrix products want it.
        seed: of the start, in a generator of its own: the other parameters start as they do without this module.
    """

    def __init__(self, config: TransformerConfig, rank: int, seed: int) -> None:
        super().__init__(config)
        experts, width = config.num_moe_experts, blocks.width_of_experts(config)
        assert experts is not None
        self.down = torch.nn.Parameter(torch.empty(experts, width, rank, dtype=config.params_dtype))
        self.up = torch.nn.Parameter(torch.zeros(experts, rank, width, dtype=config.params_dtype))
        if config.perform_initialization:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(experts, width, rank, generator=generator) * width**-0.5
            with torch.no_grad():
                self.down.copy_(start)
        for weight in (self.down, self.up):
            # Under sequence parallelism each rank has a part of the tokens: Core then sums these gradients over them.
            setattr(weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (Core's marker)

    def forward(self, residuals: Tensor, rows_per_expert: Tensor) -> Tensor:
        """Map ``residuals`` [n, w], which are in the order of their experts, ``rows_per_expert`` [e] for each."""
        ends = rows_per_expert.cumsum(dim=0).to(torch.int32)
        # On Blackwell the product leaves gradients of experts without rows unwritten (pytorch/pytorch#172439).
        has_rows = (rows_per_expert > 0).view(-1, 1, 1)
        down, up = (torch.where(has_rows, weight, 0) for weight in (self.down, self.up))
        inner = torch.nn.functional.grouped_mm(residuals, down, offs=ends)
        return torch.nn.functional.grouped_mm(inner, up, offs=ends)
