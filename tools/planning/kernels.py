"""What kernels take on a machine: products of matrices by tiles and waves, all else by bytes. Pure functions of sizes.

A product of matrices takes the longer of computing and moving its bytes. Computing goes by waves: each multiprocessor
works on one tile of the result at a time, tiles at an edge cost as much as whole ones, and each wave has to be filled.
So few rows, narrow matrices and short sums are slow without a constant that says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from planning.hardware import Machine
from planning.training import Precision

TILES = ((128, 256, 1.0), (128, 128, 0.85))
"""Rows and columns of tiles, and the part of the rate that they reach beside the best: a smaller tile reads more."""


class Work(NamedTuple):
    """What runs on a device, and how many kernels the host launches for it.

    Attributes:
        seconds: on the device.
        launches: by the host.
    """

    seconds: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.seconds + other.seconds, self.launches + other.launches)

    def times(self, factor: float) -> Work:
        """As often."""
        return Work(self.seconds * factor, self.launches * factor)


class Kernel(NamedTuple):
    """Part of an op, forward and backward.

    Attributes:
        kind: of op, as reports name it.
        part: of the op, as recomputation and spans choose it.
        forward: its work.
        backward: its work, without recomputation.
    """

    kind: str
    part: str
    forward: Work
    backward: Work


_QUANTIZED_BYTES = {
    Precision.BF16: 0.0,
    Precision.FP8: 4.0,  # reads bf16, writes it and its transpose in 8 bits
    Precision.FP8_BLOCKWISE: 4.0,
    Precision.MXFP8: 4.1,  # and a scale for each 32
    Precision.NVFP4: 5.2,  # reads twice, for the scale of the tensor, and rotates
}
"""Bytes that quantizing one element moves."""
_QUANTIZED_LAUNCHES = {
    Precision.BF16: 0,
    Precision.FP8: 2,  # largest value, cast
    Precision.FP8_BLOCKWISE: 1,
    Precision.MXFP8: 3,  # to quantize, and to order the scales of both operands
    Precision.NVFP4: 4,
}
"""Kernels beside a product in this precision."""
_BYTES = {Precision.BF16: 2.0, Precision.NVFP4: 0.56}
"""Of an operand's element; else 1."""
BLOCKWISE = 1.75
"""Rate of large products with scales of blocks on Hopper, over that in bf16 (NVIDIA, "Boosting Matrix Multiplication
Speed and Flexibility with NVIDIA cuBLAS 12.9", 2025): sums are scaled outside of the matrix units."""


@dataclass(frozen=True, slots=True)
class Clock:
    """What kernels take on one machine with linear layers in one precision.

    Attributes:
        machine: hardware and constants.
        precision: of linear layers.
        grad_bytes: of the gradients to which those of weights are added.
    """

    machine: Machine
    precision: Precision
    grad_bytes: int = 4

    @property
    def peak(self) -> float:
        """FLOP/s of linear layers."""
        hardware = self.machine.hardware
        if self.precision is Precision.BF16:
            return hardware.bf16
        if self.precision is Precision.FP8_BLOCKWISE:
            return min(hardware.fp8, BLOCKWISE * hardware.bf16)
        return hardware.fp4 if self.precision is Precision.NVFP4 else hardware.fp8

    def product(
        self, m: float, n: float, k: float, *, groups: float = 1, grouped: bool = False, out: float = 2
    ) -> float:
        """Seconds of ``groups`` products of [m, k] and [k, n].

        Args:
            m: rows of each.
            n: columns.
            k: length of the sums.
            groups: of products that share the device.
            grouped: whether they are experts', by their rate.
            out: bytes of an element of the result that are moved.
        """
        if min(m, n, k) <= 0:
            return 0.0
        hardware, constants = self.machine.hardware, self.machine.constants
        rate = self.peak * (constants.grouped if grouped else constants.gemm) / hardware.sms
        computing = min(
            math.ceil(groups * math.ceil(m / rows) * math.ceil(n / columns) / hardware.sms)
            * (2 * rows * columns * k / (rate * part) + constants.tile_s)
            for rows, columns, part in TILES
        )
        operand = _BYTES.get(self.precision, 1.0)
        moved = groups * ((m + n) * k * operand + m * n * out)
        return max(computing, moved / self._bandwidth) + constants.gap_s

    def moving(self, size: float, kernels: float = 1) -> Work:
        """Element-wise kernels that move ``size`` bytes in all."""
        constants = self.machine.constants
        return Work(size / self._bandwidth + kernels * constants.gap_s, kernels)

    def quantizing(self, elements: float) -> Work:
        """What a linear layer's input, or its gradient, takes before it is multiplied."""
        if self.precision is Precision.BF16:
            return Work()
        return Work(elements * _QUANTIZED_BYTES[self.precision] / self._bandwidth + self.machine.constants.gap_s, 0)

    def linear(self, kind: str, part: str, m: float, n: float, k: float) -> Kernel:
        """A linear layer of [m, k] to [m, n]: forward; gradients of input and weight, the latter added up."""
        launches = 1 + _QUANTIZED_LAUNCHES[self.precision]
        forward = self.quantizing(m * k) + Work(self.product(m, n, k), launches)
        backward = self.quantizing(m * n) + Work(
            self.product(m, k, n) + self.product(n, k, m, out=2 * self.grad_bytes), 2 * launches
        )
        return Kernel(kind, part, forward, backward)

    def experts(self, part: str, rows: float, n: float, k: float, groups: float, *, fused: bool) -> Kernel:
        """The same layer of ``groups`` experts that compute ``rows`` in all.

        Args:
            part: of the op.
            rows: of all of them.
            n: columns.
            k: length of the sums.
            groups: experts.
            fused: one kernel for all, which quantizes what it hands on; else one launch for each expert.
        """
        m = rows / groups
        launches = 2.0 if fused else groups * (1 + _QUANTIZED_LAUNCHES[self.precision])
        forward = Work(self.product(m, n, k, groups=groups, grouped=True), launches)
        gradients = self.product(m, k, n, groups=groups, grouped=True)
        gradients += self.product(n, k, m, groups=groups, grouped=True, out=2 * self.grad_bytes)
        backward = Work(gradients, 2 * launches)
        if not fused:
            forward += self.quantizing(rows * k)
            backward += self.quantizing(rows * n)
        return Kernel("experts", part, forward, backward)

    def attending(self, flops: float) -> Kernel:
        """Core attention of ``flops`` forward; backward computes scores anew and four products more."""
        hardware, constants = self.machine.hardware, self.machine.constants
        seconds = flops / (hardware.bf16 * constants.attention)
        return Kernel(
            "attention", "core", Work(seconds + constants.gap_s, 2), Work(2.5 * seconds + 2 * constants.gap_s, 3)
        )

    @property
    def _bandwidth(self) -> float:
        return self.machine.hardware.memory_bandwidth * self.machine.constants.memory
