"""Pictures of a result as SVG text for HTML: no file, no network, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ablation.analysis import Estimate, Row
from ablation.timelines import Bar

MODES = {
    "stock": ("Megatron's own layer", "#8c8c8c"),
    "chunks": ("stock layer, pipelined", "#b79ac8"),
    "off": ("overlap off", "#e08a6d"),
    "slot": ("fixed slot", "#a9cbe6"),
    "adaptive": ("adaptive", "#2f74b5"),
    "adaptive chunks": ("adaptive chunks", "#12375e"),
}
"""What bars are coloured by: legend and colour."""

WAYS = {
    "in sequence": "#8c8c8c",
    "2 chunks": "#c9a3dd",
    "4 chunks": "#7c4a9c",
    "off": "#e08a6d",
    "best fixed slot": "#7fb3dc",
    "adaptive": "#2f74b5",
    "adaptive chunks": "#12375e",
}
"""Lines of one architecture over the shares."""

OPS = {
    "attention": "#a6cee3",
    "MLP": "#5b9bc8",
    "shared expert": "#2c6a9e",
    "experts": "#f29c38",
    "route": "#c9b3dd",
    "encode": "#8fcf9f",
    "decode": "#4c9f63",
    "launch, unpack, add": "#6b6b6b",
    "dispatch": "#e8c04a",
    "combine": "#d46a5f",
}
"""Colours of a timeline."""
OTHER = "launch, unpack, add"

WIDTH_IN = 11.0
TITLE, TICKS = 10, 8
KINDS = ("training", "forward")
LIMIT = "#111111"
NOTHING = Estimate(0.0, 0.0, 0.0)


def mode_key(arm: Mapping[str, Any]) -> str:
    """Key of ``MODES``."""
    mode = str(arm["mode"])
    return mode if mode in MODES else mode.partition(" ")[0]


def step_times(arms: Sequence[Mapping[str, Any]], rows: Mapping[tuple[str, str], Row], salt: str) -> str:
    """Bars of the median step time with intervals, training and forward side by side, and the limit of each arm."""
    figure, axes = _two_panels(arms)
    colours = [MODES[mode_key(one["arm"])][1] for one in arms]
    limited = [place for place, one in enumerate(arms) if one["limit_s"]]
    for kind, axis in zip(KINDS, axes, strict=True):
        seconds = [rows[one["arm"]["name"], kind].seconds for one in arms]
        axis.barh(range(len(arms)), [one.value * 1e3 for one in seconds], height=0.72, color=colours)
        _spreads(axis, dict(enumerate(seconds)))
        limits_ms = [arms[place]["limit_s"][kind] * 1e3 for place in limited]
        lows, highs = [place - 0.45 for place in limited], [place + 0.45 for place in limited]
        axis.vlines(limits_ms, lows, highs, color=LIMIT, linewidth=1.8)
        axis.set_title(f"{kind}: ms of a step", loc="left", fontsize=TITLE)
    used = {mode_key(one["arm"]) for one in arms}
    handles: list[Any] = [Patch(color=colour, label=text) for key, (text, colour) in MODES.items() if key in used]
    handles.append(Line2D([], [], color=LIMIT, linewidth=1.8, label="limit: no plan is faster"))
    _legend(figure, handles)
    return svg(figure, salt)


def communication(arms: Sequence[Mapping[str, Any]], rows: Mapping[tuple[str, str], Row], salt: str) -> str:
    """Bars of a step's all-to-all time, split into hidden and exposed."""
    arms = [one for one in arms if one["communication_s"]]
    figure, axes = _two_panels(arms)
    for kind, axis in zip(KINDS, axes, strict=True):
        of_kind = [rows[one["arm"]["name"], kind] for one in arms]
        exposed = [row.exposed_s or NOTHING for row in of_kind]
        exposed_ms = [one.value * 1e3 for one in exposed]
        all_ms = [(row.communication_s or NOTHING).value * 1e3 for row in of_kind]
        hidden_ms = [max(total - part, 0.0) for total, part in zip(all_ms, exposed_ms, strict=True)]
        axis.barh(range(len(arms)), exposed_ms, height=0.72, color="#c8503c")
        axis.barh(range(len(arms)), hidden_ms, left=exposed_ms, height=0.72, color="#bcd9c1")
        _spreads(axis, {place: one for place, one in enumerate(exposed) if one.low < one.high})
        axis.set_title(f"{kind}: ms of all-to-all in a step", loc="left", fontsize=TITLE)
    _legend(figure, [Patch(color="#c8503c", label="exposed"), Patch(color="#bcd9c1", label="hidden")])
    return svg(figure, salt)


def across(panels: Mapping[str, Mapping[str, Sequence[tuple[float, Row]]]], kind: str) -> str:
    """Speed-up against the share of communication: a panel for each family, a line for each way to run it.

    Args:
        panels: by architecture, by key of ``WAYS``: share and row at each link rate.
        kind: training or forward.
    """
    columns = 3
    lines = -(-len(panels) // columns)
    figure = _figure(lines * 2.6 + 0.5)
    axes = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis, (family, ways) in zip(axes, panels.items(), strict=False):
        limit: dict[float, float] = {}
        for way, places in ways.items():
            ordered = sorted(places, key=lambda place: place[0])
            shares = [share for share, _ in ordered]
            axis.plot(shares, [row.speedup.value for _, row in ordered], "o-", color=WAYS[way], label=way, markersize=3)
            low, high = [row.speedup.low for _, row in ordered], [row.speedup.high for _, row in ordered]
            axis.fill_between(shares, low, high, color=WAYS[way], alpha=0.18, linewidth=0)
            limit |= {share: row.limit_speedup for share, row in ordered if row.limit_speedup}
        if limit:
            axis.plot(sorted(limit), [limit[share] for share in sorted(limit)], "--", color=LIMIT, label="limit")
        axis.axhline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_title(family, loc="left", fontsize=TITLE)
        axis.legend(frameon=False, fontsize=7, loc="upper left")
        axis.tick_params(labelbottom=True, labelleft=True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("share of the top-2 baseline's forward MoE time that is all-to-all", fontsize=9)
    figure.supylabel(f"{kind}: speed-up over top-2", fontsize=9)
    return svg(figure, f"across {kind}")


def timelines(lanes: Mapping[str, Mapping[bool, Sequence[Bar]]], salt: str) -> str:
    """One group's compute and communication lanes: a line for each arm, forward at the left, backward at the right."""
    figure = _figure(len(lanes) * 0.95 + 0.9)
    axes = figure.subplots(len(lanes), 2, sharex="col", squeeze=False)
    for line, (title, passes) in zip(axes, lanes.items(), strict=True):
        for axis, backward in zip(line, (False, True), strict=True):
            for bar in passes[backward]:
                _draw_bar(axis, bar)
            axis.set_yticks((0, 1), ("compute", "all-to-all"))
            axis.set_ylim(1.5, -0.5)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.set_title(title if not backward else "", loc="left", fontsize=TITLE)
    for axis, backward in zip(axes[-1], (False, True), strict=True):
        axis.set_xlabel(f"ms of the {'backward' if backward else 'forward'} pass", fontsize=9)
    for axis in axes.flat:
        width = axis.get_xlim()[1]
        for text in list(axis.texts):
            # A label that its bar cannot hold says less than the colour.
            if text.get_gid() and float(text.get_gid()) < len(text.get_text()) * width * 0.0145:
                text.remove()
            else:
                text.set_gid(None)
    _legend(figure, [Patch(color=colour, label=name) for name, colour in OPS.items()])
    return svg(figure, salt)


def _draw_bar(axis: Axes, bar: Bar) -> None:
    colour = OPS.get(bar.op, OPS[OTHER])
    height = 0.8 / bar.rows
    middle = bar.lane - 0.4 + height * (bar.row + 0.5)
    length_ms = bar.end_ms - bar.start_ms
    axis.barh(
        middle, length_ms, left=bar.start_ms, height=height, color=colour, edgecolor="white", linewidth=0.2, zorder=2
    )
    if bar.op in OPS and bar.rows == 1:
        axis.text(
            bar.start_ms + length_ms / 2, middle, bar.op, ha="center", va="center", fontsize=7, gid=str(length_ms),
            color="white" if bar.op in ("shared expert", "decode", "combine") else "black",
        )  # fmt: skip


def svg(figure: Figure, salt: str) -> str:
    """A figure as an element of HTML: without prologue, namespaces and what nothing refers to."""
    for axis in figure.axes:
        axis.tick_params(labelsize=TICKS)
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": ["DejaVu Sans"]}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    return re.sub(r"font: ([^;\"]*)'DejaVu Sans'", r"font: \1'DejaVu Sans', Verdana, sans-serif", text)


def _figure(height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def _two_panels(arms: Sequence[Mapping[str, Any]]) -> tuple[Figure, Sequence[Axes]]:
    figure = _figure(len(arms) * 0.21 + 1.1)
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set_yticks(range(len(arms)), [one["arm"]["name"] for one in arms])
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    for axis in axes:
        axis.grid(axis="x", color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure, axes


def _spreads(axis: Axes, places: Mapping[int, Estimate]) -> None:
    below = [(one.value - one.low) * 1e3 for one in places.values()]
    above = [(one.high - one.value) * 1e3 for one in places.values()]
    middle = [one.value * 1e3 for one in places.values()]
    axis.errorbar(middle, list(places), xerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1.0, capsize=2.0)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    columns = 5 if len(handles) > 7 else len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
