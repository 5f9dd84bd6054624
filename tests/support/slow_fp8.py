"""Rows in fp8 by loops over values: e4m3 with a scale for each 128 of them, and a transfer that rounds both ways."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128
LEAST_SCALE = 2.0**-117

CODES = [mantissa * 2.0**-9 for mantissa in range(8)] + [
    (1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)
][:-1]
"""What the 127 codes without a sign stand for, in their order; the last pattern of bits is NaN."""


def scale_of(block: list[float]) -> float:
    """The smallest power of two of which no value is more than 448 times."""
    scale = LEAST_SCALE
    while max(map(abs, block)) > 448 * scale:
        scale *= 2
    return scale


def nearest(value: float) -> float:
    """Of two codes that are equally near, the even one."""
    code = min(range(len(CODES)), key=lambda code: (abs(CODES[code] - abs(value)), code % 2))
    return math.copysign(CODES[code], value)


def rounded_row(row: list[float]) -> list[float]:
    """As it arrives; a block with NaN, infinity or more than 1.75 * 2^127 is NaN."""
    arrived = []
    for first in range(0, len(row), BLOCK):
        block = row[first : first + BLOCK]
        if all(abs(value) <= 1.75 * 2.0**127 for value in block):
            scale = scale_of(block)
            arrived += [nearest(value / scale) * scale for value in block]
        else:
            arrived += [math.nan] * len(block)
    return arrived


def rounded(rows: Tensor) -> Tensor:
    """Every row of [..., w]."""
    arrived = [rounded_row(row) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    return torch.tensor(arrived, dtype=torch.float64).to(rows.dtype).view(rows.shape)


class _Travelled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row, forward, backward):
        ctx.rounds = backward
        return rounded(row) if forward else row.clone()

    @staticmethod
    def backward(ctx, grad):
        return rounded(grad) if ctx.rounds else grad, None, None


def travelled(row: Tensor, collective: str, transfers: tuple[str, ...]) -> Tensor:
    """A row at the other end of `collective`, dispatch or combine; its gradient is rounded on the way back."""
    if not transfers:
        return row
    return _Travelled.apply(row, f"{collective}-forward" in transfers, f"{collective}-backward" in transfers)
