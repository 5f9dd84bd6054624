"""Every process group of the layout is made, and meets once.

Communicators are made when they are first used, and need memory: what is made late may find none, and hangs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from progress import in_words as in_bytes

from doctoring.check import Finding, not_tried, ok
from doctoring.job import Job
from megatron_scmoe.mcore import process_groups


class Groups:
    """See ``CATALOG``; a rank that does not come is found by the limit of the check."""

    name, communicates = "groups", True

    def look(self, job: Job) -> dict[str, Any]:
        """By name of each group that this rank is in: its ranks, and seconds until all of them were there."""
        job.join()
        free = torch.cuda.mem_get_info(job.device)[0] if job.has_cuda else 0
        found = {}
        for name, group in process_groups.named():
            if group.size() == 1:
                continue
            began_s = time.perf_counter()
            dist.barrier(group)
            found[name] = dist.get_process_group_ranks(group), time.perf_counter() - began_s
        took = free - torch.cuda.mem_get_info(job.device)[0] if job.has_cuda else 0
        return {"groups": found, "bytes": took}

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Where all have come back there is nothing wrong."""
        groups = {(name, tuple(ranks)) for one in seen for name, (ranks, _) in one["groups"].items()}
        if not groups:
            return [not_tried("one rank has nobody to meet")]
        slowest, at = max((seconds, name) for one in seen for name, (_, seconds) in one["groups"].items())
        sizes = " x ".join(f"{name.split('_')[0]} {size}" for name, size in asdict(job.layout).items() if size > 1)
        memory = f"; their communicators took {in_bytes(max(one['bytes'] for one in seen))}" if job.has_cuda else ""
        text = f"{len(groups)} groups of {len(seen)} ranks ({sizes or 'no split'}) have met; the slowest, {at}, took"
        return [ok(f"{text} {slowest:.2f} s{memory}")]
