"""Clocks: wall clocks of the ranks, throttled GPUs, and how fast each rank computes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist

from doctoring import gpu
from doctoring.check import Finding, by_host, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.job.roll_call import in_words

MOST_APART_S = 1.0
"""Of wall clocks. The age of a file says whether its writer lives, and logs of several nodes are read side by side."""
SLOW = 0.5
"""Part of the median speed below which a rank is slow."""
MEETINGS = 5
PRODUCTS = 20
_WIDTHS = {"cpu": 256, "cuda": 4096}
_THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits of nvidia-smi's clocks_event_reasons that should not be set; idle, settings and the power cap are left out."""


def throttles(bits: str) -> list[str]:
    """What slows a GPU down, by nvidia-smi's number."""
    value = int(bits, 16) if bits.startswith("0x") else 0
    return [words for bit, words in _THROTTLES.items() if value & bit]


def product_s(device: torch.device) -> float:
    """Seconds of a product of two square matrices, the fastest of several: what runs beside only ever slows."""
    width = _WIDTHS[device.type]
    one = torch.ones(width, width, device=device)
    seconds = []
    for _ in range(PRODUCTS):
        began_s = time.perf_counter()
        torch.mm(one, one)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return min(seconds)


class Clocks:
    """See ``CATALOG``."""

    name, communicates = "clocks", True

    def look(self, job: Job) -> dict[str, Any]:
        """The wall clock behind meetings of all ranks, what throttles this rank's GPU, and a product's time."""
        job.join()
        seconds = product_s(job.device)
        walls = []
        for _ in range(MEETINGS):
            dist.barrier()
            walls.append(time.time())
        found = {"host": job.host, "walls": walls, "product_s": seconds, "throttles": None, "temperature": ""}
        if job.has_cuda:
            uuid = str(torch.cuda.get_device_properties(job.device).uuid)
            asked = gpu.asked("clocks_throttle_reasons.active", "temperature.gpu")
            for bits, degrees in [values for name, values in asked.items() if name.endswith(uuid)]:
                found |= {"throttles": throttles(bits), "temperature": degrees}
        return found

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Wall clocks, speeds and GPUs."""
        hosts = [one["host"] for one in seen]
        found = judged_walls(hosts, [one["walls"] for one in seen])
        found += judged_speeds(hosts, [one["product_s"] for one in seen])
        for rank, one in enumerate(seen):
            found += _throttled(rank, one)
        unseen = [rank for rank, one in enumerate(seen) if one["throttles"] is None]
        if not job.has_cuda:
            found.append(not_tried("GPU clocks: no GPU here"))
        elif unseen:
            found.append(not_tried(f"throttling: nvidia-smi says nothing of the GPUs of {in_words(unseen)}"))
        return found


def judged_walls(hosts: Sequence[str], walls: Sequence[Sequence[float]]) -> list[Finding]:
    """Wall clocks of each rank behind the same meetings, in seconds: those far from the others, by host."""
    middles = [median(at) for at in zip(*walls, strict=True)]
    offsets = [median(wall - middle for wall, middle in zip(mine, middles, strict=True)) for mine in walls]
    apart = max(offsets) - min(offsets)
    if apart <= MOST_APART_S:
        return [ok(f"wall clocks are within {apart:.3f} s")]
    usual = median_low(offsets)
    odd = [rank for rank, offset in enumerate(offsets) if abs(offset - usual) >= MOST_APART_S / 2]
    found = []
    for host, mine in by_host(hosts, odd).items():
        offset = median_low(offsets[rank] for rank in mine) - usual
        where = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the others'"
        found.append(problem(f"{in_words(mine)} on {host}: the clock is {where}", "let chrony or ntpd set it"))
    return found


def judged_speeds(hosts: Sequence[str], seconds: Sequence[float]) -> list[Finding]:
    """Times of the same work on each rank."""
    middle = median_low(seconds)  # of two the faster one's
    found = [
        problem(
            f"rank {rank} on {hosts[rank]} takes {one * 1e3:.2f} ms for a product that takes {middle * 1e3:.2f} ms "
            "elsewhere",
            "see what else runs there, its clocks and cooling, or leave that machine out",
        )
        for rank, one in enumerate(seconds)
        if middle < SLOW * one
    ]
    return found or [ok(f"the same product takes {min(seconds) * 1e3:.2f} to {max(seconds) * 1e3:.2f} ms on all ranks")]


def _throttled(rank: int, seen: Mapping[str, Any]) -> list[Finding]:
    if not seen["throttles"]:
        return []
    why = " and ".join(seen["throttles"])
    return [
        problem(
            f"rank {rank} on {seen['host']}: its GPU is throttled: {why}, at {seen['temperature']} degrees",
            "see to its cooling and power (nvidia-smi -q -d PERFORMANCE), or leave that machine out",
        )
    ]
