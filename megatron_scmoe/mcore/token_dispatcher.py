"""Core's token dispatcher, for one flight each: a copy of it, the counts that ranks exchange, and rows by expert."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from numpy.typing import NDArray
from torch import Tensor

_BAD_ROWS = -(1 << 40)
"""Counts that a rank with bad rows announces: any sum with counts of others is negative."""

_NEVER = "no_sync"  # a point of Core's that no stage comes by


class Check(NamedTuple):
    """Whether a rank's rows are what they should be, for ``Counts`` to tell the others.

    Attributes:
        passed: bool, on the device.
        words: whose rows it is about and what is wrong with those that fail.
        fix: what to do then.
    """

    passed: Tensor
    words: str
    fix: str = "the training has diverged; lower --lr, or load an earlier checkpoint (--ckpt-step)"


def dispatcher_for_one_flight(moe: MoELayer, *, keeps_capacity: bool) -> MoEAlltoAllTokenDispatcher:
    """A dispatcher that holds the state of one flight alone.

    Core's writes the state of the current dispatch onto itself (14 attributes), so two dispatches of one layer that fly
    at once would overwrite each other. A shallow copy shares everything that does not change. How many rows travel,
    which Core's finds out and waits for where it permutes tokens, ``Counts`` tells it; but for experts that are padded
    to capacity, of whom it knows.

    Args:
        moe: the layer whose tokens fly.
        keeps_capacity: whether as many rows as the router padded each expert to travel in this flight.
    """
    dispatcher = copy.copy(moe.token_dispatcher)
    if not keeps_capacity:
        dispatcher.drop_and_pad = False
    if not dispatcher.drop_and_pad:
        dispatcher.preprocess = _count_nothing
        dispatcher.cuda_dtoh_point = dispatcher.cuda_sync_point = _NEVER
    return dispatcher


def _count_nothing(_routing_map: Tensor) -> None: ...


class Counts:
    """How many rows ranks send to one another in each chunk of one routing.

    One all-gather and one copy to the host carry those of all chunks, and begin when this is made: ahead of the first
    payload, behind which they would queue. The host waits once, when it first asks. Where experts are padded to
    capacity, parts are equal: nothing is exchanged, and nobody waits.

    Args:
        dispatcher: of any of the flights.
        rows_per_expert: what this rank sends, [chunks, experts], or other counts, as many for each rank.
        check: of this rank's rows; what fails is announced in the place of its counts, so that hosts learn of it where
            they wait anyway. Nothing tells of it where experts are padded.

    Raises:
        ValueError: when the host first asks, where a check has failed on a rank: on every rank of the expert-parallel
            group and of the expert-tensor-parallel one.
    """

    def __init__(
        self, dispatcher: MoEAlltoAllTokenDispatcher, rows_per_expert: Tensor, check: Check | None = None
    ) -> None:
        self._dispatcher_groups = dispatcher.ep_group, dispatcher.tp_group
        self._check = check
        self._padded = dispatcher.drop_and_pad
        if self._padded:
            return
        self._tp_rank = dispatcher.tp_rank
        own = rows_per_expert.long()
        if check is not None:
            own = torch.where(check.passed, own, _BAD_ROWS)
        of_ranks = gather_from_sequence_parallel_region(own, group=dispatcher.tp_ep_group)
        of_ranks = of_ranks.view(dispatcher.ep_size, dispatcher.tp_size, *own.shape)
        num_local = own.shape[1] // dispatcher.ep_size
        first = dispatcher.ep_rank * num_local
        # For this rank's experts alone, [chunks, TP, EP, local experts]: so Core has what a flight brings.
        self._arriving = of_ranks[..., first : first + num_local].permute(2, 1, 0, 3).contiguous()
        self._own_shape = own.shape[0], dispatcher.ep_size, num_local
        both = torch.cat([own.flatten(), self._arriving.flatten()])
        stream = dispatcher.cuda_dtoh_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._copy = moe_utils.maybe_move_tensor_to_cpu(both, as_numpy=True, record_stream=True)
        self._copied = stream.record_event()

    def split_rows(self, chunk: int) -> tuple[list[int] | None, list[int] | None]:
        """Rows that this rank sends to and receives from each expert-parallel rank; None for equal parts."""
        if self._padded:
            return None, None
        own, arriving = self._on_host
        return self._rows(own[chunk]).tolist(), self._rows(arriving[chunk, self._tp_rank]).tolist()

    def num_rows_to_send(self, chunk: int) -> int:
        """Rows that this rank sends, those for its own experts included; 0 where Core's dispatcher counts them."""
        rows, _ = self.split_rows(chunk)
        return 0 if rows is None else sum(rows)

    def tell(self, dispatcher: MoEAlltoAllTokenDispatcher, chunk: int) -> None:
        """Tell the dispatcher of a flight what arrives, which its stages behind the dispatch read."""
        if self._padded:
            return
        arriving = self._on_host[1][chunk]
        dispatcher.tokens_per_expert = torch.from_numpy(arriving.sum(axis=(0, 1)))
        dispatcher.output_splits_tp = arriving.sum(axis=(1, 2))
        sort_nothing_if_empty(dispatcher, int(arriving.sum()))
        by_sender = self._arriving[chunk] if dispatcher.config.moe_permute_fusion else torch.from_numpy(arriving)
        dispatcher.num_global_tokens_per_local_expert = by_sender.view(-1, arriving.shape[-1])

    def _ranks_with_bad_rows(self, arriving: NDArray[np.int64]) -> list[str]:
        """Who announced bad rows and sends to this rank, or to another of its expert-tensor group.

        Args:
            arriving: of a chunk, [TP, EP, local experts].
        """
        ep_group, tp_group = self._dispatcher_groups
        bad = _with_negative(ep_group, arriving[self._tp_rank].sum(axis=-1).tolist())
        if tp_group.size() > 1:
            # Of the others in its tensor group this rank knows what they get from all of their expert-parallel peers.
            of_group = _with_negative(tp_group, arriving.sum(axis=(1, 2)).tolist())
            if ep_group.size() == 1:
                return of_group
            mine = str(dist.get_rank())
            bad += [f"{rank} or an expert-parallel peer of it" for rank in of_group if rank != mine]
        return bad

    @staticmethod
    def _rows(counted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows that travel, [...], of what is counted for a rank, [..., local experts]."""
        return counted.sum(axis=-1)

    @cached_property
    def _on_host(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Own rows, [chunks, EP, local experts], and arriving ones, as on the device; the one wait of a routing."""
        self._copied.synchronize()
        own, arriving = np.split(self._copy, [int(np.prod(self._own_shape))])
        arriving = arriving.reshape(self._arriving.shape)
        if self._check is not None and (ranks := self._ranks_with_bad_rows(arriving[0])):
            raise ValueError(f"{self._check.words}; rank(s) {', '.join(ranks)} have some: {self._check.fix}")
        return own.reshape(self._own_shape), arriving


def sort_nothing_if_empty(dispatcher: MoEAlltoAllTokenDispatcher, num_rows: int) -> None:
    """Let ``dispatcher``, to whom no rows came, leave them as they are, on the way in and out.

    Transformer Engine's fused sort (--moe-permute-fusion) ends with an error there, or in backward (upstream 1877). The
    rows that this rank sent are put back by the fused permutation all the same: nothing else can read its map.
    """
    if dispatcher.config.moe_permute_fusion and not num_rows:
        dispatcher.num_local_experts = 1  # for whom there is no order


def _with_negative(group: dist.ProcessGroup, counts: list[int]) -> list[str]:
    ranks = dist.get_process_group_ranks(group)
    return [str(rank) for rank, count in zip(ranks, counts, strict=True) if count < 0]


def rows_without_drops(dispatcher: MoEAlltoAllTokenDispatcher, routing_map: Tensor, *, travels_topk: bool) -> int:
    """Rows of a routing [n, experts] where the host knows them without a look at it; else 0.

    Args:
        dispatcher: of the flight.
        routing_map: which expert gets which token, bool, [n, experts].
        travels_topk: whether every token goes to as many experts as the router chose, unless capacity drops some.
    """
    config = dispatcher.config
    knows = travels_topk and config.moe_expert_capacity_factor is None
    return routing_map.shape[0] * config.moe_router_topk if knows else 0


def rows_by_expert(
    dispatcher: MoEAlltoAllTokenDispatcher, hidden_states: Tensor, routing_map: Tensor, probs: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their experts, one row for each choice, and their gate weights; nothing is exchanged.

    Args:
        dispatcher: takes note of how to put the rows back in token order.
        hidden_states: [..., h], n tokens.
        routing_map: which expert gets which token, bool, [n, experts].
        probs: gate weights, [n, experts].
        num_rows: choices in ``routing_map``; not read where experts are padded to capacity.
    """
    dispatcher.num_out_tokens = num_rows
    return dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
