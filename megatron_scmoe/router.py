"""DGMoE's two top-1 gates: one router, asked once for the preceding layer and once for the current one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_random_logits,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Routing(NamedTuple):
    """What one gate decided for n tokens and e experts.

    Attributes:
        probs: gate weight where an expert was chosen, else 0, [n, e].
        routing_map: which expert gets which token, after capacity, bool, [n, e].
        chosen: which expert was chosen, before capacity, bool, [n, e].
        logits: of the router, [n, e].
    """

    probs: Tensor
    routing_map: Tensor
    chosen: Tensor
    logits: Tensor


class _Without:
    """Core's selection with some experts left out: has the shape of Core's replay, which stands in for a selection.

    Scores are masked for the choice alone. Masked logits would change the softmax, and so the weight of what is chosen.
    """

    def __init__(self, taken: Tensor) -> None:
        self._taken = taken

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        select: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        _, indices = select(scores.masked_fill(self._taken, -torch.inf), topk, num_groups, group_topk)
        return scores.gather(1, indices), indices


class DualGateRouter(TopKRouter):
    """Core's router with two gates (DGMoE, arXiv 2404.05019): top-1 for each of two tensors, two experts a token."""

    def forward(self, input: Tensor, padding_mask: Tensor | None = None, preceding: Routing | None = None) -> Routing:
        """Route ``input`` [s, b, h], top-1.

        Where the first choice is the expert that ``preceding`` chose for the token, the second is taken. With
        ``preceding`` the auxiliary losses of both gates are attached, as those of 2 s b tokens with one expert each.

        Args:
            input: what this gate reads.
            padding_mask: True where a token is padding, [s, b].
            preceding: what the preceding layer's gate decided; None to route for that gate.
        """
        self._maintain_float32_expert_bias()
        logits = self.gating(self.apply_input_jitter(input))
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        seq_length, batch_size = logits.shape[:2]
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask=mask)
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=None if preceding is None else _Without(preceding.chosen),
        )
        routing_map = chosen
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                chosen,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        routing = Routing(probs, routing_map, chosen, logits)
        if preceding is not None and self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            routing = routing._replace(probs=self._balance(preceding, routing, seq_length, batch_size, mask))
        self._apply_expert_bias(chosen if mask is None else chosen & ~mask.unsqueeze(-1))
        return routing

    def _balance(
        self, preceding: Routing, current: Routing, seq_length: int, batch_size: int, mask: Tensor | None
    ) -> Tensor:
        """Attach the auxiliary losses over both gates to the weights of the current one."""
        masks = None if mask is None else torch.cat([mask, mask])
        _, scores = compute_routing_scores_for_aux_loss(
            torch.cat([preceding.logits, current.logits]), self.topk, self.score_function, padding_mask=masks
        )
        chosen = torch.cat([preceding.chosen, current.chosen])
        if masks is not None:
            chosen = chosen & ~masks.unsqueeze(-1)
        padded = masks is not None
        probs = self._apply_aux_loss(current.probs, scores, chosen, with_padding_mask=padded)
        probs = self._apply_seq_aux_loss(probs, scores, chosen, 2 * seq_length, batch_size, with_padding_mask=padded)
        return self._apply_global_aux_loss(probs, scores, chosen, with_padding_mask=padded)
