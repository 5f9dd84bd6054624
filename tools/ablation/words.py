"""How figures, plans and links are written, alike on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ablation.analysis import Estimate

ONE_STEP = "*"
"""Stands behind a figure of a single recorded step, which has no spread."""


def number(value: float) -> str:
    """Four significant digits or all before the point, so that a median and its interval can be compared."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:.{digits}f}"


def milliseconds(estimate: Estimate | None) -> str:
    """Median and interval, in milliseconds."""
    return _figure(estimate, 1e3, number)


def times(estimate: Estimate | None) -> str:
    """Median and interval of a ratio."""
    return _figure(estimate, 1.0, "{:.3f}".format)


def percent(estimate: Estimate | None) -> str:
    """Median and interval of a share."""
    return _figure(estimate, 1e2, "{:.1f}%".format)


def recorded(estimate: Estimate | None, write: Callable[[Estimate | None], str]) -> str:
    """A figure of recorded steps: marked, and without an interval, where one step is all there is."""
    text = write(estimate)
    one_step = estimate is not None and estimate.low == estimate.high
    return text.partition(" ")[0] + ONE_STEP if one_step else text


def _figure(estimate: Estimate | None, factor: float, write: Callable[[float], str]) -> str:
    if estimate is None:
        return "-"
    value, low, high = (write(part * factor) for part in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def plan(arm: Mapping[str, Any], kind: str) -> str:
    """Slots of an arm's chunks, by group where groups differ: ``2``, ``1+3``, ``3+3 | 2+2``; ``off`` where it waits."""
    groups = arm["plans"].values()
    if not groups:
        return "-"
    if any(group["blocking"] for group in groups):
        return "off"
    slots = ["+".join(map(str, group[kind])) for group in groups]
    return slots[0] if len(set(slots)) == 1 else " | ".join(slots)


def link(point: Mapping[str, Any]) -> str:
    """The link rate of a point and the share that the all-to-all takes at it."""
    measured = f"share {point['share']:.3f}"
    if point["wanted_share"] is None:
        where = "no limit on the links" if point["rate"] == "unlimited" else "the job's own network"
        return f"{where}, {measured}"
    rate = str(point["rate"])
    if rate.endswith("kbit"):
        rate = f"{number(float(rate.removesuffix('kbit')) / 1e3)} Mbit/s"
    return f"{measured} (asked: {point['wanted_share']:g}), {rate}"


def machine(meta: Mapping[str, Any]) -> dict[str, str]:
    """What was measured with, and where, by heading."""
    hardware, sizes = meta["hardware"], meta["sizes"]
    changed = f", with {meta['changed_files']} changed files" if meta["changed_files"] else ""
    return {
        "measured": str(meta["time"]),
        "commit": f"{meta['commit']}{changed}",
        "versions": ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        "hardware": f"{hardware['device']}, {hardware['cores']} cores, load {hardware['load']:.1f} at the end",
        "ranks": f"{meta['ranks']}, threads of each: {meta['threads']}; links save up {meta['burst']} when idle",
        "model": ", ".join(f"{name} {size}" for name, size in sizes.items()),
        "repetitions": f"{meta['repetitions']} steps of each arm and kind, by turns; seed {meta['seed']}",
    }
