"""Figures of tensors and of differences between tensors, read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from checkpoints.tensors import Checkpoint, TensorInfo

STEP_BYTES = 1 << 26
"""In memory of one tensor at a time, if its rows are no larger."""


def figures(source: Checkpoint, name: str, advance: Callable[[int], object]) -> dict[str, float]:
    """Figures of a tensor in float64, but for NaN and Inf of its finite elements; ``advance`` is told of bytes done."""
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
    moments = {"norm": math.sqrt(squares), "mean": mean, "std": std, "max_abs": max_abs}
    return {**moments, "num_nan": num_nan, "num_inf": num_inf}


def difference(one: Checkpoint, other: Checkpoint, name: str, advance: Callable[[int], object]) -> dict[str, float]:
    """How a tensor of two checkpoints differs; ``advance`` is told the bytes of ``one`` that are done.

    ``changed`` elements differ, where NaN equals NaN. ``max_abs`` is the largest difference; inf where one is not
    finite and the other is something else. ``relative`` is its norm over that of the first; inf if that has none.
    """
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
    return {"changed": changed, "max_abs": max_abs, "relative": relative}


def _steps(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Rows to read at once."""
    rows = max(1, STEP_BYTES * info.num_rows // max(info.nbytes, 1))
    for start in range(0, info.num_rows, rows):
        yield start, min(start + rows, info.num_rows)
