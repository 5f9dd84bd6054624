"""The network: a tournament in which each link is timed, and the collectives of each kind of group."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from progress import progress

from doctoring import links
from doctoring.check import Finding, not_tried, ok
from doctoring.job import Job
from megatron_scmoe.mcore import process_groups

PROBE_BYTES = 256 << 10
LEAST_BYTES, MOST_BYTES = 512 << 10, 64 << 20
"""Of a payload: below, latency and what switches save up count for more than rates; above, nothing more is learned."""
TOURNAMENTS, REPETITIONS = 5, 3
"""How often all links are timed, where there is time, and how often in a row: the fastest counts, since what runs
beside only ever slows."""
OF_LINKS = 0.6
"""Part of the time that the tournament may take; the rest is that of collectives."""
KINDS = ("tp", "cp", "ep", "pp", "dp")
"""Groups whose collectives are timed, by Core's names, and the world."""


class Stopwatch:
    """Time that all ranks agree on.

    Args:
        seconds: there are.
        device: of tensors.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self._began_s, self._seconds, self._device = time.monotonic(), seconds, device

    def has(self, part: float) -> bool:
        """Whether less than that part of it has gone by, on every rank; all call this."""
        return greatest(time.monotonic() - self._began_s, self._device) < part * self._seconds


def greatest(seconds: float, device: torch.device) -> float:
    """The greatest of all ranks'; all call this."""
    tensor = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of ``step``, work on a GPU included."""
    began_s = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


class Network:
    """See ``CATALOG``."""

    name, communicates = "network", True

    def look(self, job: Job) -> dict[str, Any]:
        """Seconds of this rank's links, by the other one's rank, and of its groups' collectives."""
        job.join()
        found: dict[str, Any] = {"host": job.host, "links": {}, "collectives": [], "bytes": 0, "games": 0}
        if job.world_size == 1:
            return found
        watch = Stopwatch(job.network_s, job.device)
        payload = torch.ones(_payload_bytes(job), dtype=torch.uint8, device=job.device)
        found["bytes"] = payload.numel()
        found["games"], found["links"] = _tournaments(job, payload, watch)
        found["collectives"] = list(_collectives(job, payload, watch))
        return found

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Links, and then groups."""
        if job.world_size == 1:
            return [not_tried("one rank has no link; start it with torchrun on all ranks")]
        num_bytes, found = seen[0]["bytes"], []
        seconds: dict[links.Link, float] = {}
        for rank, one in enumerate(seen):
            for other, mine in one["links"].items():
                link = min(rank, int(other)), max(rank, int(other))
                seconds[link] = max(mine, seconds.get(link, 0.0))
        if seconds:
            rates = {link: num_bytes / one for link, one in seconds.items()}
            found += links.judged(rates, [one["host"] for one in seen])
        collectives: dict[str, dict[tuple[int, ...], float]] = {}
        for one in seen:
            for kind, ranks, mine in one["collectives"]:
                of_kind = collectives.setdefault(kind, {})
                of_kind[tuple(ranks)] = max(mine, of_kind.get(tuple(ranks), 0.0))
        found += links.judged_groups(collectives, num_bytes)
        whole = links.games(job.world_size)
        if seen[0]["games"] < whole:
            words = f"{seen[0]['games']} of {whole} rounds of links fitted into --network-seconds {job.network_s:g}"
            found.append(not_tried(words))
        if not job.has_cuda:
            found.append(not_tried("NCCL: no GPU here; what was timed is gloo"))
        return found or [ok("timed")]


def _exchange(payload: torch.Tensor, other: int) -> None:
    """Send to a rank and receive from it, both at once."""
    received = torch.empty_like(payload)
    both = [dist.P2POp(dist.isend, payload, other), dist.P2POp(dist.irecv, received, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


def _payload_bytes(job: Job) -> int:
    """What an exchange carries, by the time of a small one: so much that tournaments take half of their time."""
    probe = torch.ones(PROBE_BYTES, dtype=torch.uint8, device=job.device)
    other = links.opponent(job.rank, job.world_size, 0)
    seconds = 0.0
    for _ in range(2):  # the first one makes the connection
        dist.barrier()
        seconds = timed(partial(_exchange, probe, other), job.device) if other is not None else 0.0
    rate = PROBE_BYTES / max(greatest(seconds, job.device), 1e-6)
    each_s = 0.5 * OF_LINKS * job.network_s / (TOURNAMENTS * REPETITIONS * links.games(job.world_size))
    return int(min(max(rate * each_s, LEAST_BYTES), MOST_BYTES))


def _tournaments(job: Job, payload: torch.Tensor, watch: Stopwatch) -> tuple[int, dict[int, float]]:
    """Games of the first tournament that were played, and the fastest exchange with each other rank, in seconds.

    All ranks call this. Whatever time there is, each rank meets about as many others: games come in a drawn order.
    """
    order = list(range(links.games(job.world_size)))
    random.Random(0).shuffle(order)
    found: dict[int, float] = {}
    total = TOURNAMENTS * len(order)
    shown = contextlib.nullcontext(lambda _: None) if job.rank else progress("links", total, in_bytes=False)
    with shown as advance:
        for played in range(total):
            if not watch.has(OF_LINKS):
                return min(played, len(order)), found
            other = links.opponent(job.rank, job.world_size, order[played % len(order)])
            if other is not None:
                _exchange(payload[:1], other)  # makes the connection, and both are there
                fastest = min(timed(partial(_exchange, payload, other), job.device) for _ in range(REPETITIONS))
                found[other] = min(fastest, found.get(other, fastest))
            advance(1)
    return len(order), found


def _collectives(job: Job, payload: torch.Tensor, watch: Stopwatch) -> Iterator[tuple[str, list[int], float]]:
    """What was timed, the ranks of this rank's group, and the fastest time in seconds; all ranks go through this."""
    groups = {name: group for name, group in process_groups.named() if name in KINDS and group.size() > 1}
    if all(group.size() < job.world_size for group in groups.values()):
        assert dist.group.WORLD is not None
        groups["world"] = dist.group.WORLD
    for name, group in groups.items():
        sent = payload[: payload.numel() // group.size() * group.size()]
        received = sent.clone()
        steps = {
            "all-reduce": partial(dist.all_reduce, received, group=group),
            "all-to-all": partial(dist.all_to_all_single, received, sent, group=group),
        }
        for kind, step in steps.items():
            if not watch.has(1.0):
                return
            step()
            seconds = min(timed(step, job.device) for _ in range(REPETITIONS))
            yield f"{name} {kind}", dist.get_process_group_ranks(group), seconds
