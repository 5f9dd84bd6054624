"""What people read of a result: a table on the terminal, an HTML report, a section of Markdown.

A result is what result.json holds. Every figure is one of it, or of ``analysis.rows`` made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
from rich import box
from rich.console import Console
from rich.table import Table

from ablation import analysis, goals, plots, timelines, verdicts, words
from ablation.analysis import Row
from ablation.arms import BASELINE

KINDS = ("training", "forward")
WIDE, MIDDLE = 110, 76
"""Columns that a terminal needs for each interval beside its median, and for all figures."""
SUMMARY = ("top-2 4 chunks", "pos2 off", "pos2 adaptive", "pos2 adaptive chunks")
"""Arms of the table at the top of the report; where none of them was timed, all are."""

Rows = Mapping[tuple[str, str], Row]
"""Rows of one link rate by arm and kind."""


def print_table(result: Mapping[str, Any], point: int, console: Console | None = None) -> None:
    """Print the figures of one link rate, as wide as the terminal is.

    Args:
        result: what result.json holds.
        point: which link rate, by its place.
        console: where to; the terminal if not given.
    """
    console = console or Console(highlight=False)
    chosen = result["points"][point]
    rows = _by_point(result)[point]
    one_line = console.width >= WIDE
    headings = ("ms", "speed-up", "of limit", "hidden")[: 4 if console.width >= MIDDLE else 2]
    for kind in KINDS:
        title = f"{kind}, {words.link(chosen)}; medians and 95% intervals"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("arm (slots)", overflow="fold")
        for heading in headings:
            table.add_column(heading, no_wrap=True, justify="right")
        for one in chosen["arms"]:
            row = rows[one["arm"]["name"], kind]
            figures = (
                words.milliseconds(row.seconds),
                words.times(row.speedup),
                words.times(row.part_of_limit),
                words.recorded(row.hidden_share, words.percent),
            )
            lines = [figure.replace(", ", ",").replace(" ", " " if one_line else "\n") for figure in figures]
            adaptive = str(one["arm"]["mode"]).startswith("adaptive")  # the slots of others are in their names
            name = f"{row.arm} ({words.plan(one, kind)})" if adaptive else row.arm
            table.add_row(name, *lines[: len(headings)])
        console.print(table)
    explained = f"speed-up: over {BASELINE}; of limit: 1 is what no plan beats; {words.ONE_STEP}: one recorded step"
    console.print(explained if len(headings) == 4 else f"{explained} (both need {MIDDLE} columns)", style="dim")


def html(result: Mapping[str, Any]) -> str:
    """The report: one page that loads nothing from anywhere."""
    by_point = _by_point(result)
    points = [_point(place, point, by_point[place]) for place, point in enumerate(result["points"])]
    figures = {kind: _across(result["points"], by_point, kind) for kind in KINDS} if len(points) > 1 else {}
    return pages.page(
        Path(__file__).parent,
        meta=words.machine(result["meta"]),
        machine=result["meta"],
        points=points,
        across=figures,
        summary=_summary(result["points"]),
        baseline=BASELINE,
        kinds=KINDS,
        words=words,
    )


def markdown(result: Mapping[str, Any], wanted: Sequence[goals.Goal] = goals.GOALS) -> str:
    """The goals, what was measured, and by how much a goal is missed; then all arms of each link rate."""
    tables = [_arms(*of) for of in zip(result["points"], _by_point(result), strict=True)]
    return "\n\n".join([verdicts.section(result, wanted), *tables])


def _arms(point: Mapping[str, Any], rows: Rows) -> str:
    figures = "speed-up | of limit | hidden"
    lines = [
        f"<details><summary>All arms: {words.link(point)}</summary>\n",
        f"| arm (slots in training, forward) | training: {figures} | forward: {figures} |",
        "|---|" + "---|" * 6,
    ]
    for one in point["arms"]:
        name, cells = one["arm"]["name"], []
        for kind in KINDS:
            row = rows[name, kind]
            hidden = words.recorded(row.hidden_share, words.percent)
            cells += [words.times(row.speedup), words.times(row.part_of_limit), hidden]
        if str(one["arm"]["mode"]).startswith("adaptive"):  # the slots of others are in their names
            name += f" ({', '.join(words.plan(one, kind).replace('|', '/') for kind in KINDS)})"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "\n</details>"])


def _by_point(result: Mapping[str, Any]) -> list[dict[tuple[str, str], Row]]:
    by_point: list[dict[tuple[str, str], Row]] = [{} for _ in result["points"]]
    for row in analysis.rows(result["points"], BASELINE):
        by_point[row.point][row.arm, row.kind] = row
    return by_point


def _point(place: int, point: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """What the template needs to know of one link rate."""
    balanced = [one for one in point["arms"] if one["arm"]["routing"] == "balanced"]
    real = [one for one in point["arms"] if one["arm"]["routing"] != "balanced"]
    names = timelines.chosen(point)
    lanes = {}
    by_name = {one["arm"]["name"]: one for one in point["arms"]}
    for name in names:
        plan = words.plan(by_name[name], "training")
        title = f"{name}, slots {plan}" if "adaptive" in name else name
        lanes[title] = timelines.bars(by_name[name]["timeline"]["training"])
    return {
        "link": words.link(point),
        "arms": point["arms"],
        "planned": [one for one in point["arms"] if one["plans"]],
        "counted": any(one["sent_bytes"].get("training") for one in point["arms"]),
        "real": [_real(point, one) for one in real],
        "rows": rows,
        "step_times": plots.step_times(balanced, rows, f"step times {place}"),
        "communication": plots.communication(balanced, rows, f"communication {place}"),
        "timelines": plots.timelines(lanes, f"timelines {place}") if lanes else "",
    }


def _real(point: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    """An arm with real routing, and its speed-up over the baseline with real routing where that was timed."""
    twin = next(
        (
            other["arm"]["name"]
            for other in point["arms"]
            if other["arm"]["model"] == BASELINE and other["arm"]["routing"] == one["arm"]["routing"]
        ),
        None,
    )
    over = {kind: analysis.ratio(point, kind, twin, one["arm"]["name"]) if twin else None for kind in KINDS}
    return {"result": one, "speedup": over}


def _summary(points: Sequence[Mapping[str, Any]]) -> list[str]:
    timed = [one["arm"]["name"] for one in points[0]["arms"]]
    return [name for name in SUMMARY if name in timed] or timed


def _across(points: Sequence[Mapping[str, Any]], by_point: Sequence[Rows], kind: str) -> str:
    """Speed-up against the share, a panel for each architecture."""
    panels: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for point, rows in zip(points, by_point, strict=True):
        for one in point["arms"]:
            family, way = _family(one["arm"]), _way(point, one["arm"], kind)
            if way:
                place = (point["share"], rows[one["arm"]["name"], kind])
                panels.setdefault(family, {}).setdefault(way, []).append(place)
    return plots.across(panels, kind)


def _family(arm: Mapping[str, Any]) -> str:
    return str(arm["model"]).removesuffix(" pipelined")


def _way(point: Mapping[str, Any], arm: Mapping[str, Any], kind: str) -> str | None:
    """Key of ``plots.WAYS``; None for arms that have no line."""
    if arm["routing"] != "balanced" or arm["recorded"]:
        return None
    mode = str(arm["mode"])
    if mode.startswith("slot "):
        return "best fixed slot" if arm["name"] == analysis.best_fixed(point, arm["model"], kind) else None
    number = mode.removeprefix("chunks ")
    return {"stock": "in sequence"}.get(mode, f"{number} chunks" if number != mode else mode)
