"""Stands for Transformer Engine's fused permutations, by the contract that its documents and sources give them.

They are made of Core's own unfused functions, and keep what these do not have: a map of rows that nothing but the fused
inverse can read, split sizes that stay on the device, and what becomes of tensors without rows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

calls: Counter[str] = Counter()
"""Of each function, since this was imported."""


class OnHost(torch.Tensor):
    """A tensor that was copied to the host; what is made of it is there, too."""


def permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: Any = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, h] by expert, their weights, and the row of each token for each expert, -1 for none, [experts, n]."""
    from megatron.core.transformer.moe import moe_utils

    calls["permute"] += 1
    num_rows = int(num_out_tokens)
    assert num_rows == routing_map.sum(), "a wrong number of rows would be written out of bounds, or not at all"
    if not inp.numel():
        return inp, probs.new_empty(0), routing_map.new_empty(0)
    rows, weights, _, _, _ = moe_utils.permute(inp, routing_map, probs=probs, num_out_tokens=num_rows)
    row_of = torch.full(routing_map.T.shape, -1)
    row_of[routing_map.T] = torch.arange(num_rows)
    return rows, weights, row_of


def permute(inp: Tensor, routing_map: Tensor, num_out_tokens: Any = -1) -> tuple[Tensor, Tensor]:
    """Rows [n, h] by expert, and the map of ``permute_with_probs``."""
    rows, _, row_of = permute_with_probs(inp, routing_map.float(), routing_map, num_out_tokens)
    return rows, row_of


def unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    **_more: Any,
) -> Tensor:
    """The sum of each token's rows, [n, h]; without any row the input, whatever the shape."""
    from megatron.core.transformer.moe import moe_utils

    calls["unpermute"] += 1
    assert merging_probs is None, "Core's dispatcher merges nothing here"
    if not inp.numel():
        return inp
    tokens = torch.empty(inp.shape[0], dtype=torch.long)
    _, token = torch.where(row_id_map >= 0)
    tokens[row_id_map[row_id_map >= 0]] = token
    return moe_utils.unpermute(inp, tokens, restore_shape)


def sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    """Rows in chunks, in another order."""
    from megatron.core.transformer.moe import moe_utils

    calls["sort"] += 1
    _check_chunks(inp, split_sizes, sorted_index)
    return moe_utils.sort_chunks_by_idxs(inp, split_sizes, sorted_index)[0]


def sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows with their weights in chunks, in another order."""
    from megatron.core.transformer.moe import moe_utils

    calls["sort with weights"] += 1
    _check_chunks(inp, split_sizes, sorted_index)
    return moe_utils.sort_chunks_by_idxs(inp, split_sizes, sorted_index, probs=probs)


def _check_chunks(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> None:
    if not inp.numel():
        raise RuntimeError("nothing to sort")  # in some versions, or in backward (upstream 1877)
    assert not isinstance(split_sizes, OnHost) and not isinstance(sorted_index, OnHost), "they are read on the device"
    assert len(split_sizes) == len(sorted_index)


def install() -> None:
    """Let Core find them, and mark what it copies to the host; in a rank process, before a model is built."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    moe_utils.HAVE_TE = True
    moe_utils.fused_permute, moe_utils.fused_permute_with_probs = permute, permute_with_probs
    moe_utils.fused_unpermute = unpermute
    moe_utils.fused_sort_chunks_by_index = sort_chunks_by_index
    moe_utils.fused_sort_chunks_by_index_with_probs = sort_chunks_by_index_with_probs
    to_host = moe_utils.maybe_move_tensor_to_cpu

    def marked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = to_host(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.as_subclass(OnHost) if type(moved) is torch.Tensor else moved

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = marked
