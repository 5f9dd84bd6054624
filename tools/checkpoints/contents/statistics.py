"""Figures of tensors and of differences between tensors, read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.tensors import TensorInfo, Tensors

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


def figures(source: Tensors, name: str, advance: Callable[[int], object]) -> Figures:
    """Figures of a tensor in float64; ``advance`` is told the bytes that are done."""
    count = num_nan = num_inf = 0
    total = squares = max_abs = 0.0
    for start, stop in _steps(source.infos[name]):
        part = source.read(name, start, stop)
        values = part.double()
        num_nan += int(values.isnan().sum())
        num_inf += int(values.isinf().sum())
        values = values[values.isfinite()]
        count += values.numel()
        if values.numel():
            total += float(values.sum())
            squares += float(values.square().sum())
            max_abs = max(max_abs, float(values.abs().max()))
        advance(part.nbytes)
    mean = total / count if count else 0.0
    variance = max(squares / count - mean * mean, 0.0) if count else 0.0
    return Figures(
        norm=math.sqrt(squares),
        mean=mean,
        std=math.sqrt(variance),
        max_abs=max_abs,
        num_nan=num_nan,
        num_inf=num_inf,
    )


def difference(one: Tensors, other: Tensors, name: str, advance: Callable[[int], object]) -> Difference:
    """How a tensor of two checkpoints differs; ``advance`` is told the bytes of ``one`` that are done."""
    changed, max_abs, squares, scale = 0, 0.0, 0.0, 0.0
    for start, stop in _steps(one.infos[name]):
        part = one.read(name, start, stop)
        before, after = part.double(), other.read(name, start, stop).double()
        differs = (before != after) & ~(before.isnan() & after.isnan())
        changed += int(differs.sum())
        scale += _squares(before)
        if changed:
            delta = torch.where(differs, before - after, 0.0).abs()
            delta = torch.where(delta.isnan(), math.inf, delta)
            max_abs = max(max_abs, float(delta.max()))
            squares += float(delta.square().sum())
        advance(part.nbytes)
    relative = 0.0 if not changed else math.sqrt(squares / scale) if scale else math.inf
    return Difference(changed=changed, max_abs=max_abs, relative=relative)


def _squares(values: Tensor) -> float:
    return float(values[values.isfinite()].square().sum())


def _steps(info: TensorInfo) -> Iterator[tuple[int, int | None]]:
    """Rows to read at once."""
    if not info.shape or info.nbytes <= STEP_BYTES:
        yield 0, None
        return
    rows = max(1, STEP_BYTES // (info.nbytes // info.shape[0]))
    for start in range(0, info.shape[0], rows):
        yield start, min(start + rows, info.shape[0])
