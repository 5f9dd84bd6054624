"""Pictures of a result, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from studies.figures import Figure
from studies.plots import LABEL, TITLE, band, grid, legend, panels, svg, whiskers

from ablation.analysis import KINDS, Row, Rows
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

LIMIT = "#111111"
NOTHING = Figure(0.0, 0.0, 0.0)


def mode_key(arm: Mapping[str, Any]) -> str:
    """Key of ``MODES``."""
    mode = str(arm["mode"])
    return mode if mode in MODES else mode.partition(" ")[0]


def step_times(arms: Sequence[Mapping[str, Any]], rows: Rows, salt: str) -> str:
    """Bars of the median step time with intervals, training and forward side by side, and the limit of each arm."""
    picture, axes = _bars_of(arms)
    colours = [MODES[mode_key(one["arm"])][1] for one in arms]
    limited = [place for place, one in enumerate(arms) if one["limit_s"]]
    for kind, axis in zip(KINDS, axes, strict=True):
        times = [_ms(rows[one["arm"]["name"], kind].seconds) for one in arms]
        axis.barh(range(len(arms)), [one.value for one in times], height=0.72, color=colours)
        _spreads(axis, dict(enumerate(times)))
        limits_ms = [arms[place]["limit_s"][kind] * 1e3 for place in limited]
        lows, highs = [place - 0.45 for place in limited], [place + 0.45 for place in limited]
        axis.vlines(limits_ms, lows, highs, color=LIMIT, linewidth=1.8)
        axis.set_title(f"{kind}: ms of a step", loc="left", fontsize=TITLE)
    used = {mode_key(one["arm"]) for one in arms}
    handles: list[Any] = [Patch(color=colour, label=text) for key, (text, colour) in MODES.items() if key in used]
    handles.append(Line2D([], [], color=LIMIT, linewidth=1.8, label="limit: no plan is faster"))
    legend(picture, handles)
    return svg(picture, salt)


def communication(arms: Sequence[Mapping[str, Any]], rows: Rows, salt: str) -> str:
    """Bars of a step's all-to-all time, split into hidden and exposed."""
    arms = [one for one in arms if one["communication_s"]]
    picture, axes = _bars_of(arms)
    colours = {"exposed": "#c8503c", "hidden": "#bcd9c1"}
    for kind, axis in zip(KINDS, axes, strict=True):
        of_kind = [rows[one["arm"]["name"], kind] for one in arms]
        exposed = [_ms(row.exposed_s or NOTHING) for row in of_kind]
        all_ms = [_ms(row.communication_s or NOTHING).value for row in of_kind]
        exposed_ms = [one.value for one in exposed]
        hidden_ms = [max(total - part, 0.0) for total, part in zip(all_ms, exposed_ms, strict=True)]
        axis.barh(range(len(arms)), exposed_ms, height=0.72, color=colours["exposed"])
        axis.barh(range(len(arms)), hidden_ms, left=exposed_ms, height=0.72, color=colours["hidden"])
        _spreads(axis, {place: one for place, one in enumerate(exposed) if one.low < one.high})
        axis.set_title(f"{kind}: ms of all-to-all in a step", loc="left", fontsize=TITLE)
    legend(picture, [Patch(color=colour, label=name) for name, colour in colours.items()])
    return svg(picture, salt)


def across(families: Mapping[str, Mapping[str, Mapping[float, Row]]], kind: str) -> str:
    """Speed-up against the share of communication: a panel for each family, a line for each way to run it.

    Args:
        families: by architecture, by key of ``WAYS``, by share: the row of that link rate.
        kind: training or forward.
    """
    columns = 3
    lines = -(-len(families) // columns)
    picture, axes = panels(lines * 2.6 + 0.5, lines, columns, sharex=True, sharey=True)
    for axis, (family, ways) in zip(axes, families.items(), strict=False):
        limit: dict[float, float] = {}
        for way, places in ways.items():
            speedups = {share: row.speedup for share, row in places.items()}
            band(axis, speedups, WAYS[way], alpha=0.18, marker="o", label=way, markersize=3)
            limit |= {share: row.limit_speedup for share, row in places.items() if row.limit_speedup}
        if limit:
            axis.plot(sorted(limit), [limit[share] for share in sorted(limit)], "--", color=LIMIT, label="limit")
        axis.axhline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_title(family, loc="left", fontsize=TITLE)
        axis.legend(frameon=False, fontsize=7, loc="upper left")
        axis.tick_params(labelbottom=True, labelleft=True)
    for axis in axes[len(families) :]:
        axis.set_visible(False)
    picture.supxlabel("share of the top-2 baseline's forward MoE time that is all-to-all", fontsize=LABEL)
    picture.supylabel(f"{kind}: speed-up over top-2", fontsize=LABEL)
    return svg(picture, f"across {kind}")


def timelines(lanes: Mapping[str, Mapping[bool, Sequence[Bar]]], salt: str) -> str:
    """One group's compute and communication lanes: a line for each arm, forward at the left, backward at the right."""
    picture, axes = panels(len(lanes) * 0.95 + 0.9, len(lanes), 2, sharex="col")
    passes = [(title, backward, its[backward]) for title, its in lanes.items() for backward in (False, True)]
    for axis, (title, backward, bars) in zip(axes, passes, strict=True):
        for bar in bars:
            _draw_bar(axis, bar)
        axis.set_yticks((0, 1), ("compute", "all-to-all"))
        axis.set_ylim(1.5, -0.5)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_title("" if backward else title, loc="left", fontsize=TITLE)
    for axis, direction in zip(axes[-2:], ("forward", "backward"), strict=True):
        axis.set_xlabel(f"ms of the {direction} pass", fontsize=LABEL)
    for axis in axes:
        width = axis.get_xlim()[1]
        for text in list(axis.texts):
            # A label that its bar cannot hold says less than the colour.
            length_ms = text.get_gid()
            if length_ms and float(length_ms) < len(text.get_text()) * width * 0.0145:
                text.remove()
            else:
                text.set_gid(None)
    legend(picture, [Patch(color=colour, label=name) for name, colour in OPS.items()])
    return svg(picture, salt)


def _draw_bar(axis: Axes, bar: Bar) -> None:
    colour = OPS.get(bar.op.removeprefix("core "), OPS[OTHER])  # an attention at a tap is two spans
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


def _bars_of(arms: Sequence[Mapping[str, Any]]) -> tuple[Picture, Sequence[Axes]]:
    """Two panels, in which each arm has a line."""
    picture, axes = panels(len(arms) * 0.21 + 1.1, 1, 2, sharey=True)
    axes[0].set_yticks(range(len(arms)), [one["arm"]["name"] for one in arms])
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    for axis in axes:
        grid(axis, "x", hidden=("top", "right", "left"))
        axis.tick_params(axis="y", length=0)
    return picture, axes


def _ms(figure: Figure) -> Figure:
    return figure.map(lambda seconds: seconds * 1e3)


def _spreads(axis: Axes, places: Mapping[int, Figure]) -> None:
    figures = list(places.values())
    middle = [one.value for one in figures]
    axis.errorbar(middle, list(places), xerr=whiskers(figures), fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
