"""How much travels, held near a target: the number of hash functions that count moves between two steps."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scmoe.codec.lsh import Clusters


class RateControl:
    """Holds the part of the rows that travels near a target, by moving how many hash functions count.

    The counts stay on the device, and so does the level: nothing waits for them.

    Args:
        target: rows that travel over rows that are routed.
        hashes: functions that there are.
        width: coordinates that each of them keeps; 1 for spherical hashing.
        device: where the rows are; None: torch's default.

    Attributes:
        level: how many of them count; see ``Hasher.keys``.
        seen: rows that travelled, and rows that were routed, since the last adjustment.
    """

    def __init__(self, target: float, hashes: int, width: int, device: torch.device | int | None = None) -> None:
        self._target, self._hashes = target, hashes
        # One level multiplies the clusters by 2 x width at most (``Hasher.keys``), so that many levels for each factor
        # of e do not overshoot, apart from chance in which buckets are cut.
        self._levels_per_e = 1 / math.log(2 * width)
        self.level = torch.tensor(hashes / 2, device=device)
        self.seen = torch.zeros(2, device=device)

    def out_of_reach(self, level: float) -> str:
        """Why the target is missed at a level that cannot move any further; empty at any other."""
        if level >= self._hashes:
            return f"all {self._hashes} hash functions count and more rows should travel; give more --lsh-hashes"
        return "no hash function counts, one mean for each expert; give a larger rate" if level <= 0 else ""

    def see(self, clusters: Clusters) -> None:
        """Count one routing of a training step."""
        self.seen += torch.stack([clusters.per_expert.sum(), clusters.sizes.sum()])

    def adjust(self, seen: Tensor) -> None:
        """Move the level by what all ranks saw."""
        self.seen = torch.zeros_like(self.seen)
        factor = self._target * seen[1] / seen[0].clamp(min=1)
        change = (factor.log() * self._levels_per_e).clamp(-1, 1)
        self.level = (self.level + torch.where(seen[1] > 0, change, 0.0)).clamp(0, self._hashes)


def adjust_rates(controls: list[RateControl], group: dist.ProcessGroup) -> None:
    """Between two steps: move the level of every control, by what the ranks of ``group`` saw, who all call it."""
    if not controls:  # a pipeline stage without an MoE, on none of whose ranks there is one
        return
    seen = torch.stack([control.seen for control in controls])
    dist.all_reduce(seen, group=group)
    for control, its in zip(controls, seen, strict=True):
        control.adjust(its)
