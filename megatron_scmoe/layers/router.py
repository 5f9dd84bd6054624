"""Routers beyond Core's: DGMoE's two top-1 gates, and LongCat-Flash's with a bias and zero experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_random_logits,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.mcore.padding import RouterOfPadded


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


class _Choice:
    """Core's selection by something else than scores: has the shape of Core's replay, which stands in for a selection.

    What is chosen keeps its score. Changed logits would change the softmax, and so the weight of what is chosen.

    Args:
        preference: of scores, [n, e]: what the largest ones are chosen of.
    """

    def __init__(self, preference: Callable[[Tensor], Tensor]) -> None:
        self._preference = preference

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        select: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        _, indices = select(self._preference(scores), topk, num_groups, group_topk)
        return scores.gather(1, indices), indices


def _without(taken: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill(taken, -torch.inf)


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
            router_replay=None if preceding is None else _Choice(partial(_without, preceding.chosen)),
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


class ZeroRouting(NamedTuple):
    """What LongCat-Flash's router decided for n tokens and e real experts.

    Attributes:
        probs: weight where a real expert was chosen, else 0, [n, e].
        routing_map: which real expert gets which token, bool, [n, e].
        zero_weights: sum of the weights of a token's zero experts, [n].
    """

    probs: Tensor
    routing_map: Tensor
    zero_weights: Tensor

    def at_home(self, tokens: Tensor) -> Tensor:
        """What the zero experts make of ``tokens`` [s, b, h], n of them: each token times its weight."""
        return (tokens * self.zero_weights.view(*tokens.shape[:-1], 1)).to(tokens.dtype)


class LongcatRouter(RouterOfPadded):
    """LongCat-Flash's router (arXiv 2509.01322, section 2.1): softmax, bias, zero experts.

    ::

        scores  = softmax(W x)              over real experts, then zero experts
        chosen  = top-k of scores + bias    the bias takes no part in the weights, and has no gradient
        weights = factor * scores[chosen]   which do not sum to one

    Balance losses and the update of the bias are Core's, over real and zero experts alike.

    Args:
        config: Core's, whose experts are the real ones.
        zero_experts: experts that give a token back as it is.
        The other arguments are those of Core's router.
    """

    def __init__(self, config: TransformerConfig, *args: Any, zero_experts: int, **kwargs: Any) -> None:
        num_real = config.num_moe_experts
        config = copy.copy(config)
        config.num_moe_experts += zero_experts
        config.moe_router_pre_softmax = True
        config.moe_router_enable_expert_bias = True
        super().__init__(config, *args, **kwargs)
        self._num_real = num_real
        self.router_replay = _Choice(self._biased)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> ZeroRouting:
        """Route ``input`` [s, b, h]; ``padding_mask`` [s, b] is True where a token is padding."""
        probs, routing_map = super().forward(input, padding_mask)
        real, zero = probs.tensor_split((self._num_real,), dim=1)
        return ZeroRouting(real, routing_map[:, : self._num_real], zero.sum(dim=1))

    def _biased(self, scores: Tensor) -> Tensor:
        return scores + self.expert_bias
