"""Pictures of a plan, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ablation.plots import timelines
from matplotlib.patches import Patch
from studies.plots import TITLE, grid, legend, panels, svg

__all__ = ["memory", "timelines", "times"]

GIB = 2**30
KINDS = {"weights": "#2f74b5", "gradients": "#7fb3dc", "optimizer": "#bcd9c1", "activations": "#f29c38"}
"""What memory is for, and colours."""
EXPOSED, BUBBLE, COMPUTES = "#d46a5f", "#b8b8b8", "#5b9bc8"


def memory(stages: Sequence[Mapping[str, Any]], capacity: float) -> str:
    """A bar for each pipeline stage: what a rank of it holds, and a line where the GPU's memory ends."""
    picture, (axis,) = panels(len(stages) * 0.3 + 1.2, 1, 1)
    begins = [0.0] * len(stages)
    for kind, colour in KINDS.items():
        sizes = [stage[kind] / GIB for stage in stages]
        axis.barh(range(len(stages)), sizes, left=begins, height=0.72, color=colour)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    axis.axvline(capacity / GIB, color="#111111", linewidth=1.8)
    axis.set_yticks(range(len(stages)), [f"stage {number}" for number in range(len(stages))])
    axis.set_ylim(len(stages) - 0.4, -0.6)
    axis.set_title("GiB of a rank; the line is the GPU's memory", loc="left", fontsize=TITLE)
    grid(axis, "x", hidden=("top", "right", "left"))
    legend(picture, [Patch(color=colour, label=kind) for kind, colour in KINDS.items()])
    return svg(picture, "plan memory")


def times(parts: Mapping[str, float], overlaps: Sequence[Mapping[str, Any]]) -> str:
    """What a step consists of at the left; the step with each overlap at the right."""
    rows = [(name, seconds) for name, seconds in parts.items() if seconds]
    picture, (left, right) = panels(max(len(rows), len(overlaps)) * 0.26 + 1.2, 1, 2)
    left.barh([name for name, _ in rows], [s * 1e3 for _, s in rows], color=[_colour(name) for name, _ in rows])
    left.set_title("ms of a step, by part", loc="left", fontsize=TITLE)
    names = [one["name"] for one in overlaps]
    exposed_ms = [one["a2a_exposed_s"] * 1e3 for one in overlaps]
    others_ms = [one["step_s"] * 1e3 - exposed for one, exposed in zip(overlaps, exposed_ms, strict=True)]
    right.barh(names, others_ms, color=COMPUTES)
    right.barh(names, exposed_ms, left=others_ms, color=EXPOSED)
    right.set_title("ms of a step, by overlap", loc="left", fontsize=TITLE)
    right.set_visible(bool(overlaps))
    for axis in (left, right):
        axis.invert_yaxis()
        grid(axis, "x", hidden=("top", "right", "left"))
    colours = {"computation": COMPUTES, "exposed communication": EXPOSED, "waiting for other stages": BUBBLE}
    legend(picture, [Patch(color=colour, label=name) for name, colour in colours.items()])
    return svg(picture, "plan times")


def _colour(part: str) -> str:
    return EXPOSED if part.startswith("exposed") else BUBBLE if "bubble" in part else COMPUTES
