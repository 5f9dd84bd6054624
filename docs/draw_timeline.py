#!/usr/bin/env python3
"""Draw docs/timeline.svg: one group's forward with and without overlap, laid out from its plan.

The order of the steps is that of ``megatron_scmoe.overlap.plan``, which the layer runs. The lengths are an
illustration, not a measurement: attention, MLP and shared expert one unit each, an all-to-all 1.3, the experts 0.7.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from megatron_scmoe.contracts import Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.plan import (
    ADD,
    EXPERTS,
    FINISH_COMBINE,
    FINISH_DISPATCH,
    START_COMBINE,
    START_DISPATCH,
    forward_order,
    sequential_plan,
)

SVG = Path(__file__).with_name("timeline.svg")
OPS = ("attention", "MLP", "attention", "shared expert", ADD)
SHAPE = SpanShape(len(OPS), (RoutedCall(tap=1, landing=4),))  # pos2: between attention and MLP of the preceding block
UNITS = {"attention": 1.0, "MLP": 1.0, "shared expert": 1.0, EXPERTS: 0.7}
ALL_TO_ALL_UNITS = 1.3
LANES = ("computation", "all-to-all")
COLOURS = {"attention": "#9ecae1", "MLP": "#9ecae1", "shared expert": "#9ecae1", EXPERTS: "#fdae6b"}
COMM_COLOUR = "#bdbdbd"

Bar = tuple[int, float, float, str, str]
"""Lane, begin, length, label, colour."""


def lay_out(plan: Plan) -> list[Bar]:
    """Bars of one group's forward on two lanes: a start begins an all-to-all, a finish waits for it."""
    bars: list[Bar] = []
    now = arrival = 0.0
    for step in forward_order(OPS, SHAPE, plan):
        if step.name in (START_DISPATCH, START_COMBINE):
            arrival = now + ALL_TO_ALL_UNITS
            bars.append((1, now, ALL_TO_ALL_UNITS, step.name.removeprefix("start "), COMM_COLOUR))
            now = arrival if plan.blocking else now
        elif step.name in (FINISH_DISPATCH, FINISH_COMBINE):
            now = max(now, arrival)
        elif step.name in UNITS:
            bars.append((0, now, UNITS[step.name], step.name, COLOURS[step.name]))
            now += UNITS[step.name]
    return bars


def draw() -> None:
    """Write the picture."""
    matplotlib.rcParams.update({"svg.hashsalt": "timeline", "svg.fonttype": "none", "font.family": "sans-serif"})
    titles = {
        "--overlap off: every all-to-all is waited for": lay_out(sequential_plan(SHAPE)),
        "--overlap fixed --expert-slot 3: dense ops run meanwhile": lay_out(Plan(((3,),))),
    }
    figure, axes = plt.subplots(len(titles), 1, figsize=(9.0, 3.4), sharex=True, layout="constrained")
    for axis, (title, bars) in zip(axes, titles.items(), strict=True):
        for lane, begin, length, label, colour in bars:
            axis.barh(lane, length, left=begin, height=0.72, color=colour, edgecolor="#444444", linewidth=0.8)
            axis.text(begin + length / 2, lane, label, ha="center", va="center", fontsize=8)
        axis.set_title(title, loc="left", fontsize=9, family="monospace")
        axis.set_yticks(range(len(LANES)), LANES, fontsize=8)
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.savefig(SVG, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(f"wrote {SVG}")
