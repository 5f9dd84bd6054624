"""Core's token dispatcher, for one flight each: a copy of it, the counts that ranks exchange, and rows by expert."""

from __future__ import annotations

import copy

import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def dispatcher_for_one_flight(moe: MoELayer, *, keeps_capacity: bool) -> MoEAlltoAllTokenDispatcher:
    """A dispatcher that holds the state of one flight alone.

    Core's writes the state of the current dispatch onto itself (14 attributes), so two dispatches of one layer that fly
    at once would overwrite each other. A shallow copy shares everything that does not change.

    Args:
        moe: the layer whose tokens fly.
        keeps_capacity: whether as many rows as the router padded each expert to travel in this flight.
    """
    dispatcher = copy.copy(moe.token_dispatcher)
    if not keeps_capacity:
        dispatcher.drop_and_pad = False
    return dispatcher


def exchange_counts(dispatcher: MoEAlltoAllTokenDispatcher, routing_map: Tensor, *, travels_topk: bool = True) -> None:
    """Let ``dispatcher`` know what every rank sends.

    Core exchanges the counts where it permutes the tokens. Here that happens before, for all chunks.

    Args:
        dispatcher: of one flight.
        routing_map: which expert gets which token, bool, [n, experts].
        travels_topk: whether every token goes to as many experts as the router chose, unless capacity drops some.
    """
    tokens_per_expert = dispatcher.preprocess(routing_map)
    if not travels_topk:
        # What Core does where capacity drops tokens, with a host sync before it permutes.
        dispatcher.num_out_tokens = routing_map.sum()
        dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    dispatcher.preprocess = lambda _routing_map: tokens_per_expert


def rows_by_expert(
    dispatcher: MoEAlltoAllTokenDispatcher,
    hidden_states: Tensor,
    routing_map: Tensor,
    probs: Tensor,
    *,
    travels_topk: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their experts, one row for each choice, and their gate weights; nothing is exchanged.

    Args:
        dispatcher: takes note of how to put the rows back in token order.
        hidden_states: [..., h], n tokens.
        routing_map: which expert gets which token, bool, [n, experts].
        probs: gate weights, [n, experts].
        travels_topk: see ``exchange_counts``.
    """
    if travels_topk and dispatcher.config.moe_expert_capacity_factor is None:
        dispatcher.num_out_tokens = routing_map.shape[0] * dispatcher.config.moe_router_topk
    else:
        dispatcher.num_out_tokens = int(routing_map.sum())  # a host sync, which Core has here too where it does not pad
    dispatcher.preprocess = lambda _routing_map: None
    dispatcher.num_global_tokens_per_local_expert = None  # Core copies it to the host, where its preprocess has set it
    rows, weights = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
    del dispatcher.preprocess
    return rows, weights


def exchange_row_counts(dispatcher: MoEAlltoAllTokenDispatcher, rows_per_expert: Tensor, probs: Tensor) -> None:
    """Let ``dispatcher`` know what every rank sends, where that is not its tokens.

    Args:
        dispatcher: of one flight.
        rows_per_expert: what this rank sends to each expert, [experts].
        probs: gate weights; Core sums outputs over tensor-parallel ranks in their dtype.
    """
    dispatcher.probs = probs
    # One row of counts has the column sums of a routing map with that many tokens.
    tokens_per_expert = dispatcher.preprocess(rows_per_expert.unsqueeze(0))
    # Core copies the counts to the host where it permutes tokens, which is done by now.
    dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize("before_permutation_1", tokens_per_expert)


def split_rows(dispatcher: MoEAlltoAllTokenDispatcher) -> tuple[list[int] | None, list[int] | None]:
    """Rows that ``dispatcher`` sends to and receives from each expert-parallel rank; None for equal parts.

    On a GPU this is the one host sync of a dispatch (none where experts are padded to capacity). With a codec, capacity
    or zero experts ask for one more (``rows_by_expert``), as capacity does in Core.
    """
    dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize(
        "before_ep_alltoall", dispatcher.tokens_per_expert
    )
    if dispatcher.input_splits is None:
        return None, None
    return dispatcher.input_splits.tolist(), dispatcher.output_splits.tolist()


def sort_plainly_if_empty(dispatcher: MoEAlltoAllTokenDispatcher) -> None:
    """Let ``dispatcher``, to whom no rows came, leave them as they are, on the way in and out.

    Transformer Engine's fused sort (--moe-permute-fusion) ends with an error there, or in backward (upstream 1877). The
    rows that this rank sent are put back by the fused permutation all the same: nothing else can read its map.
    """
    if not dispatcher.config.moe_permute_fusion:
        return
    split_rows(dispatcher)  # waits for the counts
    rows_of_group = dispatcher.output_splits_tp  # Core sorts what tensor-parallel ranks have gathered
    if rows_of_group is not None and not rows_of_group.any():
        dispatcher.num_local_experts = 1  # for whom there is no order


def num_rows_to_send(dispatcher: MoEAlltoAllTokenDispatcher) -> int:
    """Rows that this rank sends after ``exchange_row_counts``, those for its own experts included."""
    send_rows, _ = split_rows(dispatcher)
    return sum(_own_counts(dispatcher)) if send_rows is None else sum(send_rows)


BAD_ROWS = -(1 << 40)
"""Counts that a rank with bad rows gives to ``exchange_row_counts``: any sum with counts of others is negative."""


def ranks_with_bad_rows(dispatcher: MoEAlltoAllTokenDispatcher) -> list[str]:
    """Who gave ``exchange_row_counts`` BAD_ROWS and sends to this rank, or to another of its expert-tensor group."""
    _, receive_rows = split_rows(dispatcher)
    bad = _with_negative(dispatcher.ep_group, [min(_own_counts(dispatcher))] if receive_rows is None else receive_rows)
    if dispatcher.tp_size > 1:
        # Of the others in its tensor group this rank knows what they get from all of their expert-parallel peers.
        of_group = _with_negative(dispatcher.tp_group, dispatcher.output_splits_tp.tolist())
        if dispatcher.ep_size == 1:
            return of_group
        mine = str(dist.get_rank())
        bad += [f"{rank} or an expert-parallel peer of it" for rank in of_group if rank != mine]
    return bad


def _with_negative(group: dist.ProcessGroup, counts: list[int]) -> list[str]:
    ranks = dist.get_process_group_ranks(group)
    return [str(rank) for rank, count in zip(ranks, counts, strict=True) if count < 0]


def _own_counts(dispatcher: MoEAlltoAllTokenDispatcher) -> list[int]:
    """Rows of every expert where there is one rank, for whom Core waits later than here: only before the experts."""
    dispatcher.d2h_event.synchronize()
    return dispatcher.tokens_per_expert.tolist()
