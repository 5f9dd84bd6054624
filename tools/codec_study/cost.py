"""What encoding costs, as ``encoding.py`` measured it: kept in a folder, and in words. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from studies import kept
from studies.figures import Figure, ranged

FILE = "encoding.json"
COMPENSATED = ("encode", "compensate")
"""All that the codec does to rows with the paper's compensation."""
FP8 = ("fp8",)
"""All that fp8 does to rows in one transfer."""

type Cost = Mapping[str, Any]
"""``seconds``, a list for each part; ``rows``, ``hidden``, ``rate`` (part of the rows that is left); when and where."""


def read(folder: Path) -> Cost | None:
    """What a folder keeps; None where nothing was measured.

    Raises:
        OSError, ValueError: where it cannot be read.
    """
    if not (folder / FILE).exists():
        return None
    cost = kept.read(folder / FILE)
    try:
        described(cost)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no measurement: {error!r}") from error
    return cost


def measures(cost: Cost, *parts: str) -> bool:
    """Whether the parts were timed: a measurement may be older than a codec."""
    return set(parts) <= cost["seconds"].keys()


def share(cost: Cost, *parts: str) -> Figure:
    """Paired ratios of the parts' seconds to the expert MLP's: median, smallest and largest."""
    seconds = cost["seconds"]
    return ranged(sum(times) / mlp for *times, mlp in zip(*(seconds[part] for part in (*parts, "mlp")), strict=True))


def _of_fp8(cost: Cost) -> str:
    """Empty of a measurement that is older than that codec."""
    if "fp8" not in cost["seconds"]:
        return ""
    milliseconds, one = median(cost["seconds"]["fp8"]) * 1e3, share(cost, "fp8")
    return (
        f"; one transfer in fp8, to codes and back, of all of them {milliseconds:.0f} ms: {one.value:.1%} "
        f"({one.low:.1%} to {one.high:.1%})"
    )


def described(cost: Cost) -> str:
    """Medians, and the median and range of the paired ratios."""
    middle = {name: median(values) for name, values in cost["seconds"].items()}

    def part(*parts: str) -> str:
        one = share(cost, *parts)
        return f"{one.value:.1%} ({one.low:.1%} to {one.high:.1%})"

    return (
        f"{cost['rows']} x {cost['hidden']} rows in fp32, one thread, {cost['rate']:.1%} of them sent: encode "
        f"{middle['encode'] * 1e3:.0f} ms, restore {middle['restore'] * 1e3:.0f} ms, with the paper's compensation "
        f"{middle['compensate'] * 1e3:.0f} ms, expert MLP on all of them {middle['mlp'] * 1e3:.0f} ms: "
        f"{part('encode', 'restore')} of it, {part(*COMPENSATED)} with compensation, and "
        f"{part('refine')} more for --lsh-refinement lloyd{_of_fp8(cost)}; without gradients. Measured "
        f"{cost['time']} with {cost['commit']} on {cost['hardware']['device']}"
    )
