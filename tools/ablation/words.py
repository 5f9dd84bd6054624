"""How figures, plans and links are written, alike on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from studies import report
from studies.figures import Figure

from ablation.analysis import Row

ONE_STEP = "*"
"""Stands behind a figure of a single recorded step, which has no spread."""


def number(value: float) -> str:
    """Four significant digits or all before the point, so that a median and its interval can be compared."""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:.{digits}f}"


def milliseconds(figure: Figure | None) -> str:
    """Median and interval, in milliseconds."""
    return figure.map(lambda value: value * 1e3).text(number) if figure else "-"


def times(figure: Figure | None) -> str:
    """Median and interval of a ratio."""
    return figure.text("{:.3f}".format) if figure else "-"


def percent(figure: Figure | None) -> str:
    """Median and interval of a share."""
    return figure.text("{:.1%}".format) if figure else "-"


def recorded(figure: Figure | None, write: Callable[[Figure | None], str]) -> str:
    """A figure of recorded steps: marked, and without an interval, where one step is all there is."""
    text = write(figure)
    return text.partition(" ")[0] + ONE_STEP if figure and figure.low == figure.high else text


def gains(row: Row) -> tuple[str, str, str]:
    """Speed-up, its part of the limit, and the share that is hidden."""
    return times(row.speedup), times(row.part_of_limit), recorded(row.hidden_share, percent)


def name(one: Mapping[str, Any], *kinds: str) -> str:
    """Of an arm, with the slots that the solver has chosen; those of others are in their names."""
    slots = ", ".join(plan(one, kind) for kind in kinds)
    return f"{one['arm']['name']} ({slots})" if one["arm"]["mode"].startswith("adaptive") else one["arm"]["name"]


def plan(arm: Mapping[str, Any], kind: str) -> str:
    """Slots of an arm's chunks, by group where groups differ: ``2``, ``1+3``, ``3+3 | 2+2``; ``off`` where it waits.

    Those of a second call of the same group stand behind a stroke: ``3/1``, ``3+3/1+2``; ``2 behind`` launches its
    dispatch behind the op at the tap, ``2 within`` in its midst.
    """
    groups = arm["plans"].values()
    if not groups:
        return "-"
    if any(group["blocking"][kind] for group in groups):
        return "off"
    slots = [_of_group(group, kind) for group in groups]
    return slots[0] if len(set(slots)) == 1 else " | ".join(slots)


def _of_group(group: Mapping[str, Any], kind: str) -> str:
    slots = "/".join("+".join(map(str, call)) for call in group[kind])
    launch = group["launches"][kind]
    return slots if launch == "before" else f"{slots} {launch}"


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
    return {
        **report.origin(meta, computing=f", load {meta['hardware']['load']:.1f} at the end"),
        "ranks": f"{meta['ranks']}, threads of each: {meta['threads']}; links save up {meta['burst']} when idle",
        "model": ", ".join(f"{name} {size}" for name, size in meta["sizes"].items()),
        "repetitions": f"{meta['repetitions']} steps of each arm and kind, by turns; adaptive arms choose their plans "
        f"in steps before these; seed {meta['seed']}",
    }
