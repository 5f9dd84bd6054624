"""What every format on disk looks like from here: named tensors whose rows are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, converted or written. The message is one line: what, where, the fix."""


class TensorInfo(NamedTuple):
    """A tensor that may still lie on disk.

    Attributes:
        shape: of the whole tensor.
        dtype: as it is stored.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize  # torch.Size.numel overflows: 2**32 x 2**32 would be 0


class Tensors(Protocol):
    """Tensors by name, of which no more is in memory than what was asked for.

    Attributes:
        infos: every tensor of the model by its name; no optimizer state.
    """

    infos: Mapping[str, TensorInfo]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor along its first dimension, as a tensor of its own; a scalar whole.

        Raises:
            CheckpointError: where the file is cut short or holds something else.
        """


def row_range(name: str, info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """The rows that ``Tensors.read`` is asked for, as two numbers; a scalar has one row.

    Raises:
        CheckpointError: where the tensor has fewer.
    """
    rows = info.shape[0] if info.shape else 1
    last = rows if stop is None else stop
    if not 0 <= start <= last <= rows or (not info.shape and (start, last) != (0, 1)):
        raise CheckpointError(
            f"{name} has {rows} rows, and rows {start} to {last} are asked for; the source is damaged"
        )
    return start, last
