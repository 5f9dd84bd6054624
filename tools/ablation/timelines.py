"""From the spans of a result file to bars of a drawing: which arms, which lane, which row of the lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ablation.analysis import Point, best_fixed

LANES = ("compute", "communication")


@dataclass(frozen=True, slots=True)
class Bar:
    """One span, drawn.

    Attributes:
        op: what ran, whichever routed call it is of.
        lane: 0 is compute, 1 communication.
        row, rows: chunks under way at the same time lie below each other: which row of how many.
        start_ms, end_ms: from the begin of the pass.
    """

    op: str
    lane: int
    row: int
    rows: int
    start_ms: float
    end_ms: float


def chosen(point: Point) -> list[str]:
    """Arms worth a drawing: the pipelined stock layer, overlap off, the best fixed slot, what adaptive found."""
    arms = {one["arm"]["name"]: one for one in point["arms"] if one["timeline"]}
    models = [one["arm"]["model"] for one in arms.values() if one["arm"]["mode"] in ("off", "adaptive")]
    model = "pos2" if "pos2" in models or not models else models[0]
    stock = [name for name, one in arms.items() if one["arm"]["model"] == "top-2 pipelined"]
    fastest = min(stock, key=lambda name: median(arms[name]["seconds"]["training"]), default=None)
    names = [fastest, f"{model} off", best_fixed(point, model, "training")]
    names += [f"{model} adaptive", f"{model} adaptive chunks"]
    return [name for name in names if name is not None and name in arms]


def bars(spans: Sequence[Mapping[str, Any]]) -> dict[bool, list[Bar]]:
    """Bars of the forward and of the backward pass (key: whether it is backward), each from its own zero."""
    return {backward: _pass([span for span in spans if span["backward"] is backward]) for backward in (False, True)}


def _pass(spans: Sequence[Mapping[str, Any]]) -> list[Bar]:
    zero_s = min((span["start_s"] for span in spans), default=0.0)
    drawn: list[Bar] = []
    for lane, name in enumerate(LANES):
        ends_s: list[float] = []
        placed = []
        for span in sorted((span for span in spans if span["lane"] == name), key=lambda span: span["start_s"]):
            row = next((row for row, end_s in enumerate(ends_s) if end_s <= span["start_s"]), len(ends_s))
            ends_s[row:] = [span["end_s"], *ends_s[row + 1 :]]
            placed.append((span, row))
        for span, row in placed:
            start_ms, end_ms = ((span[end] - zero_s) * 1e3 for end in ("start_s", "end_s"))
            drawn.append(Bar(span["name"], lane, row, len(ends_s), start_ms, end_ms))
    return drawn
