"""Tokens that travel to a rank once, whatever number of its experts want them (``--a2a-unique rank``).

A row is a token for a rank, with the gate weights of the token's experts there; what comes back is their weighted sum::

    y = sum over ranks of  sum over the token's experts there of  p E(x)

This is DeepEP's saving (github.com/deepseek-ai/DeepEP), over plain all-to-alls. A rank's sum is rounded to the
tokens' type before it travels; else sums differ by their order alone, and where no token has two experts of one rank
not at all. Backward mirrors it: a row's gradient comes once, and that of its input and of its weights goes back once.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.dispatch.payload import Column
from megatron_scmoe.dispatch.tokens import ChunkedTokens
from megatron_scmoe.mcore import blocks
from megatron_scmoe.mcore.unique_rows import UniqueCounts, UniqueRowsDispatcher

_ID = torch.int16
"""Travels as bytes: NCCL has no integers of 16 bits, and a collective of its own has the type of what it carries."""


class UniqueTokens(ChunkedTokens):
    """Tokens, a row for each rank that has experts of theirs, with the weights of these.

    A row carries a weight for each expert of the rank, 0 where the token is not for it; or, where that takes fewer
    bytes, as many as a token may have experts there, and which experts those are. A choice of weight 0 adds nothing,
    and does not travel; nor does what only fills an expert up to its capacity, which has that weight.

    The host has to know the counts before it can pack: how many ranks a token goes to is up to the router.

    Args:
        moe: the layer whose experts run.
        hidden_states: what the experts read, or their latents are made of, [..., h], n tokens.
        probs: gate weights, [n, experts], 0 where an expert does not get a token.
        chunks: that the tokens travel in.
        apart_above: bytes of tokens in one exchange above which weights and ids travel as collectives of their own.
    """

    def __init__(
        self, moe: MoELayer, hidden_states: Tensor, probs: Tensor, *, chunks: int, apart_above: float = math.inf
    ) -> None:
        topk, num_ranks = moe.config.moe_router_topk, moe.token_dispatcher.ep_size
        routed = moe, hidden_states, experts_of_tokens(probs), probs
        super().__init__(*routed, chunks=chunks, copies=min(topk, num_ranks), apart_above=apart_above)
        dispatchers = [UniqueRowsDispatcher(moe) for _ in self._parts]
        self.dispatchers = [*dispatchers]
        self.counts = UniqueCounts(dispatchers[0], [routing_map for _, routing_map, _ in self._parts])
        self._experts_here = probs.shape[1] // num_ranks
        self._experts_of_row = min(topk, self._experts_here)
        self._sends_ids = ids_are_shorter(probs.dtype, self._experts_of_row, self._experts_here)

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """See ``contracts.Cargo``."""
        tokens, routing_map, probs = self._parts[chunk]
        dispatcher = self.dispatchers[chunk]
        dispatcher.num_out_tokens = self.counts.num_rows_to_send(chunk)
        rows, weights = dispatcher.dispatch_preprocess(blocks.to_experts(self._moe, tokens), routing_map, probs)
        if not self._sends_ids:
            return rows, weights
        weights, experts = weights.topk(self._experts_of_row, dim=1)
        return rows, weights, experts.to(_ID).view(torch.uint8)

    def unpack(self, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``contracts.Cargo``."""
        rows, weights, *ids = arrived
        if self._sends_ids:
            (experts,) = ids
            weights = weights.new_zeros(len(rows), self._experts_here).scatter(1, experts.view(_ID).long(), weights)
        return rows, weights


def experts_of_tokens(probs: Tensor) -> Tensor:
    """Which expert gets which token, bool, [n, experts], by the gate weights, in that shape."""
    return probs != 0


def ids_are_shorter(dtype: torch.dtype, experts_of_row: int, experts_here: int) -> bool:
    """Whether weights and ids of a row's experts take fewer bytes of a payload than a weight for each expert."""
    some, all_ = torch.Size([experts_of_row]), torch.Size([experts_here])
    return Column(dtype, some).nbytes + Column(_ID, some).nbytes < Column(dtype, all_).nbytes
