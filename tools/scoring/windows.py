"""Windows over a row of documents: which tokens a model sees at once, and which of them it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a file, of which those from ``first`` on are scored.

    The model reads all of them but the last one. Each is scored with those before it, back to ``begin``, as context.
    """

    begin: int
    first: int
    end: int

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return self.end - 1 - self.begin


def plan(offsets: NDArray[numpy.int64], length: int, stride: int) -> list[Window]:
    """Windows that score every token of every document once, except the first one, before which there is nothing.

    The first window of a document scores ``length`` tokens. Every other one begins ``stride`` tokens behind the one
    before it and scores the ``stride`` tokens that follow, each with at least ``length + 1 - stride`` as context.

    ``offsets`` say where each document begins; one more says where the last one ends.
    """
    windows = []
    for begin, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        first = begin + 1
        while first < stop:
            end = min(begin + length + 1, stop)
            windows.append(Window(begin, first, end))
            begin, first = begin + stride, end  # noqa: PLW2901 - the next window of this document
    return windows


class Batch(NamedTuple):
    """What one rank reads in one call: tokens and the labels behind them, [micro-batches, b, s] each.

    Places without a window read zeros. Each window comes with its micro-batch and its row; ``length`` is that of all
    ranks' windows together, in tokens read.
    """

    tokens: Tensor
    labels: Tensor
    windows: list[tuple[int, int, Window]]
    length: int


def batches(
    ids: NDArray[numpy.int32],
    windows: list[Window],
    *,
    micro_batches: int,
    size: int,
    data_rank: int,
    data_size: int,
    multiple: int,
) -> Iterator[Batch]:
    """Deal windows to data-parallel ranks, those of like lengths together; all ranks get as many batches.

    Each has ``micro_batches`` of ``size`` windows, whose length is rounded up to a ``multiple``.
    """
    ordered = sorted(windows, key=lambda window: -window.length)
    of_all = micro_batches * size * data_size
    for start in range(0, len(ordered), of_all):
        step = ordered[start : start + of_all]
        longest = -(-step[0].length // multiple) * multiple
        tokens = torch.zeros(micro_batches, size, longest, dtype=torch.int64)
        labels = torch.zeros_like(tokens)
        placed = []
        for place, window in enumerate(step[data_rank::data_size]):
            micro_batch, row = divmod(place, size)
            seen = torch.from_numpy(ids[window.begin : window.end].astype(numpy.int64))
            tokens[micro_batch, row, : window.length] = seen[:-1]
            labels[micro_batch, row, : window.length] = seen[1:]
            placed.append((micro_batch, row, window))
        yield Batch(tokens, labels, placed, sum(window.length for window in step))
