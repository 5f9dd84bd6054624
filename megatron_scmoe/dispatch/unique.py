"""Tokens that travel to a rank once, whatever number of its experts want them (``--a2a-unique rank``).

A row is a token for a rank, with the gate weights of the token's experts there; what comes back is their weighted sum::

    y = sum over ranks of  sum over the token's experts there of  p E(x)

This is DeepEP's saving (github.com/deepseek-ai/DeepEP), over plain all-to-alls. A rank's sum is rounded to the
tokens' type before it travels; else sums differ by their order alone, and where no token has two experts of one rank
not at all. Backward mirrors it: a row's gradient comes once, and that of its input and of its weights goes back once.
``node.py`` does the same with nodes in the place of ranks.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.dispatch.payload import Column
from megatron_scmoe.dispatch.tokens import AS_THEY_ARE, ChunkedTokens, How
from megatron_scmoe.mcore import blocks
from megatron_scmoe.mcore.unique_rows import NodeCounts, UniqueCounts, UniqueRowsDispatcher

_ID = torch.int16
"""Travels as bytes: NCCL has no integers of 16 bits, and a collective of its own has the type of what it carries."""


class PlacedTokens(ChunkedTokens):
    """Tokens, a row for each place, a rank or a node, that has experts of theirs, with the weights of these.

    A choice of weight 0 adds nothing, and does not travel; nor does what only fills an expert up to its capacity, which
    has that weight. The host has to know the counts before it can pack: how many places a token goes to is up to the
    router.

    Args:
        moe: the layer whose experts run.
        hidden_states: what the experts read, or their latents are made of, [..., h], n tokens.
        probs: gate weights, [n, experts], 0 where an expert does not get a token.
        places: that rows are for.
        chunks: that the tokens travel in.
        how: they travel; what is beside them are weights, and maybe ids.
    """

    counts: UniqueCounts | NodeCounts

    def __init__(
        self, moe: MoELayer, hidden_states: Tensor, probs: Tensor, *, places: int, chunks: int, how: How
    ) -> None:
        topk = moe.config.moe_router_topk
        routed = moe, hidden_states, experts_of_tokens(probs), probs
        super().__init__(*routed, chunks=chunks, copies=min(topk, places), how=how)
        self._placing = [UniqueRowsDispatcher(moe, places) for _ in self._parts]
        self.dispatchers = [*self._placing]
        self._beside = WeightsBeside(probs.dtype, topk=topk, experts=probs.shape[1] // places)

    @property
    def _maps(self) -> list[Tensor]:
        return [routing_map for _, routing_map, _ in self._parts]

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """See ``contracts.Cargo``."""
        tokens, routing_map, probs = self._parts[chunk]
        dispatcher = self._placing[chunk]
        dispatcher.num_out_tokens = self.counts.num_rows_to_send(chunk)
        rows, weights = dispatcher.dispatch_preprocess(blocks.to_experts(self._moe, tokens), routing_map, probs)
        return rows, *self._beside.pack(weights)

    def unpack(self, _chunk: int, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``contracts.Cargo``."""
        rows, *beside = arrived
        return rows, self._beside.unpack(beside)


class UniqueTokens(PlacedTokens):
    """Tokens, a row for each rank that has experts of theirs.

    Args:
        moe: the layer whose experts run. The other arguments are those of ``PlacedTokens``.
    """

    def __init__(
        self, moe: MoELayer, hidden_states: Tensor, probs: Tensor, *, chunks: int, how: How = AS_THEY_ARE
    ) -> None:
        places = moe.token_dispatcher.ep_size
        super().__init__(moe, hidden_states, probs, places=places, chunks=chunks, how=how)
        self.counts = UniqueCounts(self._placing[0], self._maps, self._check)


class WeightsBeside:
    """What a row carries of gate weights: one for each expert of its place, 0 where the token is not for it; or, where
    that takes fewer bytes, as many as a token may have experts there, and which experts those are.

    Args:
        dtype: of weights.
        topk: experts of a token.
        experts: of a place.
    """

    def __init__(self, dtype: torch.dtype, *, topk: int, experts: int) -> None:
        self._experts, self._chosen = experts, min(topk, experts)
        self._sends_ids = ids_are_shorter(dtype, self._chosen, experts)

    def pack(self, weights: Tensor) -> tuple[Tensor, ...]:
        """What travels of ``weights``, [rows, experts of the place], ids last."""
        if not self._sends_ids:
            return (weights,)
        weights, experts = weights.topk(self._chosen, dim=1)
        return weights, experts.to(_ID).view(torch.uint8)

    def unpack(self, beside: list[Tensor]) -> Tensor:
        """Weights as they were, [rows, experts of the place]."""
        if not self._sends_ids:
            (weights,) = beside
            return weights
        weights, experts = beside
        return weights.new_zeros(len(weights), self._experts).scatter(1, experts.view(_ID).long(), weights)


def experts_of_tokens(probs: Tensor) -> Tensor:
    """Which expert gets which token, bool, [n, experts], by the gate weights, in that shape."""
    return probs != 0


def ids_are_shorter(dtype: torch.dtype, experts_of_row: int, experts_here: int) -> bool:
    """Whether weights and ids of a row's experts take fewer bytes of a payload than a weight for each expert."""
    some, all_ = torch.Size([experts_of_row]), torch.Size([experts_here])
    return Column(dtype, some).nbytes + Column(_ID, some).nbytes < Column(dtype, all_).nbytes
