"""Measures the machine at hand: products, attention, grouped products, copies, launches, and all-to-alls between ranks.

The constants are those with which the model of time prices the measured ops as they were measured. Medians of
repetitions; under torchrun every rank measures, and the slowest one counts.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import atomic
import provenance
import torch
import torch.distributed as dist
from progress import progress
from rich.console import Console

from planning.hardware import HARDWARE, Constants, Hardware, Machine
from planning.kernels import Clock
from planning.report import table
from planning.training import Precision

REPETITIONS = 9
LEAST_S = 0.02
"""Of one repetition, which runs an op as often as that takes."""
NETWORK = 12.5e9
"""Bytes/s between nodes where one node alone is there: 100 Gb/s."""


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
EXPERTS, HEAD = 8, 128


def run(path: Path) -> int:
    """Measure, print, and write the machine to ``path``; returns the exit code."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=5))
    try:
        bench = Bench()
        found = measure(bench, ON_GPU if bench.on_gpu else ON_CPU)
        if _is_first():
            rows = [
                (one.op, one.size, *(f"{s * 1e3:.4g}" for s in (one.seconds, one.low_s, one.high_s)))
                for one in bench.measured
            ]
            console = Console(highlight=False)
            console.print(found.source, style="bold")
            console.print(table(("op", "size", "ms", "least", "most"), rows))
            written = found.as_json() | {"measured": rows, "provenance": provenance.provenance(found.hardware.name)}
            atomic.write_text(path, json.dumps(written, indent=1) + "\n")
            print(f"wrote {path}; plan with --machine {path}")
    finally:
        if ranks > 1:
            dist.destroy_process_group()
    return 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def measure(bench: Bench, sizes: Sizes) -> Machine:
    """This machine, by the ops of ``sizes``."""
    steps = 4 + len(sizes.widths) + len(sizes.sent) * dist.is_initialized()
    with progress("measure", steps, in_bytes=False) if _is_first() else nullcontext(lambda _: None) as advance:

        def done[T](value: T) -> T:
            advance(1)
            return value

        product_s = done(_product_s(bench, sizes.product))
        copy_s = done(_copy_s(bench, sizes.copied))
        launch_s = done(_launch_s(bench))
        attention_s = done(_attention_s(bench, sizes))
        grouped = [(width, done(_grouped_s(bench, sizes, width))) for width in sizes.widths]
        sent = [(size, done(_all_to_all_s(bench, size))) for size in sizes.sent] if dist.is_initialized() else []
    hardware = _hardware(bench, 2 * sizes.product**3 / product_s, 2 * sizes.copied / copy_s)
    flops = 2 * sizes.length * sizes.heads * sizes.length / 2 * 2 * HEAD
    constants = Constants(
        gemm=1.0, grouped=1.0, memory=2 * sizes.copied / copy_s / hardware.memory_bandwidth,
        attention=flops / attention_s / hardware.bf16, launch_s=launch_s, gap_s=0.0, tile_s=0.0, link=1.0, network=1.0,
    )  # fmt: skip
    machine = _with_products(Machine(hardware=hardware, constants=constants), sizes, product_s, grouped)
    return _with_links(machine, sent)


def _product_s(bench: Bench, size: int) -> float:
    one, other = bench.tensor(size, size), bench.tensor(size, size)
    return bench.time("product", f"{size} x {size} x {size}", lambda: one @ other)


def _copy_s(bench: Bench, size: int) -> float:
    source = torch.zeros(size // 4, device=bench.device)
    target = torch.empty_like(source)
    return bench.time("copy", f"{size >> 20} MiB", lambda: target.copy_(source))


def _launch_s(bench: Bench) -> float:
    """What the host takes for one small kernel; on a CPU it computes it, too."""
    one = torch.zeros(16, device=bench.device)

    def launch_some() -> None:
        for _ in range(200):
            one.add_(1)

    return bench.time("launch", "16 numbers", launch_some, calls=200)


def _attention_s(bench: Bench, sizes: Sizes) -> float:
    query, key, value = (bench.tensor(1, sizes.heads, sizes.length, HEAD) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    size = f"{sizes.heads} heads, {sizes.length} tokens"
    return bench.time("attention", size, lambda: attend(query, key, value, is_causal=True))


def _grouped_s(bench: Bench, sizes: Sizes, width: int) -> float:
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


def _all_to_all_s(bench: Bench, size: int) -> float:
    """Of all ranks, each of which sends ``size`` bytes in all."""
    sent = torch.zeros(max(1, size // 4 // dist.get_world_size()) * dist.get_world_size(), device=bench.device)
    received = torch.empty_like(sent)
    return bench.time("all-to-all", f"{size >> 10} KiB", lambda: dist.all_to_all_single(received, sent))


def _hardware(bench: Bench, flops: float, bandwidth: float) -> Hardware:
    """The table's, where it has this GPU; else what was measured is the peak."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if not bench.on_gpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware(
            name="this CPU", bf16=flops, fp8=flops, fp4=flops, sms=1, memory_bandwidth=bandwidth, memory=memory / local,
            link=bandwidth, domain=local, network=NETWORK,
        )  # fmt: skip
    properties = torch.cuda.get_device_properties(bench.device)
    known = [name for name in HARDWARE if name.split("-")[0] in properties.name]
    if known:
        return HARDWARE[max(known, key=len)]
    return Hardware(
        name=properties.name, bf16=flops, fp8=flops, fp4=flops, sms=properties.multi_processor_count,
        memory_bandwidth=bandwidth, memory=properties.total_memory, link=bandwidth, domain=local, network=NETWORK,
    )  # fmt: skip


def _with_products(machine: Machine, sizes: Sizes, product_s: float, grouped: Sequence[tuple[int, float]]) -> Machine:
    """``machine`` with the parts of the peak at which the model prices products as they were measured."""
    clock = Clock(machine, Precision.BF16)
    size, hidden, each = sizes.product, sizes.hidden, sizes.rows / EXPERTS
    gemm = clock.product(size, size, size) / product_s
    parts = [clock.product(each, width, hidden, groups=EXPERTS, grouped=True) / seconds for width, seconds in grouped]
    return replace(machine, constants=replace(machine.constants, gemm=gemm, grouped=median(parts)))


def _with_links(machine: Machine, sent: Sequence[tuple[int, float]]) -> Machine:
    """``machine`` with the rate of its all-to-alls, where there were any, and what a small one costs for each peer."""
    hardware, constants = machine.hardware, machine.constants
    unknown = f"links between nodes are not measured: {hardware.network * 8 / 1e9:g} Gb/s of each GPU"
    if not sent:
        inside = f"{hardware.link / 1e9:.3g} GB/s"
        return replace(machine, source=f"measured on one {hardware.name}; links are not measured: {inside}; {unknown}")
    ranks = dist.get_world_size()
    (small, small_s), (large, large_s) = sent[0], sent[-1]
    rate = (large - small) * (ranks - 1) / ranks / max(large_s - small_s, 1e-9)
    constants = replace(constants, message_s=min(seconds for _, seconds in sent) / (ranks - 1))
    source = f"measured on {ranks} ranks of {hardware.name}"
    if ranks <= hardware.domain:
        constants = replace(constants, link=rate / hardware.link)
        return replace(machine, constants=constants, source=f"{source}; {unknown}")
    between = rate * (ranks - hardware.domain) / (ranks - 1)
    return replace(machine, constants=replace(constants, network=between / hardware.network), source=source)
