"""Tokens as they are: the cargo of every flight that no codec makes smaller."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.mcore import token_dispatcher


class Tokens:
    """Tokens as they are, with their gate weights (``--a2a-codec none``).

    Args:
        moe: the layer whose experts run.
        hidden_states: what the experts read, [..., h], n tokens.
        probs: gate weights, [n, experts].
        routing_map: which expert gets which token, bool, [n, experts].
        chunks: that the tokens travel in.
        travels_topk: whether every token goes to as many experts as the router chose, unless capacity drops some.
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
    ) -> None:
        self._shape = hidden_states.shape
        self._parts = [(hidden_states, routing_map, probs)]
        if chunks > 1:
            rows = hidden_states.view(-1, hidden_states.shape[-1])
            self._parts = list(zip(*(x.tensor_split(chunks) for x in (rows, routing_map, probs)), strict=True))
        self.dispatchers = []
        for _, part_map, _ in self._parts:
            # Padding filled every expert's capacity before tokens were cut into chunks, of which none has that many.
            dispatcher = token_dispatcher.dispatcher_for_one_flight(moe, keeps_capacity=chunks == 1)
            token_dispatcher.exchange_counts(dispatcher, part_map, travels_topk=travels_topk)
            self.dispatchers.append(dispatcher)

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """See ``contracts.Cargo``."""
        return self.dispatchers[chunk].dispatch_preprocess(*self._parts[chunk])

    def unpack(self, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``contracts.Cargo``."""
        tokens, weights = arrived
        return tokens, weights

    def deliver(self, chunk: int, outputs: Tensor) -> Tensor:
        """See ``contracts.Cargo``."""
        return self.dispatchers[chunk].combine_postprocess(outputs)

    def join(self, delivered: list[Tensor]) -> Tensor:
        """See ``contracts.Cargo``."""
        return delivered[0] if len(delivered) == 1 else torch.cat(delivered).view(self._shape)
