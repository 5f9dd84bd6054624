"""The network between the ranks, and the rate at which communication takes a given share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ablation.analysis import SHARE_TOLERANCE
from ablation.arms import COST_MODEL
from ablation.bench import Bench, compute_s

TRIES = 8
UNLIMITED = "unlimited"


class Link:
    """The network between the ranks: under slow_link its rate can be set and its bytes counted, elsewhere neither."""

    def __init__(self, control: Any) -> None:
        self._control = control

    @property
    def adjustable(self) -> bool:
        """Whether rates can be set."""
        return self._control is not None

    def set_rate(self, rate: str) -> None:
        """Give every link a rate; rank 0 asks while all wait."""
        dist.barrier()
        if dist.get_rank() == 0:
            self._control.set_rate(rate)
        dist.barrier()

    def bytes_sent(self) -> int | None:
        """Bytes that all ranks have put on the wire so far, on rank 0; None where nobody counts."""
        dist.barrier()
        sent = sum(self._control.bytes_sent()) if self._control and dist.get_rank() == 0 else None
        dist.barrier()
        return sent


def find_rate(bench: Bench, link: Link, share: float, say: Callable[[str], None]) -> tuple[str, float]:
    """The link rate at which the all-to-all takes ``share`` of the baseline's forward MoE time.

    Returns:
        The rate and the share that was measured at it.

    Raises:
        ValueError: where links without a limit take a larger share already.
    """
    link.set_rate(UNLIMITED)
    free = bench.share()
    if free > share + SHARE_TOLERANCE:
        raise ValueError(f"a share of {share:g} is out of reach: without any limit it is {free:.3f} already")
    # A first guess by arithmetic: half of top-2's tokens leave a rank of two, there and back.
    costs = next(iter(bench.costs(COST_MODEL, 1).values())).forward
    ranks = dist.get_world_size()
    sent_bits = 2 * 2 * bench.sizes.tokens * (ranks - 1) / ranks * (bench.sizes.hidden * 4 + 4) * 8
    rate = sent_bits / (compute_s(costs) * share / (1 - share))
    tried = ""
    for _ in range(TRIES):
        words = f"{max(round(rate / 1e3), 64)}kbit"
        link.set_rate(words)
        measured = bench.share()
        tried = f"{measured:.3f} at {rate / 1e6:.1f} Mbit/s"
        say(f"looking for a share of {share:g}: {tried}")
        if abs(measured - share) <= SHARE_TOLERANCE:
            return words, measured
        rate *= (measured / (1 - measured)) / (share / (1 - share))
    raise ValueError(f"a share of {share:g} was not found: {tried} was the last try; is something else running here?")
