"""Figures of tensors and of differences between tensors, read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from checkpoints.tensors import Checkpoint, TensorInfo

STEP_BYTES = 1 << 26
"""In memory of one tensor at a time, if its rows are no larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one tensor; all but the last two are of its finite elements."""

    norm: float
    mean: float
    std: float
    max_abs: float
    num_nan: int
    num_inf: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of two tensors of one shape.

    Attributes:
        changed: elements that differ; NaN equals NaN.
        max_abs: largest difference; inf where one is not finite and the other is something else.
        relative: norm of the difference over that of the first; inf if that has none.
    """

    changed: int
    max_abs: float
    relative: float


def figures(source: Checkpoint, name: str, advance: Callable[[int], object]) -> Figures:
    """Figures of a tensor in float64; ``advance`` is told the bytes that are done."""
    count = num_nan = num_inf = 0
    total = squares = max_abs = 0.0
    for start, stop in _steps(source.infos[name]):
        part = source.read(name, start, stop)
        values = part.double()
        num_nan += int(values.isnan().sum())
        num_inf += int(values.isinf().sum())
        values = values[values.isfinite()]
        if values.numel():
            count += values.numel()
            total += float(values.sum())
            squares += float(values.square().sum())
            max_abs = max(max_abs, float(values.abs().max()))
        advance(part.nbytes)
    mean = total / max(count, 1)
    std = math.sqrt(max(squares / max(count, 1) - mean * mean, 0.0))
    norm = math.sqrt(squares)
    return Figures(norm=norm, mean=mean, std=std, max_abs=max_abs, num_nan=num_nan, num_inf=num_inf)


def difference(one: Checkpoint, other: Checkpoint, name: str, advance: Callable[[int], object]) -> Difference:
    """How a tensor of two checkpoints differs; ``advance`` is told the bytes of ``one`` that are done."""
    changed, max_abs, squares, scale = 0, 0.0, 0.0, 0.0
    for start, stop in _steps(one.infos[name]):
        part = one.read(name, start, stop)
        before, after = part.double(), other.read(name, start, stop).double()
        differs = (before != after) & ~(before.isnan() & after.isnan())
        changed += int(differs.sum())
        scale += float(before[before.isfinite()].square().sum())
        if changed:
            delta = torch.where(differs, before - after, 0.0).abs()
            delta = torch.where(delta.isnan(), math.inf, delta)
            max_abs = max(max_abs, float(delta.max()))
            squares += float(delta.square().sum())
        advance(part.nbytes)
    relative = 0.0 if not changed else math.sqrt(squares / scale) if scale else math.inf
    return Difference(changed=changed, max_abs=max_abs, relative=relative)


def _steps(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Rows to read at once."""
    rows = max(1, STEP_BYTES * info.num_rows // max(info.nbytes, 1))
    for start in range(0, info.num_rows, rows):
        yield start, min(start + rows, info.num_rows)
