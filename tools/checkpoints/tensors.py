"""What every format on disk looks like from here: named tensors whose rows are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import UserError
from torch import Tensor


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, converted or written. The message is one line: what, where, the fix."""


def is_countable(shape: Sequence[int]) -> bool:
    """Whether torch can count bytes and strides of an untrusted shape; one without elements may claim any sizes."""
    return math.prod(max(size, 1) for size in shape) < 1 << 59


class TensorInfo(NamedTuple):
    """Shape of a tensor that may still lie on disk, and the dtype that it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize  # torch.Size.numel overflows: 2**32 x 2**32 would be 0

    @property
    def dtype_name(self) -> str:
        """Such as float32."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_rows(self) -> int:
        """Size of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    def with_rows(self, num_rows: int) -> TensorInfo:
        """A tensor of so many of these rows; a scalar stays one."""
        return TensorInfo((num_rows, *self.shape[1:]) if self.shape else (), self.dtype)


class Checkpoint:
    """A folder to read from: tensors by name, of which no more is in memory than what was asked for.

    Attributes:
        folder: where it is.
        infos: every tensor of the model by its name; no optimizer state.
        others: what is no tensor of the model, and why, by its key.
        files: all that decides what is read.
    """

    folder: Path
    infos: Mapping[str, TensorInfo]
    others: Mapping[str, str]
    files: tuple[Path, ...]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the folder says of the model, by the names of its format; not checked."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; rows that only pad the embedding do not count."""
        sizes = [size for name in ("vocab_size", "padded_vocab_size") if (size := self.settings.get(name))]
        if not sizes:
            raise CheckpointError(f"{self.folder} does not say how large its vocabulary is; add vocab_size")
        return min(sizes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor along its first dimension, as a tensor of its own; a scalar whole."""
        if name not in self.infos:
            raise CheckpointError(f"{self.folder} has no tensor {name}; get the whole checkpoint")
        info = self.infos[name]
        start, stop = row_range(name, info, start, stop)
        return self._read(name, info.with_rows(stop - start), start)

    def _read(self, name: str, info: TensorInfo, start: int) -> Tensor:
        """The rows behind ``start`` that ``info`` describes; both are as they should be."""
        raise NotImplementedError


_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_plain(source: Checkpoint, *, by_transformers: bool = False) -> None:
    """Refuse quantized weights: read as plain numbers, without their scales, they are those of another model.

    ``by_transformers``: it reads ``source``, and what config.json says of a quantization.
    """
    is_described = bool(source.settings.get("quantization_config"))
    if by_transformers and is_described:
        return
    # Of weights alone: masks are whole numbers in some models.
    coarse = {k: v for k, v in source.infos.items() if k.endswith("weight") and v.dtype not in _PLAIN}
    if coarse or is_described:
        what = next((f"{name} is {info.dtype_name}" for name, info in coarse.items()), "config.json describes how")
        raise CheckpointError(
            f"{source.folder} is quantized, and its scales are not read: {what}; get the weights in bfloat16, or "
            "dequantize them"
        )


def row_range(name: str, info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """The rows that ``Checkpoint.read`` is asked for, as two numbers; refuses those that the tensor does not have."""
    last = info.num_rows if stop is None else stop
    if not 0 <= start <= last <= info.num_rows or (not info.shape and (start, last) != (0, 1)):
        raise CheckpointError(
            f"{name} has {info.num_rows} rows, and rows {start} to {last} are asked for; the source is damaged"
        )
    return start, last
