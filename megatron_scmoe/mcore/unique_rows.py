"""Core's token dispatcher where a token travels to a place once, whatever number of the experts there want it."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from numpy.typing import NDArray
from torch import Tensor

from megatron_scmoe.mcore.token_dispatcher import Check, Counts, dispatcher_for_one_flight


class PlacedRows:
    """Tokens once for each place, a rank or a node, that has experts of theirs; and each token's sum when it is back.

    Core's own permutation, with places in the role of experts.

    Args:
        places: with as many experts each, in their order.
        fuses: whether Transformer Engine permutes.
    """

    def __init__(self, places: int, *, fuses: bool) -> None:
        self._places, self._fuses = places, fuses

    def sort(self, tokens: Tensor, routing_map: Tensor, probs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Rows in the order of their places, [rows, w], and the weights of each for the experts there, [rows, experts].

        Args:
            tokens: [n, w].
            routing_map: which expert gets which token, bool, [n, experts of all places].
            probs: gate weights, 0 where the map has nothing, in its shape.
            num_rows: that they make.
        """
        self._shape, self._fused = tokens.shape, _fuses_rows(self._fuses, num_rows)
        at_place = _places_of(routing_map, self._places)
        rows, _, self._mapping, _, _ = permute(tokens, at_place, num_out_tokens=num_rows, fused=self._fused)
        # By place and then by token, as permuted rows are, fused or not; and the host waits for nothing.
        place, token = torch.nonzero_static(at_place.T, size=num_rows).unbind(1)
        of_places = probs.reshape(-1, probs.shape[1] // self._places)
        return rows, of_places.index_select(0, token * self._places + place)

    def sums(self, rows: Tensor) -> Tensor:
        """The sum of each token's rows, [n, w], from those that came back, [rows, w]."""
        return unpermute(rows, self._mapping, restore_shape=self._shape, fused=self._fused)


class UniqueRowsDispatcher(MoEAlltoAllTokenDispatcher):
    """Core's stages for one flight of such rows: at home they are sorted by place, and spread where they arrive.

    Core's own permutation does both: first with places in the role of experts, then with arrived rows in the role of
    tokens. Experts read the rows that they would have read, and weigh their outputs; a row's are summed before they
    travel back. Expert-tensor-parallel ranks exchange rows before they are spread and behind the sum.

    Args:
        moe: the layer whose tokens fly.
        places: that rows are for, in the order of the experts there.
    """

    def __init__(self, moe: MoELayer, places: int) -> None:
        core = dispatcher_for_one_flight(moe, keeps_capacity=False)  # what pads an expert does not travel
        self.__dict__.update(vars(core))
        self.num_local_experts = 1  # what arrives is in no order of experts, so that Core has nothing to sort
        self._placed = PlacedRows(places, fuses=self.config.moe_permute_fusion)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """See ``PlacedRows.sort``; ``num_out_tokens`` says how many rows there are.

        Args:
            hidden_states: [..., w], n tokens.
            routing_map: which expert gets which token, bool, [n, experts of all ranks].
            probs: gate weights, 0 where the map has nothing, in its shape.
        """
        self.hidden_shape, self.probs = hidden_states.shape, probs
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        return self._placed.sort(tokens, routing_map, probs, self.num_out_tokens)

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that experts read, [spread rows, w], how many are for each, and their weights, [spread rows].

        Args:
            global_input_tokens: rows that arrived, [rows, w].
            global_probs: their weights, [rows, experts]; 0 for experts that do not get them.
        """
        rows, rows_per_expert, weights = super().dispatch_postprocess(global_input_tokens, global_probs)
        num_spread = int(rows_per_expert.numpy().sum())
        self._arrived_shape, self._spread_fused = rows.shape, _fuses_rows(self.config.moe_permute_fusion, num_spread)
        rows, weights, self._spread_mapping, _, _ = permute(
            rows,
            experts_of_rows(weights, rows_per_expert),
            probs=weights,
            num_out_tokens=num_spread,
            fused=self._spread_fused,
        )
        return rows, rows_per_expert, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum of each arrived row's outputs, [rows, w], from those of its experts, [spread rows, w]."""
        sums = unpermute(
            hidden_states, self._spread_mapping, restore_shape=self._arrived_shape, fused=self._spread_fused
        )
        return super().combine_preprocess(sums)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """The sum of each token's rows, [..., w], from those that came back, [rows, w]."""
        return self._placed.sums(permutated_local_input_tokens).view(self.hidden_shape)


def experts_of_rows(weights: Tensor, _rows_per_expert: Tensor) -> Tensor:
    """Which expert gets which arrived row, bool, [rows, experts], by the weights, in that shape; so many for each."""
    return weights != 0


def _fuses_rows(fuses: bool, num_rows: int) -> bool:
    """Without rows Transformer Engine's inverse gives back what it got, whatever the shape should be."""
    return fuses and num_rows > 0


def _places_of(routing_map: Tensor, places: int) -> Tensor:
    """Which place gets which token, bool, [n, places], of which expert does, bool, [n, experts]."""
    return routing_map.unflatten(1, (places, -1)).any(dim=-1)


class UniqueCounts(Counts):
    """``Counts`` of rows that are fewer than the choices of experts: both are exchanged at once.

    Args:
        dispatcher: of any of the flights.
        routing_maps: of each chunk, bool, [n, experts].
        check: as in ``Counts``.
    """

    def __init__(
        self, dispatcher: UniqueRowsDispatcher, routing_maps: list[Tensor], check: Check | None = None
    ) -> None:
        size = dispatcher.ep_size
        rows = _rows_for(size, routing_maps).unsqueeze(-1)
        super().__init__(dispatcher, torch.cat([_choices(size, routing_maps), rows], dim=-1).flatten(1), check)

    def tell(self, dispatcher: MoEAlltoAllTokenDispatcher, chunk: int) -> None:
        """Tell the dispatcher of a flight what arrives, and how many rows its experts get of that."""
        arriving = self._on_host[1][chunk]
        dispatcher.tokens_per_expert = torch.from_numpy(arriving[..., :-1].sum(axis=(0, 1)))
        dispatcher.output_splits_tp = self._rows(arriving).sum(axis=1)

    @staticmethod
    def _rows(counted: NDArray[np.int64]) -> NDArray[np.int64]:
        return counted[..., -1]


class NodeCounts(Counts):
    """``Counts`` of rows that travel across nodes, and then inside them; all are exchanged at once, with the choices.

    Each rank is told, of each rank's tokens, how many want each of its experts, how many go to its node, and how many
    to each rank of that: what comes to its neighbours tells it what they send on to it.

    Args:
        dispatcher: of any of the flights.
        routing_maps: of each chunk, bool, [n, experts].
        nodes: that the expert-parallel ranks lie on, one behind the other.
        check: as in ``Counts``.
    """

    def __init__(
        self, dispatcher: UniqueRowsDispatcher, routing_maps: list[Tensor], nodes: int, check: Check | None = None
    ) -> None:
        size, chunks = dispatcher.ep_size, len(routing_maps)
        self._mates, self._local = size // nodes, dispatcher.ep_rank % (size // nodes)
        for_mates = _rows_for(size, routing_maps).view(chunks, nodes, 1, self._mates)
        for_mates = for_mates.expand(-1, -1, self._mates, -1).reshape(chunks, size, self._mates)
        for_node = _rows_for(nodes, routing_maps).repeat_interleave(self._mates, dim=1).unsqueeze(-1)
        own = torch.cat([_choices(size, routing_maps), for_mates, for_node], dim=-1)
        super().__init__(dispatcher, own.flatten(1), check)

    def split_rows(self, chunk: int) -> tuple[list[int], list[int]]:
        """Rows that this rank sends to and receives from the rank of its local number on each node."""
        own, arriving = self._on_host
        here = arriving[chunk, self._tp_rank, self._local :: self._mates]
        return own[chunk, :: self._mates, -1].tolist(), here[:, -1].tolist()

    def split_inside(self, chunk: int) -> tuple[list[int], list[int]]:
        """Rows that this rank sends to and receives from each rank of its node, of what came to it from all nodes."""
        arriving = self._for_mates(chunk)[self._tp_rank]
        of_mates = arriving.reshape(-1, self._mates, self._mates).sum(axis=0)  # to whom a row came, for whom it is
        return of_mates[self._local].tolist(), of_mates[:, self._local].tolist()

    def tell(self, dispatcher: MoEAlltoAllTokenDispatcher, chunk: int) -> None:
        """Tell the dispatcher of a flight what arrives at last, and how many rows its experts get of that."""
        choices = self._on_host[1][chunk][..., : -1 - self._mates]
        dispatcher.tokens_per_expert = torch.from_numpy(choices.sum(axis=(0, 1)))
        dispatcher.output_splits_tp = self._for_mates(chunk)[..., self._local].sum(axis=1)

    def _for_mates(self, chunk: int) -> NDArray[np.int64]:
        """Rows for each rank of this node, of each rank's tokens, [TP, EP, ranks of a node]."""
        return self._on_host[1][chunk][..., -1 - self._mates : -1]


def _rows_for(places: int, routing_maps: list[Tensor]) -> Tensor:
    """Tokens that go to each place, [chunks, places], of which expert gets which token, bool, [n, experts] each."""
    return torch.stack([_places_of(one, places).sum(dim=0) for one in routing_maps])


def _choices(ep_size: int, routing_maps: list[Tensor]) -> Tensor:
    """Of each expert, [chunks, EP, experts of a rank]."""
    return torch.stack([one.sum(dim=0) for one in routing_maps]).view(len(routing_maps), ep_size, -1)
