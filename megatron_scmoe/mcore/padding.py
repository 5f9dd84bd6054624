"""Padding masks, where Core 0.19.2 gives routers one of another shape, or counts tokens by it wrongly."""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class RouterOfPadded(TopKRouter):
    """Core's router, whose expert biases move by the tokens that are no padding.

    Core's own lays the mask [n] over a routing map [n, experts] along its experts.
    """

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map)


def mask_of_rank(padding_mask: Tensor | None, hidden_states: Tensor, router: TopKRouter) -> Tensor | None:
    """The mask that ``router`` reads, bool, [s, b].

    Args:
        padding_mask: as Core hands it to a layer, [b, s], True for padding; None where there is none.
        hidden_states: of this rank, [s, b, h].
        router: of the layer.

    Raises:
        ValueError: for a mask of other tokens than this rank has, and where Core would count them wrongly.
    """
    if padding_mask is None:
        return None
    mask = padding_mask.transpose(0, 1).bool()
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            "a padding mask is cut for sequence parallelism in the first stage of a GPT model alone: it has the shape "
            f"{tuple(padding_mask.shape)} and this rank has {tuple(hidden_states.shape[:2])} of sequence and batch; "
            "call the model without padding_mask"
        )
    if router.calculate_per_token_loss and (size := router.tp_cp_group.size()) > 1 and router.is_aux_loss_enabled():
        raise ValueError(
            "Core scales a balance loss by the tokens of all tensor-parallel ranks, which it takes for those of one: "
            f"there is a padding mask, --calculate-per-token-loss is set and {size} ranks share sequences; call the "
            "model without padding_mask, or drop --calculate-per-token-loss"
        )
    return mask
