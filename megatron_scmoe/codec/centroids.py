"""What travels in the place of tokens: centroids of clusters of them (LSH-MoE).

LSH-MoE (arXiv 2411.08446): tokens x bound for one expert are hashed, those of one bucket form a cluster, and its mean c
alone travels, in backward as well. The residual x - c and the gate weight p stay home; in the paper::

    y = sum over the token's experts of  p (E(c) + (x - c))

--lsh-compensation says what stands in the place of x - c: nothing by default, or a learned map of it
(``compensation.py``). With --lsh-refinement lloyd, tokens join the nearest mean before they are packed, which the paper
does not do. With --moe-latent-size x are the latents that experts read, and y is projected up. In evaluation tokens
travel as they are, unless --lsh-evaluation centroids asks for what training does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_scmoe.codec.compensation import ResidualMap
from megatron_scmoe.codec.lloyd import refined
from megatron_scmoe.codec.lsh import Hasher, cluster, means, owners, restore
from megatron_scmoe.codec.rate import RateControl
from megatron_scmoe.config import Compensation, Refinement
from megatron_scmoe.contracts import Form, TransferName
from megatron_scmoe.dispatch.exchange import Tag
from megatron_scmoe.mcore import blocks, token_dispatcher
from megatron_scmoe.overlap.plan import DECODE, ENCODE


class Centroids:
    """The means of clusters of tokens (``--a2a-codec lsh``); residuals and gate weights stay home.

    Clusters are found among all tokens of the routing and then cut into chunks, so these change rounding only.
    Gradients are exact for the function that the clusters make; which cluster a token belongs to has none.

    Args:
        hasher: decides which tokens are alike.
        rate_control: decides how many of its functions count; None for all.
        refinement: what becomes of the clusters that it finds.
        compensation: what is added for the residuals.
        residual_map: of the group, where compensation is lowrank.
        tag: whose flights they are.
        The others are those of ``Tokens``.
    """

    apart = False  # centroids travel without weights
    forms: Mapping[TransferName, Form] = MappingProxyType({})

    def __init__(
        self,
        moe: MoELayer,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        *,
        chunks: int,
        travels_topk: bool,
        hasher: Hasher,
        rate_control: RateControl | None,
        refinement: Refinement,
        compensation: Compensation,
        residual_map: ResidualMap | None,
        tag: Tag,
    ) -> None:
        tag.marker.now(ENCODE, call=tag.call)
        self._moe, self._tag = moe, tag
        self._compensation, self._residual_map = compensation, residual_map
        self._hasher, self._refinement = hasher, refinement
        self._home = token_dispatcher.dispatcher_for_one_flight(moe, keeps_capacity=False)
        if moe.config.moe_pad_expert_input_to_capacity:  # what fills an expert up is no choice of a token's
            routing_map = routing_map & (probs > 0)
        num_rows = token_dispatcher.rows_without_drops(self._home, routing_map, travels_topk=travels_topk)
        num_rows = num_rows or int(routing_map.sum())  # a host wait, which Core has here, too, where it does not pad
        rows, self._weights = token_dispatcher.rows_by_expert(
            self._home, blocks.to_experts(moe, hidden_states), routing_map, probs, num_rows
        )
        self._rows: Tensor | None = rows
        self._rows_per_expert = routing_map.sum(dim=0)
        if rate_control:
            keys, finite = hasher.keys(rows, rate_control.level, owners(self._rows_per_expert, rows.shape[0]))
        else:
            keys, finite = hasher.keys(rows)
        self._clusters = cluster(keys, self._rows_per_expert, chunks)
        if rate_control and torch.is_grad_enabled():
            rate_control.see(self._clusters)
        self._parts: dict[int, Tensor] = {}
        self._residual: tuple[Tensor, Tensor] | None = None
        self.dispatchers = [
            token_dispatcher.dispatcher_for_one_flight(moe, keeps_capacity=False) for _ in range(chunks)
        ]
        for dispatcher in self.dispatchers:
            dispatcher.probs = probs  # outputs are summed over tensor-parallel ranks in their dtype
        words = f"group {tag.marker.group}: tokens with NaN or infinity cannot be hashed"
        check = token_dispatcher.Check(finite, words)
        self.counts = token_dispatcher.Counts(self._home, self._clusters.per_expert, check)

    def pack(self, chunk: int) -> tuple[Tensor, ...]:
        """See ``contracts.Cargo``."""
        if self._rows is not None:
            self._find_centroids(self._rows)
            self._rows = None  # what compensation does not need is free while the experts run
        return (self._parts.pop(chunk),)

    def _find_centroids(self, rows: Tensor) -> None:
        rows_of_chunks = [self.counts.num_rows_to_send(chunk) for chunk in range(len(self.dispatchers))]
        if self._refinement is Refinement.LLOYD:
            sketches = self._hasher.sketches(rows)
            self._clusters = refined(self._clusters, sketches, self._rows_per_expert, sum(rows_of_chunks))
        centroids = means(rows, self._clusters, sum(rows_of_chunks))
        self._parts = dict(enumerate(centroids.split(rows_of_chunks)))
        if self._compensation is not Compensation.NONE:
            self._residual = rows, centroids
        self._tag.marker.compression(rows, centroids, self._clusters.ids, self._clusters.sizes)

    def unpack(self, arrived: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``contracts.Cargo``."""
        (centroids,) = arrived
        return centroids, centroids.new_ones(centroids.shape[0])

    def deliver(self, _chunk: int, outputs: Tensor) -> Tensor:
        """See ``contracts.Cargo``."""
        return outputs

    def join(self, delivered: list[Tensor]) -> Tensor:
        """See ``contracts.Cargo``."""
        marker, call, last = self._tag.marker, self._tag.call, len(delivered) - 1
        marker.now(DECODE, last, call=call)
        outputs = delivered[0] if len(delivered) == 1 else torch.cat(delivered)
        paper = self._compensation is Compensation.PAPER
        rows = restore(outputs, self._clusters, self._weights, self._residual if paper else None)
        if self._residual_map is not None:
            assert self._residual is not None
            tokens, centroids = self._residual
            residuals = tokens - centroids[self._clusters.ids]
            mapped = self._residual_map(residuals, self._rows_per_expert)
            rows = rows + (mapped * self._weights.unsqueeze(-1)).to(mapped.dtype)
        output = blocks.from_experts(self._moe, self._home.combine_postprocess(rows))
        marker.in_backward(DECODE, output, last, call=call)
        return output
