"""Which of the goals a result reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from studies.figures import NOT_MEASURED, SIGNS, Figure, Outcome

from ablation import analysis, words
from ablation.analysis import KINDS, SHARE_TOLERANCE, Point, Rows
from ablation.goals import Goal, Measure

BEGIN = "<!-- ablation: begin; tools/ablate_overlap.py --write-results writes from here to the end mark -->"
END = "<!-- ablation: end; what follows is written by hand -->"
STEP_SHARE_TOLERANCE = 0.05
CONDITIONS = {"hidden": 512, "experts": 8, "tokens": 512}
"""Sizes that the goals are for, or larger."""


def judge(goal: Goal, kind: str, figure: Figure) -> Outcome:
    """Whether the median reaches the threshold, by how much it does not, and whether the spread leaves it open."""
    threshold = goal.training if kind == "training" else goal.forward
    text = figure.text("{:.3f}".format)
    if threshold is None:
        return Outcome(None, text)
    met = SIGNS[goal.sign](figure.value, threshold)
    missing = abs(figure.value - threshold)
    verdict = "met" if met else f"**missed by {missing:.3f}** ({missing / threshold:.1%})"
    if figure.low == figure.high and goal.measure in (Measure.HIDDEN_SHARE, Measure.BYTES, Measure.BYTES_RATIO):
        text = f"{figure.value:.3f} (one recorded step, no spread)"
    elif figure.low <= threshold <= figure.high:
        verdict += ", within the spread"
    return Outcome(met, f"{text}: {verdict}")


def matching(points: Sequence[Point], goal: Goal) -> Iterator[tuple[str, int | None]]:
    """The link rates that a goal is about: in words, and by their place among ``points`` (None: not measured)."""
    wanted: dict[str, Callable[[Point], bool]] = {f"share {share:g}": partial(_is_at, share) for share in goal.shares}
    more = ""
    if goal.unlimited:
        wanted = {"no limit on the links": lambda point: point["rate"] == "unlimited"}
    elif (share := goal.step_share) is not None:
        wanted = {f"{share:g} of the step": lambda point: abs(point["step_share"] - share) <= STEP_SHARE_TOLERANCE}
        more = "; {step_share:.2f} of the step"
    for text, holds in (wanted or {"any link": lambda _: True}).items():
        found = [index for index, point in enumerate(points) if holds(point)]
        yield from ((words.link(points[index]) + more.format(**points[index]), index) for index in found)
        if not found:
            yield text, None


def _is_at(share: float, point: Point) -> bool:
    where = point["share"] if point["wanted_share"] is None else point["wanted_share"]
    return point["rate"] != "unlimited" and abs(where - share) <= SHARE_TOLERANCE


def outcome(point: Point, rows: Rows, goal: Goal, arm: str, kind: str) -> Outcome:
    """Judge one arm at one link rate; ``rows`` are those of the point, by arm and kind."""
    row = rows.get((arm, kind))
    against = analysis.best_fixed(point, "pos2", kind) if goal.against == "best fixed" else goal.against
    if row is None or ((against, kind) not in rows and goal.measure is not Measure.BYTES):
        return NOT_MEASURED
    if goal.measure is Measure.HIDDEN_SHARE:
        filled = window_filled(point, "pos2 off", kind)
        if filled is None or row.hidden_share is None:
            return Outcome(None, "window unknown: pos2 off was not timed")
        if filled > 1:
            return Outcome(None, f"does not fit: {filled:.2f} times the window*")
        judged = judge(goal, kind, row.hidden_share)
        return Outcome(judged.met, f"{judged.words}; fills {filled:.2f} of the window*")
    figure = {
        Measure.PART_OF_LIMIT: lambda: row.part_of_limit,
        Measure.BYTES: lambda: bytes_apart(point, arm, kind),
        Measure.BYTES_RATIO: lambda: bytes_ratio(point, arm, str(against), kind),
        Measure.TIME_RATIO: lambda: analysis.ratio(point, kind, arm, str(against)),
        Measure.SPEEDUP: lambda: analysis.ratio(point, kind, str(against), arm),
    }[goal.measure]()
    return judge(goal, kind, figure) if figure else NOT_MEASURED


def bytes_apart(point: Point, arm: str, kind: str) -> Figure | None:
    """How far the bytes of a step by the interface counters are from those of its tensors, as a part of these."""
    one = analysis.arm_of(point, arm)
    if kind not in one["sent_bytes"] or kind not in one["tensor_bytes"]:
        return None
    apart = abs(one["sent_bytes"][kind] / one["tensor_bytes"][kind] - 1)
    return Figure(apart, apart, apart)


def bytes_ratio(point: Point, arm: str, against: str, kind: str) -> Figure | None:
    """Bytes of a step by the interface counters over those of another arm; None where nobody counted."""
    sent, others = (analysis.arm_of(point, name)["sent_bytes"].get(kind) for name in (arm, against))
    return Figure(*(sent / others,) * 3) if sent and others else None


def window_filled(point: Point, sequential: str, kind: str) -> float | None:
    """Communication over the dense ops behind the tap, of the direction where it is larger; None if unknown.

    Args:
        point: a link rate.
        sequential: the arm that runs its ops one after the other, whose recorded group tells what they take.
        kind: training has two directions, each with a window of its own.
    """
    one = analysis.arm_of(point, sequential)
    spans = one["timeline"].get(kind, []) if one else []
    forward = [span for span in spans if not span["backward"]]
    launch_s = min((span["start_s"] for span in forward if span["lane"] == "communication"), default=None)
    if launch_s is None:
        return None
    dense = {
        (span["name"], span["at"])
        for span in forward
        if span["start_s"] >= launch_s and span["name"] in ("attention", "MLP", "shared expert")
    }
    filled = []
    for backward in {span["backward"] for span in spans}:
        mine = [span for span in spans if span["backward"] is backward]
        window_s = sum(_length(span) for span in mine if (span["name"], span["at"]) in dense)
        filled.append(sum(_length(span) for span in mine if span["lane"] == "communication") / window_s)
    return max(filled)


def _length(span: Mapping[str, Any]) -> float:
    return float(span["end_s"] - span["start_s"])


def judged(
    points: Sequence[Point], rows: Sequence[Rows], goals: Sequence[Goal]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """The goals and what was measured.

    Returns:
        Goal, link, arm, training, forward and published of each arm that was timed; goals of which none was.
    """
    lines, missing = list[tuple[str, ...]](), list[str]()
    for goal in goals:
        for where, index in matching(points, goal):
            cells = {} if index is None else _cells(points[index], rows[index], goal)
            if not cells:
                missing.append(f"{_goal_words(goal)} ({where})")
            lines += [(_goal_words(goal), where, arm, *its, goal.published) for arm, its in cells.items()]
    return lines, missing


def _cells(point: Point, rows: Rows, goal: Goal) -> dict[str, list[str]]:
    """What there is to say about each arm of a goal, by kind of step; no arm that was not timed."""
    cells = {arm: [outcome(point, rows, goal, arm, kind).words for kind in KINDS] for arm in goal.arms}
    return {arm: its for arm, its in cells.items() if set(its) != {NOT_MEASURED.words}}


def _goal_words(goal: Goal) -> str:
    thresholds = f"{goal.training:g}"
    if goal.forward is None:
        thresholds += " in training"
    elif goal.forward != goal.training:
        thresholds += f" and {goal.forward:g}"
    return f"{goal.text}: {goal.sign} {thresholds}"


def other_conditions(meta: Mapping[str, Any]) -> list[str]:
    """What of a job is not as the goals want it."""
    other = [f"{name} {meta['sizes'][name]}" for name, least in CONDITIONS.items() if meta["sizes"][name] < least]
    return other + [f"{meta[name]} {name}" for name, wanted in (("ranks", 2), ("threads", 1)) if meta[name] != wanted]
