"""Which of the goals a result reaches, as a section of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablation import analysis, words
from ablation.analysis import Estimate, Row
from ablation.arms import BASELINE
from ablation.goals import Goal, Measure

BEGIN = "<!-- ablation: begin; tools/ablate_overlap.py --write-results writes from here to the end mark -->"
END = "<!-- ablation: end; what follows is written by hand -->"
KINDS = ("training", "forward")
NOT_MEASURED = "not measured in this run"
SHARE_TOLERANCE = 0.015
CONDITIONS = {"hidden": 512, "experts": 8, "tokens": 512}
"""Sizes that the goals are for, or larger."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a result says about one goal, for one arm at one link rate and kind of step.

    Attributes:
        figure: None where there is nothing to judge.
        met: None where nothing was judged.
        words: figure, spread and verdict, or why there is none.
    """

    figure: Estimate | None
    met: bool | None
    words: str


def judge(goal: Goal, kind: str, figure: Estimate) -> Outcome:
    """Whether the median reaches the threshold, by how much it does not, and whether the spread leaves it open."""
    threshold = goal.training if kind == "training" else goal.forward
    if threshold is None:
        return Outcome(figure, None, f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]")
    met = {
        ">=": figure.value >= threshold,
        "<=": figure.value <= threshold,
        ">": figure.value > threshold,
    }[goal.sign]
    missing = abs(figure.value - threshold)
    verdict = "met" if met else f"**missed by {missing:.3f}** ({missing / threshold:.1%})"
    spread = f"[{figure.low:.3f}, {figure.high:.3f}]"
    if figure.low == figure.high and goal.measure in (Measure.HIDDEN_SHARE, Measure.BYTES):
        spread = "(one recorded step, no spread)"
    elif figure.low <= threshold <= figure.high:
        verdict += ", within the spread"
    return Outcome(figure, met, f"{figure.value:.3f} {spread}: {verdict}")


def matching(points: Sequence[Mapping[str, Any]], goal: Goal) -> Iterator[tuple[str, int | None]]:
    """The link rates that a goal is about: in words, and by their place among ``points`` (None: not measured)."""
    if goal.unlimited:
        found = [index for index, point in enumerate(points) if point["rate"] == "unlimited"]
        yield from ((words.link(points[index]), index) for index in found)
        if not found:
            yield "no limit on the links", None
    elif goal.step_share is not None:
        found = [index for index, point in enumerate(points) if abs(point["step_share"] - goal.step_share) <= 0.05]
        for index in found:
            yield f"{words.link(points[index])}; {points[index]['step_share']:.2f} of the step", index
        if not found:
            yield f"{goal.step_share:g} of the step", None
    elif not goal.shares:
        yield from ((words.link(point), index) for index, point in enumerate(points))
    for share in goal.shares:
        found = [index for index, point in enumerate(points) if _is_at(point, share)]
        yield from ((words.link(points[index]), index) for index in found)
        if not found:
            yield f"share {share:g}", None


def outcome(point: Mapping[str, Any], rows: Mapping[tuple[str, str], Row], goal: Goal, arm: str, kind: str) -> Outcome:
    """Judge one arm at one link rate; ``rows`` are those of the point, by arm and kind."""
    row = rows.get((arm, kind))
    against = analysis.best_fixed(point, "pos2", kind) if goal.against == "best fixed" else goal.against
    if row is None or ((against, kind) not in rows and goal.measure is not Measure.BYTES):
        return Outcome(None, None, NOT_MEASURED)
    if goal.measure is Measure.HIDDEN_SHARE:
        filled = window_filled(point, "pos2 off", kind)
        if filled is None or row.hidden_share is None:
            return Outcome(None, None, "window unknown: pos2 off was not timed")
        if filled > 1:
            return Outcome(row.hidden_share, None, f"does not fit: {filled:.2f} times the window*")
        judged = judge(goal, kind, row.hidden_share)
        return Outcome(judged.figure, judged.met, f"{judged.words}; fills {filled:.2f} of the window*")
    figure: Estimate | None
    if goal.measure is Measure.PART_OF_LIMIT:
        figure = row.part_of_limit
    elif goal.measure is Measure.BYTES:
        figure = bytes_apart(point, arm, kind)
    elif goal.measure is Measure.TIME_RATIO:
        figure = analysis.ratio(point, kind, arm, str(against))
    else:
        figure = analysis.ratio(point, kind, str(against), arm)
    return judge(goal, kind, figure) if figure else Outcome(None, None, NOT_MEASURED)


def bytes_apart(point: Mapping[str, Any], arm: str, kind: str) -> Estimate | None:
    """How far the bytes of a step by the interface counters are from those of its tensors, as a part of these."""
    one = next(one for one in point["arms"] if one["arm"]["name"] == arm)
    if kind not in one["sent_bytes"] or kind not in one["tensor_bytes"]:
        return None
    apart = abs(one["sent_bytes"][kind] / one["tensor_bytes"][kind] - 1)
    return Estimate(apart, apart, apart)


def window_filled(point: Mapping[str, Any], sequential: str, kind: str) -> float | None:
    """Communication over the dense ops behind the tap, of the direction where it is larger; None if unknown.

    Args:
        point: a link rate.
        sequential: the arm that runs its ops one after the other, whose recorded group tells what they take.
        kind: training has two directions, each with a window of its own.
    """
    one = next((one for one in point["arms"] if one["arm"]["name"] == sequential), None)
    spans = one["timeline"].get(kind, []) if one else []
    forward = [span for span in spans if not span["backward"]]
    launch_s = min((span["start_s"] for span in forward if span["lane"] == "communication"), default=None)
    if launch_s is None:
        return None
    dense = {
        (span["name"], span["chunk"])
        for span in forward
        if span["start_s"] >= launch_s and span["name"] in ("attention", "MLP", "shared expert")
    }
    filled = []
    for backward in {span["backward"] for span in spans}:
        mine = [span for span in spans if span["backward"] is backward]
        window_s = sum(_length(span) for span in mine if (span["name"], span["chunk"]) in dense)
        filled.append(sum(_length(span) for span in mine if span["lane"] == "communication") / window_s)
    return max(filled)


def section(result: Mapping[str, Any], goals: Sequence[Goal]) -> str:
    """The goals and what was measured, as Markdown."""
    points = result["points"]
    rows = [{} for _ in points]  # type: list[dict[tuple[str, str], Row]]
    for row in analysis.rows(points, BASELINE):
        rows[row.point][row.arm, row.kind] = row
    lines = ["| goal | link | arm | training | forward | published |", "|---|---|---|---|---|---|"]
    missing = list[str]()
    for goal in goals:
        for where, index in matching(points, goal):
            cells = {} if index is None else _cells(points[index], rows[index], goal)
            if not cells:
                missing.append(f"{_goal_words(goal)} ({where})")
            for arm, its in cells.items():
                lines.append(f"| {_goal_words(goal)} | {where} | {arm} | {' | '.join(its)} | {goal.published} |")
    left = "\n".join(["Goals for which nothing was measured in this run:\n", *(f"- {goal}" for goal in missing)])
    parts = [_preface(result["meta"]), "\n".join(lines), left if missing else "", _notes()]
    return "\n\n".join(part for part in parts if part)


def _cells(point: Mapping[str, Any], rows: Mapping[tuple[str, str], Row], goal: Goal) -> dict[str, list[str]]:
    """What there is to say about each arm of a goal, by kind of step; no arm that was not timed."""
    cells = {arm: [outcome(point, rows, goal, arm, kind).words for kind in KINDS] for arm in goal.arms}
    return {arm: its for arm, its in cells.items() if set(its) != {NOT_MEASURED}}


def _is_at(point: Mapping[str, Any], share: float) -> bool:
    if point["rate"] == "unlimited":
        return False
    where = point["share"] if point["wanted_share"] is None else point["wanted_share"]
    return bool(abs(where - share) <= SHARE_TOLERANCE)


def _length(span: Mapping[str, Any]) -> float:
    return float(span["end_s"] - span["start_s"])


def _goal_words(goal: Goal) -> str:
    thresholds = f"{goal.training:g}"
    if goal.forward is None:
        thresholds += " in training"
    elif goal.forward != goal.training:
        thresholds += f" and {goal.forward:g}"
    return f"{goal.text}: {goal.sign} {thresholds}"


def _preface(meta: Mapping[str, Any]) -> str:
    facts = "\n".join(f"- {heading}: {text}" for heading, text in words.machine(meta).items())
    other = [f"{name} {meta['sizes'][name]}" for name, least in CONDITIONS.items() if meta["sizes"][name] < least]
    other += [f"{meta[name]} {name}" for name, wanted in (("ranks", 2), ("threads", 1)) if meta[name] != wanted]
    warning = f"\n\nThe goals are for another job than this one ({', '.join(other)} here)." if other else ""
    return f"Written by `tools/ablate_overlap.py --write-results`; do not edit.\n\n{facts}{warning}"


def _notes() -> str:
    return (
        "Times are compared by medians of paired ratios of steps that were timed by turns, in brackets their 95%"
        " bootstrap interval; the verdict is the median's. The limit is what no schedule of the ops, as they were"
        " measured one after the other in the same job, beats; its own uncertainty is in no interval. The best fixed"
        " slot is picked by its median, which favours it.\n\n"
        "\\* Communication over the dense ops behind the tap, of one group of `pos2 off` in one recorded step, in the"
        " direction where it is larger."
    )
