"""Ops of one machine, timed: products, attention, grouped products, copies and launches.

Medians of repetitions; under torchrun every rank measures, and the slowest one counts.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

REPETITIONS = 9
LEAST_S = 0.02
"""Of one repetition, which runs an op as often as that takes."""
FP8_FROM = (8, 9)
"""Compute capability from which there are matrix units for 8 bits (torch._scaled_mm insists on it)."""
EXPERTS, HEAD = 8, 128


@dataclass(frozen=True, slots=True)
class Measured:
    """One op.

    Attributes:
        op: its kind.
        size: in words.
        seconds: median.
        low_s: fastest repetition.
        high_s: slowest.
    """

    op: str
    size: str
    seconds: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured: a GPU has to be full, and a CPU to end.

    Attributes:
        product: of square matrices.
        rows: of all experts together.
        widths: of the middle of experts.
        hidden: their input.
        length: tokens of a sequence.
        heads: of attention.
        copied: bytes.
        sent: bytes of all-to-alls.
    """

    product: int
    rows: int
    widths: tuple[int, ...]
    hidden: int
    length: int
    heads: int
    copied: int
    sent: tuple[int, ...]


ON_GPU = Sizes(8192, 32768, (768, 1408, 2048, 4096), 4096, 8192, 16, 1 << 30, (1 << 16, 1 << 20, 1 << 24, 1 << 27))
ON_CPU = Sizes(1024, 512, (64, 128, 256, 512), 512, 512, 8, 1 << 26, (1 << 12, 1 << 16, 1 << 20, 1 << 23))


class Bench:
    """Times ops on this rank's device."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if self.on_gpu else torch.device("cpu")
        )
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.measured: list[Measured] = []
        if self.on_gpu:
            torch.cuda.set_device(self.device)

    @property
    def has_fp8(self) -> bool:
        """Whether its matrix units multiply in 8 bits."""
        return self.on_gpu and torch.cuda.get_device_capability(self.device) >= FP8_FROM

    def tensor(self, *shape: int) -> torch.Tensor:
        """Random numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def time(
        self, op: str, size: str, call: Callable[[], object], *, calls: int = 1, least_s: float = LEAST_S
    ) -> float:
        """Median seconds of one call, of which ``call`` makes ``calls``; every rank says the slowest rank's."""
        call()
        once = self._timed(call, 1)
        number = max(1, math.ceil(least_s / max(self._slowest([once])[0], 1e-9)))
        times = self._slowest([self._timed(call, number) / (number * calls) for _ in range(REPETITIONS)])
        self.measured.append(Measured(op, size, median(times), min(times), max(times)))
        return median(times)

    def _timed(self, call: Callable[[], object], number: int) -> float:
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(number):
            call()
        self._synchronize()
        return time.perf_counter() - begin

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _slowest(self, seconds: Sequence[float]) -> list[float]:
        if not dist.is_initialized():
            return list(seconds)
        found = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()


def product_s(bench: Bench, size: int) -> float:
    """Of square matrices, in 16 bits on a GPU."""
    one, other = bench.tensor(size, size), bench.tensor(size, size)
    return bench.time("product", f"{size} x {size} x {size}", lambda: one @ other)


def product_in_fp8_s(bench: Bench, size: int) -> float:
    """The same in 8 bits, one scale for a tensor, where ``bench.has_fp8``."""
    one, other = (bench.tensor(size, size).to(torch.float8_e4m3fn) for _ in range(2))
    by_column, scale = other.t(), torch.ones((), device=bench.device)  # the second one lies column by column

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(one, by_column, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)

    return bench.time("product in fp8", f"{size} x {size} x {size}", multiply)


def copy_s(bench: Bench, size: int) -> float:
    """Of ``size`` bytes in the device's memory."""
    source = torch.zeros(size // 4, device=bench.device)
    target = torch.empty_like(source)
    return bench.time("copy", f"{size >> 20} MiB", lambda: target.copy_(source))


def launch_s(bench: Bench) -> float:
    """What the host takes for one small kernel; on a CPU it computes it, too."""
    one = torch.zeros(16, device=bench.device)

    def launch_some() -> None:
        for _ in range(200):
            one.add_(1)

    return bench.time("launch", "16 numbers", launch_some, calls=200)


def attention_s(bench: Bench, sizes: Sizes) -> float:
    """Of one causal sequence."""
    query, key, value = (bench.tensor(1, sizes.heads, sizes.length, HEAD) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    size = f"{sizes.heads} heads, {sizes.length} tokens"
    return bench.time("attention", size, lambda: attend(query, key, value, is_causal=True))


def grouped_s(bench: Bench, sizes: Sizes, width: int) -> float:
    """Experts of [rows, hidden] to ``width``, as many rows each."""
    rows, weights = bench.tensor(sizes.rows, sizes.hidden), bench.tensor(EXPERTS, sizes.hidden, width)
    each = sizes.rows // EXPERTS
    size = f"{EXPERTS} x {each} x {width} x {sizes.hidden}"
    if bench.on_gpu and hasattr(torch.nn.functional, "grouped_mm"):
        ends = torch.arange(each, sizes.rows + 1, each, device=bench.device, dtype=torch.int32)
        return bench.time("grouped product", size, lambda: torch.nn.functional.grouped_mm(rows, weights, offs=ends))
    parts = rows.chunk(EXPERTS)
    return bench.time(
        "grouped product", size, lambda: [part @ weight for part, weight in zip(parts, weights, strict=True)]
    )


def all_to_all_s(bench: Bench, name: str, group: dist.ProcessGroup, size: int) -> float:
    """Of the ranks of ``group``, each of which sends ``size`` bytes in all; other groups do the same beside it."""
    ranks = group.size()
    sent = torch.zeros(max(1, size // 4 // ranks) * ranks, device=bench.device)
    received = torch.empty_like(sent)
    return bench.time(name, f"{size >> 10} KiB", lambda: dist.all_to_all_single(received, sent, group=group))
