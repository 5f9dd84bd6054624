"""Tensors side by side in one payload, and back: tokens with their gate weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WORD = torch.int64
_ALIGNMENT = 16
"""Bytes that each column of a row is filled up to: NCCL copies in such pieces where all peers' parts are aligned to
them, and else byte by byte."""


class Column(NamedTuple):
    """How one tensor lies in a packed payload: its dtype and the shape of one row."""

    dtype: torch.dtype
    row_shape: torch.Size

    @property
    def nbytes(self) -> int:
        """That one row takes, filled up with zeros."""
        return -(-self.row_shape.numel() * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Column]]:
    """Lay tensors of the same number of rows side by side, as words: views of their bytes, never a cast.

    One payload makes one collective where Core sends tokens and probabilities as two, but two passes over it at either
    end; so larger ones travel apart. One tensor is a payload as it is, without columns.
    """
    if len(tensors) == 1:
        return tensors[0].contiguous(), []
    columns = [Column(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
    return torch.cat([_words(tensor, column) for tensor, column in zip(tensors, columns, strict=True)], dim=1), columns


def bytes_of_row(tensors: Sequence[Tensor]) -> int:
    """Of the payload of ``tensors``."""
    columns = [Column(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
    if len(columns) == 1:
        return columns[0].row_shape.numel() * columns[0].dtype.itemsize
    return sum(column.nbytes for column in columns)


def _words(tensor: Tensor, column: Column) -> Tensor:
    rows = tensor.reshape(tensor.shape[0], column.row_shape.numel()).contiguous()
    missing = column.nbytes // column.dtype.itemsize - rows.shape[1]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    elif rows.storage_offset() * column.dtype.itemsize % _WORD.itemsize:
        rows = rows.clone()  # a row of a wider tensor
    return rows.view(_WORD)


def unpack(payload: Tensor, columns: list[Column]) -> tuple[Tensor, ...]:
    """Undo ``pack``; the payload may have another number of rows by now."""
    if not columns:
        return (payload,)
    parts = payload.split([column.nbytes // _WORD.itemsize for column in columns], dim=1)
    return tuple(
        # Laid out anew, to be read as another type. (``contiguous`` would leave a single row where it lies.)
        part.clone(memory_format=torch.contiguous_format)
        .view(column.dtype)[:, : column.row_shape.numel()]
        .reshape(payload.shape[0], *column.row_shape)
        .contiguous()
        for part, column in zip(parts, columns, strict=True)
    )
