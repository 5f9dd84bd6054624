"""Core's token dispatcher where a token travels to a rank once, whatever number of that rank's experts want it."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from numpy.typing import NDArray
from torch import Tensor

from megatron_scmoe.mcore.token_dispatcher import Counts, dispatcher_for_one_flight


class UniqueRowsDispatcher(MoEAlltoAllTokenDispatcher):
    """Core's stages for one flight of such rows: at home they are sorted by rank, and spread where they arrive.

    Core's own permutation does both: first with ranks in the place of experts, then with arrived rows in the place of
    tokens. Experts read the rows that they would have read, in the same order, and weigh their outputs; a row's are
    summed before they travel back. Expert-tensor-parallel ranks exchange rows before they are spread and behind the
    sum.

    Args:
        moe: the layer whose tokens fly.
    """

    def __init__(self, moe: MoELayer) -> None:
        core = dispatcher_for_one_flight(moe, keeps_capacity=False)  # what pads an expert does not travel
        self.__dict__.update(vars(core))
        self._experts_here: int = core.num_local_experts
        self.num_local_experts = 1  # what arrives is in no order of experts, so that Core has nothing to sort

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the order of their ranks, [rows, w], and the weights of each for the experts there, [rows, experts].

        Args:
            hidden_states: [..., w], n tokens. ``num_out_tokens`` says how many rows they make.
            routing_map: which expert gets which token, bool, [n, experts of all ranks].
            probs: gate weights, 0 where the map has nothing, in its shape.
        """
        tokens = hidden_states.view(-1, hidden_states.shape[-1])
        self.hidden_shape, self.hidden_shape_before_permute, self.probs = hidden_states.shape, tokens.shape, probs
        at_rank = ranks_of(routing_map, self.ep_size)
        rows, _, self.reversed_local_input_permutation_mapping, _, _ = permute(
            tokens, at_rank, num_out_tokens=self.num_out_tokens, fused=self._fused(self.num_out_tokens)
        )
        # By rank and then by token, as permuted rows are, fused or not; and the host waits for nothing.
        rank, token = torch.nonzero_static(at_rank.T, size=self.num_out_tokens).unbind(1)
        weights = probs.reshape(-1, self._experts_here).index_select(0, token * self.ep_size + rank)
        return rows, weights

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that experts read, [spread rows, w], how many are for each, and their weights, [spread rows].

        Args:
            global_input_tokens: rows that arrived, [rows, w].
            global_probs: their weights, [rows, experts]; 0 for experts that do not get them.
        """
        rows, rows_per_expert, weights = super().dispatch_postprocess(global_input_tokens, global_probs)
        num_spread = int(rows_per_expert.numpy().sum())
        self._arrived_shape, self._spread_fused = rows.shape, self._fused(num_spread)
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
        sums = unpermute(
            permutated_local_input_tokens,
            self.reversed_local_input_permutation_mapping,
            restore_shape=self.hidden_shape_before_permute,
            fused=self._fused(self.num_out_tokens),
        )
        return sums.view(self.hidden_shape)

    def _fused(self, num_rows: int) -> bool:
        # Without rows Transformer Engine's inverse gives back what it got, whatever the shape should be.
        return self.config.moe_permute_fusion and num_rows > 0


def experts_of_rows(weights: Tensor, _rows_per_expert: Tensor) -> Tensor:
    """Which expert gets which arrived row, bool, [rows, experts], by the weights, in that shape; so many for each."""
    return weights != 0


def ranks_of(routing_map: Tensor, ep_size: int) -> Tensor:
    """Which rank gets which token, bool, [n, ranks], of which expert does, bool, [n, experts]."""
    return routing_map.unflatten(1, (ep_size, -1)).any(dim=-1)


class UniqueCounts(Counts):
    """``Counts`` of rows that are fewer than the choices of experts: both are exchanged at once.

    Args:
        dispatcher: of any of the flights.
        routing_maps: of each chunk, bool, [n, experts].
    """

    def __init__(self, dispatcher: UniqueRowsDispatcher, routing_maps: list[Tensor]) -> None:
        size = dispatcher.ep_size
        choices = torch.stack([one.sum(dim=0) for one in routing_maps]).view(len(routing_maps), size, -1)
        rows = torch.stack([ranks_of(one, size).sum(dim=0) for one in routing_maps])
        super().__init__(dispatcher, torch.cat([choices, rows.unsqueeze(-1)], dim=-1).flatten(1))

    def tell(self, dispatcher: MoEAlltoAllTokenDispatcher, chunk: int) -> None:
        """Tell the dispatcher of a flight what arrives, and how many rows its experts get of that."""
        arriving = self._on_host[1][chunk]
        dispatcher.tokens_per_expert = torch.from_numpy(arriving[..., :-1].sum(axis=(0, 1)))
        dispatcher.output_splits_tp = self._rows(arriving).sum(axis=1)

    @staticmethod
    def _rows(counted: NDArray[np.int64]) -> NDArray[np.int64]:
        return counted[..., -1]
