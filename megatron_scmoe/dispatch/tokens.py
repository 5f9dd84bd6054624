"""Tokens: the cargo of every flight that carries no centroids."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scmoe.contracts import Form, TransferName
from megatron_scmoe.mcore import blocks, token_dispatcher


class How(NamedTuple):
    """How tokens travel.

    Attributes:
        apart_above: bytes of tokens in one exchange above which what belongs to them travels apart.
        forms: in which rows travel, of transfers in which they do not as they are.
        refusal: what is said of tokens with NaN or infinity; empty where they may travel.
    """

    apart_above: float = math.inf
    forms: Mapping[TransferName, Form] = MappingProxyType({})
    refusal: str = ""


AS_THEY_ARE = How()


class ChunkedTokens:
    """What cargos of tokens have in common: their chunks, and what happens at home with what experts made of them.

    Args:
        moe: the layer whose experts run.
        hidden_states: what the experts read, or their latents are made of, [..., h], n tokens.
        routing_map: which expert gets which token, bool, [n, experts].
        probs: gate weights, [n, experts].
        chunks: that the tokens travel in.
        copies: rows that a token makes, at most.
        how: they travel.
    """

    group: ProcessGroup
    dispatchers: list[MoEAlltoAllTokenDispatcher]

    def __init__(
        self,
        moe: MoELayer,
        hidden_states: Tensor,
        routing_map: Tensor,
        probs: Tensor,
        *,
        chunks: int,
        copies: int,
        how: How,
    ) -> None:
        self._moe, self._shape, self.group = moe, hidden_states.shape, moe.ep_group
        self._parts = in_chunks(chunks, hidden_states, routing_map, probs)
        self.apart = bytes_at_most(moe, hidden_states, chunks=chunks, copies=copies) > how.apart_above
        self.forms = how.forms
        self._check = token_dispatcher.Check(all_finite(hidden_states), how.refusal) if how.refusal else None

    def collect(self, _chunk: int, outputs: Tensor) -> Tensor:
        """See ``contracts.Cargo``."""
        return outputs

    def deliver(self, chunk: int, outputs: Tensor) -> Tensor:
        """See ``contracts.Cargo``."""
        return blocks.from_experts(self._moe, self.dispatchers[chunk].combine_postprocess(outputs))

    def join(self, delivered: list[Tensor]) -> Tensor:
        """See ``contracts.Cargo``."""
        return delivered[0] if len(delivered) == 1 else torch.cat(delivered).view(self._shape)


class Tokens(ChunkedTokens):
    """Tokens as the experts read them, with their gate weights, rounded on their way or not.

    With --moe-latent-size they are projected chunk by chunk, just before a chunk leaves and behind its arrival, so that
    the projections of one chunk run while others travel. A chunk has all experts of its tokens, so that a token's sum
    is there before it is projected up, as in Core.

    Args:
        moe: the layer whose experts run.
        hidden_states: what the experts read, or their latents are made of, [..., h], n tokens.
        probs: gate weights, [n, experts].
        routing_map: which expert gets which token, bool, [n, experts].
        chunks: that the tokens travel in.
        travels_topk: whether every token goes to as many experts as the router chose, unless capacity drops some.
        how: they travel; what is beside them are their weights.
    """

    def __init__(
        self,
        moe: MoELayer,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        chunks: int,
        travels_topk: bool = True,
        how: How = AS_THEY_ARE,
    ) -> None:
        routed = moe, hidden_states, routing_map, probs
        super().__init__(*routed, chunks=chunks, copies=moe.config.moe_router_topk, how=how)
        self._travels_topk = travels_topk
        # Padding filled every expert's capacity before tokens were cut into chunks, of which none has that many.
        self.dispatchers = [
            token_dispatcher.dispatcher_for_one_flight(moe, keeps_capacity=chunks == 1) for _ in self._parts
        ]
        rows_per_expert = torch.stack([part_map.sum(dim=0) for _, part_map, _ in self._parts])
        self.counts = token_dispatcher.Counts(self.dispatchers[0], rows_per_expert, self._check)

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """See ``contracts.Cargo``."""
        tokens, routing_map, probs = self._parts[chunk]
        dispatcher = self.dispatchers[chunk]
        num_rows = token_dispatcher.rows_without_drops(dispatcher, routing_map, travels_topk=self._travels_topk)
        return token_dispatcher.rows_by_expert(
            dispatcher,
            blocks.to_experts(self._moe, tokens),
            routing_map,
            probs,
            num_rows or self.counts.num_rows_to_send(chunk),
        )

    def unpack(self, _chunk: int, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``contracts.Cargo``."""
        tokens, weights = arrived
        return tokens, weights


def in_chunks(chunks: int, hidden_states: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Tokens, [..., h], and what belongs to them, [n, ...] each, in parts of about n / chunks tokens; one is whole."""
    if chunks == 1:
        return [(hidden_states, *others)]
    rows = hidden_states.view(-1, hidden_states.shape[-1])
    return list(zip(*(x.tensor_split(chunks) for x in (rows, *others)), strict=True))


@torch.no_grad()
def all_finite(tokens: Tensor) -> Tensor:
    """Whether ``tokens`` [..., h] have neither NaN nor infinity; bool, on their device."""
    if not tokens.numel():
        return torch.ones((), dtype=torch.bool, device=tokens.device)
    return torch.stack(torch.aminmax(tokens)).isfinite().all()  # NaN is the smallest and the largest, too


def bytes_at_most(moe: MoELayer, hidden_states: Tensor, *, chunks: int, copies: int) -> int:
    """Of tokens in one exchange, by what all ranks know.

    How many rows there are differs where capacity or zero experts keep some at home.

    Args:
        moe: the layer whose experts run.
        hidden_states: [..., h], n tokens.
        chunks: that they travel in.
        copies: rows that a token makes, at most.
    """
    num_tokens = hidden_states.numel() // hidden_states.shape[-1]
    row = blocks.width_of_experts(moe.config) * hidden_states.element_size()
    return -(-num_tokens // chunks) * copies * row
