"""Rows that travel in fewer bits: fp8 with a scale for each 128 values, or bf16.

A row is cut into blocks of 128 values, the last of which may be shorter. A block's scale s is the smallest power of two
for which no value is above 448 s, the largest of e4m3; its exponent, in one byte, travels beside the codes::

    code = e4m3(x / s),  x' = s code

(Blocks of 128: DeepSeek-V3, arXiv 2412.19437, section 3.3.) By a power of two nothing but the cast rounds: compiled or
not, on any device the bits are the same, and what was rounded once is not rounded again. Gradients go straight through:
those of rows travel in a form of their own, or as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

BLOCK = 128
"""Values that share a scale."""

_CODE = torch.float8_e4m3fn
_BIAS = 127  # of fp32's exponents, in whose form scales travel
_MANTISSA = 23  # bits of fp32's
_TOP = 8  # exponent of the largest code, 448 = 1.75 * 2^8
_ABOVE_TOP = 0x1FFFFF
"""Added to a number's bits it raises the exponent where the number is above 1.75 times its power of two."""
_LEAST = 10
"""Of exponents: with a smaller scale the smallest code would stand for a number that devices may flush to zero."""
_NOT_FINITE = 255
_LARGEST = 1.75 * 2.0**127
"""Number that has a scale: its exponent is raised by 8 once more where codes are read."""

_not_compiled: set[Callable[..., Any]] = set()
"""What torch could not compile on this rank, which has said so."""


class Fp8:
    """Rows as codes of e4m3, [n, w] bytes, and the exponents of their scales, [n, blocks] bytes.

    Rounds to nearest: a value is off by 1/16 of itself at most, or by s / 1024 where it is small in its block. A block
    with NaN, infinity or a number above 2.9e38 arrives as NaN, all of it. Values of fp16 from 63488 on arrive as
    infinity: the nearest code is 65536.
    """

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """See ``contracts.Form``."""
        return _run(_encode, rows)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """See ``contracts.Form``."""
        return _run(_decode, *parts, dtype)


class Bf16:
    """Rows of fp32 as bf16. NaN and infinity stay what they are."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """See ``contracts.Form``."""
        return (rows.to(torch.bfloat16),)

    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """See ``contracts.Form``."""
        (rows,) = parts
        return rows.to(dtype)


def _encode(rows: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _in_blocks(rows)
    largest = blocks.abs().amax(dim=-1).float()
    exponents = ((largest.view(torch.int32) + _ABOVE_TOP) >> _MANTISSA) - _TOP
    exponents = exponents.clamp(min=_LEAST)
    factors = (2 * _BIAS - exponents << _MANTISSA).view(torch.float32)
    codes = (blocks * factors.unsqueeze(-1)).to(_CODE).view(torch.uint8)
    exponents = torch.where(largest <= _LARGEST, exponents, _NOT_FINITE)
    return codes.flatten(1)[:, : rows.shape[1]], exponents.to(torch.uint8)


def _decode(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    # e4m3 is fp16 with its sign 1 and its exponent 7 bits further left, and a smaller bias: torch's own cast takes
    # seven times as long on a CPU. NaN is no code here: the scale says it.
    bits = _in_blocks(codes).view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    scales = (exponents.to(torch.int32) + _TOP << _MANTISSA).view(torch.float32)
    scales = torch.where(exponents == _NOT_FINITE, torch.nan, scales)
    rows = bits.view(torch.float16).to(torch.float32).mul_(scales.unsqueeze(-1)).to(dtype)
    return rows.flatten(1)[:, : codes.shape[1]]


def _in_blocks(rows: Tensor) -> Tensor:
    """``rows`` [n, w] as [n, blocks, 128], filled up with zeros."""
    blocks = -(-rows.shape[1] // BLOCK)
    missing = blocks * BLOCK - rows.shape[1]
    whole = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return whole.view(rows.shape[0], blocks, BLOCK)


def _run[R](function: Callable[..., R], rows: Tensor, *args: Any) -> R:
    """``function(rows, *args)``; on a GPU as one kernel, if torch can make it, and else operation by operation.

    One kernel serves all numbers of rows but 0 and 1, which torch would compile for themselves, maybe in mid-training.
    """
    if rows.is_cuda and rows.shape[0] > 1 and function not in _not_compiled:
        try:
            return _compiled(function)(rows, *args)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            _not_compiled.add(function)
            why = str(error).strip().partition("\n")[0]
            if os.environ.get("LOCAL_RANK", "0") == "0":  # its neighbours have the same device and compiler
                what = f"{function.__name__} of fp8, which takes longer so"
                print(f" > codec: torch cannot compile {what}: {why}", flush=True)
    return function(rows, *args)


@functools.cache
def _compiled[R](function: Callable[..., R]) -> Callable[..., R]:
    return torch.compile(function, dynamic=True, fullgraph=True)
