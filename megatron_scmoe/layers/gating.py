"""How the outputs of shared and routed experts become one (ScMoE, arXiv 2404.05019, section 4: coefficient gates)."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CoefficientGate(MegatronModule):
    """cg2: ``softmax(W x)`` weighs shared against routed experts, token by token.

    ``add`` needs no module, and cg1 is Megatron's own shared-expert gate inside ``SharedExpertMLP``.

    Args:
        config: Core's configuration; gives the hidden size and how parameters start.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(2, config.hidden_size, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        # Under sequence parallelism each rank sees a part of the tokens: Core then sums this gradient over the ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (Core's marker on a Parameter)

    def forward(self, shared_input: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the shared and of the routed output, [s, b, 1] each.

        Args:
            shared_input: what the shared expert reads, [s, b, h].
        """
        logits = torch.nn.functional.linear(shared_input, self.weight)
        coefficients = torch.softmax(logits, dim=-1, dtype=torch.float32).type_as(shared_input)
        return coefficients[..., 0:1], coefficients[..., 1:2]
