"""What people read of a result: files of a folder, a table on the terminal, an HTML report, a section of Markdown.

A result is what result.json holds. Every figure is one of it, or of ``analysis.rows`` made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from studies import kept, report, tables

from ablation import analysis, goals, plots, timelines, verdicts, words
from ablation.analysis import KINDS, Point, Row, Rows
from ablation.arms import BASELINE

HERE = Path(__file__).parent
SHAPES = ((4, " ", ","), (4, "\n", ","), (2, "\n", ","))
"""Of the table on the terminal."""
SUMMARY = ("top-2 4 chunks", "pos2 off", "pos2 adaptive", "pos2 adaptive chunks")
"""Arms of the table at the top of the report; where none of them was timed, all are."""


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write all that was measured so far: JSON, CSV, HTML; and print the table of the newest link rate."""
    folder.mkdir(parents=True, exist_ok=True)
    kept.write(folder / analysis.RESULT, result)
    report.write(folder, [_flat(row) for row in analysis.rows(result["points"])], html(result))
    print_table(result, len(result["points"]) - 1)


def _flat(row: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if "Figure" not in str(field.type):
            flat[field.name] = value
            continue
        # The same columns in every row: Megatron's own layers lack some figures.
        for part, column in (("value", ""), ("low", "_low"), ("high", "_high")):
            flat[field.name + column] = getattr(value, part) if value else None
    return flat


def print_table(result: Mapping[str, Any], point: int, console: Console | None = None) -> None:
    """Print the figures of one link rate, as wide as the terminal is.

    Args:
        result: what result.json holds.
        point: which link rate, by its place.
        console: where to; the terminal if not given.
    """
    console = console or Console(highlight=False)
    chosen, rows = result["points"][point], analysis.rows_by_point(result["points"])[point]
    headings = ("arm (slots)", "ms", "speed-up", "of limit", "hidden")
    for kind in KINDS:
        lines = []
        for one in chosen["arms"]:
            row = rows[one["arm"]["name"], kind]
            lines.append((words.name(one, kind), words.milliseconds(row.seconds), *words.gains(row)))
        title = f"{kind}, {words.link(chosen)}; medians and 95% intervals"
        tables.show(console, title, headings, lines, SHAPES)
    explained = f"speed-up: over {BASELINE}; of limit: 1 is what no plan beats; {words.ONE_STEP}: one recorded step"
    console.print(explained, style="dim")


def print_tables(result: Mapping[str, Any], console: Console) -> None:
    """Print the figures of every link rate."""
    for point in range(len(result["points"])):
        print_table(result, point, console)


def html(result: Mapping[str, Any]) -> str:
    """The report: one page that loads nothing from anywhere."""
    rows = analysis.rows_by_point(result["points"])
    points = [_point(place, point, rows[place]) for place, point in enumerate(result["points"])]
    timed = [one["arm"]["name"] for one in result["points"][0]["arms"]]
    return report.rendered(
        HERE / "template.html",
        meta=words.machine(result["meta"]),
        machine=result["meta"],
        points=points,
        across={kind: _across(result["points"], rows, kind) for kind in KINDS} if len(points) > 1 else {},
        summary=[name for name in SUMMARY if name in timed] or timed,
        baseline=BASELINE,
        kinds=KINDS,
        words=words,
    )


def markdown(result: Mapping[str, Any], wanted: Sequence[goals.Goal] = goals.GOALS) -> str:
    """The goals, what was measured, and by how much a goal is missed; then all arms of each link rate."""
    rows = analysis.rows_by_point(result["points"])
    lines, missing = verdicts.judged(result["points"], rows, wanted)
    return report.rendered(
        HERE / "section.md",
        meta=words.machine(result["meta"]),
        other=verdicts.other_conditions(result["meta"]),
        lines=lines,
        missing=missing,
        points=list(zip(result["points"], rows, strict=True)),
        kinds=KINDS,
        words=words,
    )


def _point(place: int, point: Point, rows: Rows) -> dict[str, Any]:
    """What the template needs to know of one link rate."""
    balanced = [one for one in point["arms"] if one["arm"]["routing"] == "balanced"]
    lanes = {}
    for name in timelines.chosen(point):
        one = analysis.arm_of(point, name)
        title = f"{name}, slots {words.plan(one, 'training')}" if "adaptive" in name else name
        lanes[title] = timelines.bars(one["timeline"]["training"])
    return {
        "link": words.link(point),
        "arms": point["arms"],
        "planned": [one for one in point["arms"] if one["plans"]],
        "counted": any(one["sent_bytes"].get("training") for one in point["arms"]),
        "real": [_real(point, one) for one in point["arms"] if one not in balanced],
        "rows": rows,
        "step_times": plots.step_times(balanced, rows, f"step times {place}"),
        "communication": plots.communication(balanced, rows, f"communication {place}"),
        "timelines": plots.timelines(lanes, f"timelines {place}") if lanes else "",
    }


def _real(point: Point, one: Mapping[str, Any]) -> dict[str, Any]:
    """An arm with real routing, and its speed-up over the baseline with real routing where that was timed."""
    arm, timed = one["arm"], [other["arm"] for other in point["arms"]]
    twins = [other["name"] for other in timed if (other["model"], other["routing"]) == (BASELINE, arm["routing"])]
    over = {kind: analysis.ratio(point, kind, twins[0], arm["name"]) if twins else None for kind in KINDS}
    return {"result": one, "speedup": over}


def _across(points: Sequence[Point], rows: Sequence[Rows], kind: str) -> str:
    """Speed-up against the share, a panel for each architecture."""
    panels: dict[str, dict[str, dict[float, Row]]] = {}
    for point, its in sorted(zip(points, rows, strict=True), key=lambda one: one[0]["share"]):
        for one in point["arms"]:
            family, way = str(one["arm"]["model"]).removesuffix(" pipelined"), _way(point, one["arm"], kind)
            if way:
                panels.setdefault(family, {}).setdefault(way, {})[point["share"]] = its[one["arm"]["name"], kind]
    return plots.across(panels, kind)


def _way(point: Point, arm: Mapping[str, Any], kind: str) -> str | None:
    """Key of ``plots.WAYS``; None for arms that have no line."""
    if arm["routing"] != "balanced" or arm["recorded"]:
        return None
    mode = str(arm["mode"])
    if mode.startswith("slot "):
        return "best fixed slot" if arm["name"] == analysis.best_fixed(point, arm["model"], kind) else None
    number = mode.removeprefix("chunks ")
    return {"stock": "in sequence"}.get(mode, f"{number} chunks" if number != mode else mode)
