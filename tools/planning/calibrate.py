"""Measures the machine at hand: products, attention, grouped products, copies, launches, and all-to-alls between ranks.

The constants are those with which the model of time prices the measured ops as they were measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import atomic
import provenance
import torch
import torch.distributed as dist
from command_line import UserError
from progress import progress
from rich.console import Console

from planning import bench, links
from planning.bench import EXPERTS, HEAD, Bench, Sizes
from planning.hardware import HARDWARE, Constants, Hardware, Machine
from planning.kernels import Clock
from planning.report import table
from planning.training import Precision

NETWORK = 12.5e9
"""Bytes/s between nodes that is assumed where nothing says it: 100 Gb/s."""
MEASURED = "measured"
"""In the place of a GPU's name: peaks are what is measured."""
DEVICES = {
    "NVIDIA A30": "A30-PCIe",
    "NVIDIA A800-SXM4-80GB": "A800-NVLink",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA GB300": "GB300",
}
"""Rows of the table, by the whole name that CUDA gives a device: an H100 NVL is no H100, and a GB200 no B200."""


def run(path: Path, gpu: str | None) -> int:
    """Measure, print, and write the machine to ``path``; returns the exit code.

    Args:
        path: of the file.
        gpu: whose row of the table has the peaks, or ``MEASURED``; None: the device's own.

    Raises:
        UserError: where it is not known which machine this is, or its links cannot be measured; the first rank says it
            for all.
    """
    with _said_once():
        nodes = links.Nodes.of_this_job()
        its = Bench()
        peaks = row_of(torch.cuda.get_device_properties(its.device).name if its.on_gpu else None, gpu)
    if nodes.ranks > 1:
        dist.init_process_group("nccl" if its.on_gpu else "gloo", timeout=timedelta(minutes=5))
    try:
        with _said_once():
            found = measure(its, bench.ON_GPU if its.on_gpu else bench.ON_CPU, nodes, peaks)
        if _is_first():
            _tell(found, its, path)
    finally:
        if nodes.ranks > 1:
            dist.destroy_process_group()
    return 0


def _tell(found: Machine, its: Bench, path: Path) -> None:
    rows = [
        (one.op, one.size, *(f"{s * 1e3:.4g}" for s in (one.seconds, one.low_s, one.high_s))) for one in its.measured
    ]
    console = Console(highlight=False)
    for line in found.source.split("; "):
        console.print(line, style="bold")
    console.print(table(("op", "size", "ms", "least", "most"), rows))
    written = found.as_json() | {"measured": rows, "provenance": provenance.provenance(found.hardware.name)}
    atomic.write_text(path, json.dumps(written, indent=1) + "\n")
    print(f"wrote {path}; plan with --machine {path}")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _said_once() -> Iterator[None]:
    """Inside, what all ranks refuse ends all of them, and one of them says it."""
    try:
        yield
    except UserError:
        if _is_first():
            raise
        sys.exit(2)


def row_of(device: str | None, gpu: str | None) -> Hardware | None:
    """The row of the table that has the peaks of a machine; None where peaks are what is measured.

    Args:
        device: CUDA's whole name of it; None: this is a CPU.
        gpu: the row that the user names, or ``MEASURED``.

    Raises:
        UserError: where nobody says which row it is.
    """
    if gpu not in (None, MEASURED, *HARDWARE):
        raise UserError(f"--gpu {gpu} is no row of the table: use {MEASURED}, or one of {', '.join(HARDWARE)}")
    if device is None:
        if gpu not in (None, MEASURED):
            raise UserError(f"there is no GPU here, and --gpu says that peaks are those of {gpu}; drop it")
        return None
    if gpu == MEASURED:
        return None
    if gpu is None and device not in DEVICES:
        raise UserError(
            f"no table has {device}: say whose peaks count, --gpu {MEASURED} or one of {', '.join(HARDWARE)}"
        )
    return HARDWARE[gpu or DEVICES[device]]


def measure(its: Bench, sizes: Sizes, nodes: links.Nodes, peaks: Hardware | None) -> Machine:
    """This machine, by the ops of ``sizes``; where no table has its peaks, they are what is measured."""
    _check_alike(its, nodes)
    steps = 4 + its.has_fp8 + len(sizes.widths) + len(sizes.sent) * ((nodes.each > 1) + (nodes.count > 1))
    with progress("measure", steps, in_bytes=False) if _is_first() else nullcontext(lambda _: None) as advance:

        def done[T](value: T) -> T:
            advance(1)
            return value

        product_s = done(bench.product_s(its, sizes.product))
        fp8_s = done(bench.product_in_fp8_s(its, sizes.product)) if its.has_fp8 else None
        copy_s = done(bench.copy_s(its, sizes.copied))
        launch_s = done(bench.launch_s(its))
        attention_s = done(bench.attention_s(its, sizes))
        grouped = [(width, done(bench.grouped_s(its, sizes, width))) for width in sizes.widths]
        sent = links.measure(its, nodes, sizes.sent, lambda: done(None))
    hardware = peaks or _peaks(its, 2 * sizes.product**3 / product_s, 2 * sizes.copied / copy_s, nodes)
    flops = 2 * sizes.length * sizes.heads * sizes.length / 2 * 2 * HEAD
    constants = Constants(
        gemm=1.0, grouped=1.0, memory=2 * sizes.copied / copy_s / hardware.memory_bandwidth,
        attention=flops / attention_s / hardware.bf16, launch_s=launch_s, gap_s=0.0, tile_s=0.0, link=1.0, network=1.0,
    )  # fmt: skip
    machine = _with_products(Machine(hardware=hardware, constants=constants), sizes, product_s, grouped)
    machine = links.with_links(machine, nodes, sent, "from the table" if peaks else "assumed")
    return with_fp8(machine, sizes.product, fp8_s)


def _check_alike(its: Bench, nodes: links.Nodes) -> None:
    """Raise UserError where ranks have different GPUs: constants are one machine's."""
    if nodes.ranks == 1 or not its.on_gpu:
        return
    names: list[str] = [""] * nodes.ranks
    dist.all_gather_object(names, torch.cuda.get_device_properties(its.device).name)
    if len(set(names)) > 1:
        raise UserError(f"ranks have different GPUs, {' and '.join(sorted(set(names)))}: measure each kind by itself")


def _peaks(its: Bench, flops: float, bandwidth: float, nodes: links.Nodes) -> Hardware:
    """What was measured as the peak; of links nothing is known, but that they are no faster than memory."""
    measured: dict[str, Any] = dict.fromkeys(("bf16", "fp8", "fp4"), flops)
    measured |= {"memory_bandwidth": bandwidth, "link": bandwidth, "domain": nodes.each, "network": NETWORK}
    if not its.on_gpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / nodes.each
        return Hardware(name="CPU", sms=1, memory=memory, **measured)
    properties = torch.cuda.get_device_properties(its.device)
    return Hardware(
        name=properties.name, sms=properties.multi_processor_count, memory=properties.total_memory, **measured
    )


def _with_products(machine: Machine, sizes: Sizes, product_s: float, grouped: Sequence[tuple[int, float]]) -> Machine:
    """``machine`` with the parts of the peak at which the model prices products as they were measured."""
    clock = Clock(machine, Precision.BF16)
    size, hidden, each = sizes.product, sizes.hidden, sizes.rows / EXPERTS
    gemm = clock.product(size, size, size) / product_s
    parts = [clock.product(each, width, hidden, groups=EXPERTS, grouped=True) / seconds for width, seconds in grouped]
    return replace(machine, constants=replace(machine.constants, gemm=gemm, grouped=median(parts)))


def with_fp8(machine: Machine, size: int, fp8_s: float | None) -> Machine:
    """``machine`` with the peak in 8 bits at which its products take as long as measured; its source says which.

    Args:
        machine: with the part of the peak that products in 16 bits reach, which counts in 8 bits, too.
        size: of the square matrices.
        fp8_s: of their product in 8 bits; None: not measured.
    """
    hardware = machine.hardware
    if fp8_s is None:
        return replace(machine, source=f"{machine.source}; products in fp8 are not measured: there are none here")
    taken = Clock(machine, Precision.FP8).product(size, size, size)
    fp8 = hardware.fp8 * taken / fp8_s
    said = (
        f"products in fp8 are measured: {2 * size**3 / fp8_s / 1e12:.4g} TFLOP/s, as of a peak of {fp8 / 1e12:.4g}, "
        f"and not of {hardware.fp8 / 1e12:.4g}; grouped ones and fp4 are not measured"
    )
    fp4 = hardware.fp4 if hardware.fp4 > hardware.fp8 else fp8  # equal to that of fp8 where there is none
    return replace(machine, hardware=replace(hardware, fp8=fp8, fp4=fp4), source=f"{machine.source}; {said}")
