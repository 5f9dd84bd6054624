"""Which cores and GPU each rank has."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from doctoring import gpu
from doctoring.check import Finding, by_host, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.job.roll_call import in_words

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")
_TOO_MUCH = 1.01
"""Threads of a core, above which they wait for one another; rounding is below."""


def parsed(cores: str) -> list[int]:
    """Numbers as Linux lists them, such as 0-3,8."""
    found: list[int] = []
    for part in filter(None, cores.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def numa_nodes(cores: Iterable[int], folder: Path = _NODES) -> list[int]:
    """The NUMA nodes that ``cores`` lie on; none where the kernel does not say."""
    mine = set(cores)
    lists = folder.glob("node[0-9]*/cpulist")
    return sorted(int(path.parent.name[4:]) for path in lists if mine & set(parsed(path.read_text())))


def _gpu_of(device: torch.device) -> dict[str, Any]:
    """Its UUID, and the NUMA node that it is near; -1 where nobody says."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    addresses = [bus for name, (bus,) in gpu.asked("pci.bus_id").items() if name.endswith(uuid)]
    node = -1
    for address in addresses:  # nvidia-smi writes eight digits of the domain, and Linux four
        path = _PCI / address.lower()[-12:] / "numa_node"
        node = int(path.read_text()) if path.is_file() else -1
    return {"uuid": uuid, "node": node}


class Binding:
    """See ``CATALOG``."""

    name, communicates = "binding", False

    def look(self, job: Job) -> dict[str, Any]:
        """Host, cores, threads and GPU of this rank."""
        cores = sorted(os.sched_getaffinity(0))
        return {
            "host": job.host,
            "cores": cores,
            "of": os.cpu_count() or len(cores),
            "threads": torch.get_num_threads(),
            "nodes": numa_nodes(cores),
            "gpu": _gpu_of(job.device) if job.has_cuda else None,
        }

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Host by host."""
        found = []
        for host, ranks in by_host([one["host"] for one in seen]).items():
            found += _crowds(host, {rank: seen[rank] for rank in ranks})
            found += _shared_gpus(host, {rank: seen[rank] for rank in ranks})
        found += [finding for rank, one in enumerate(seen) for finding in _far_gpu(rank, one)]
        if not found:
            bound = sum(len(one["cores"]) < one["of"] for one in seen)
            found.append(
                ok(f"cores enough for all threads; {bound} of {len(seen)} ranks are bound to some of their machine's")
            )
        if not any(one["gpu"] for one in seen):
            found.append(not_tried("GPU binding: no GPU here"))
        elif unseen := [rank for rank, one in enumerate(seen) if one["gpu"] and one["gpu"]["node"] < 0]:
            why = "neither nvidia-smi nor the kernel says of"
            found.append(not_tried(f"NUMA nodes of GPUs: {why} {in_words(unseen)} which they are near"))
        return found


def _crowds(host: str, of_ranks: dict[int, dict[str, Any]]) -> list[Finding]:
    """Where threads share cores: each thread is one over the rank's cores on each of these."""
    load: dict[int, float] = {}
    for one in of_ranks.values():
        for core in one["cores"]:
            load[core] = load.get(core, 0.0) + one["threads"] / len(one["cores"])
    full = {core for core, threads in load.items() if threads > _TOO_MUCH}
    ranks = [rank for rank, one in of_ranks.items() if full & set(one["cores"])]
    if not ranks:
        return []
    threads = sum(of_ranks[rank]["threads"] for rank in ranks)
    cores = sorted(set().union(*(of_ranks[rank]["cores"] for rank in ranks)))
    return [
        problem(
            f"{in_words(ranks)} on {host}: {threads} threads share {in_words(cores).replace('rank', 'core')}",
            f"set OMP_NUM_THREADS to at most {max(1, len(cores) // len(ranks))}, start fewer ranks, or bind each rank "
            "to cores of its own (srun --cpu-bind=cores, taskset)",
        )
    ]


def _shared_gpus(host: str, of_ranks: dict[int, dict[str, Any]]) -> list[Finding]:
    ranks_of: dict[str, list[int]] = {}
    for rank, one in of_ranks.items():
        if one["gpu"]:
            ranks_of.setdefault(one["gpu"]["uuid"], []).append(rank)
    return [
        problem(
            f"{in_words(ranks)} on {host} share GPU {uuid}",
            "start as many ranks as there are GPUs, and give each its own LOCAL_RANK or CUDA_VISIBLE_DEVICES",
        )
        for uuid, ranks in ranks_of.items()
        if len(ranks) > 1
    ]


def _far_gpu(rank: int, seen: dict[str, Any]) -> list[Finding]:
    """Where all cores of a rank are on other NUMA nodes than its GPU."""
    if not seen["gpu"] or seen["gpu"]["node"] < 0 or not seen["nodes"] or seen["gpu"]["node"] in seen["nodes"]:
        return []
    node, own = seen["gpu"]["node"], ", ".join(map(str, seen["nodes"]))
    return [
        problem(
            f"rank {rank} on {seen['host']}: its cores are on NUMA node {own}, and its GPU is near node {node}",
            f"bind it there: numactl --cpunodebind={node}, or srun --gpu-bind=closest",
        )
    ]
