"""The speeds to reach, as data, and a section of Markdown that says which of them a result reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ablation import analysis, words
from ablation.analysis import Estimate, Row
from ablation.arms import BASELINE

BEGIN = "<!-- ablation: begin; tools/ablate_overlap.py --write-results writes from here to the end mark -->"
END = "<!-- ablation: end; what follows is written by hand -->"
KINDS = ("training", "forward")
SHARE_TOLERANCE = 0.015
CONDITIONS = {"hidden": 512, "experts": 8, "tokens": 512}
"""Sizes that the goals are for, or larger."""


class Measure(StrEnum):
    """What a goal is about."""

    PART_OF_LIMIT = "part of the limit"
    SPEEDUP = "speed-up"
    HIDDEN_SHARE = "hidden share"
    TIME_RATIO = "time ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the goals.

    Attributes:
        text: what it is.
        measure: of what.
        arms: each of which is shown.
        against: the arm that speed-ups and time ratios are relative to; "best fixed" is the fastest fixed slot of pos2.
        sign: how a figure must stand to its threshold: ``>=``, ``<=`` or ``>``.
        training, forward: thresholds; None: the figure is shown and not judged.
        shares: of the link rates that count; empty: all of them.
        step_share: only the link rate counts where the all-to-all takes about this part of top-2's whole training step.
        unlimited: only links without a limit count.
        published: what others give.
    """

    text: str
    measure: Measure
    arms: tuple[str, ...]
    against: str = BASELINE
    sign: str = ">="
    training: float
    forward: float | None
    shares: tuple[float, ...] = ()
    step_share: float | None = None
    unlimited: bool = False
    published: str = "not given"


ADAPTIVE = ("pos2 adaptive", "pos2 adaptive chunks")
GOALS = (
    Goal(
        text="speed-up over top-2, as a part of the limit",
        measure=Measure.PART_OF_LIMIT,
        arms=ADAPTIVE,
        training=0.95,
        forward=0.95,
        shares=(0.15, 0.45, 0.6, 0.8, 0.9),
    ),
    Goal(
        text="speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=ADAPTIVE,
        training=1.40,
        forward=1.60,
        shares=(0.6,),
        published="1.43x and 1.66x (8 GPUs, SwinV2)",
    ),
    Goal(
        text="speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=ADAPTIVE,
        training=2.0,
        forward=2.5,
        shares=(0.8,),
    ),
    Goal(
        text="hidden share, where communication fits the window",
        measure=Measure.HIDDEN_SHARE,
        arms=ADAPTIVE,
        training=0.95,
        forward=0.95,
        published="0.70 to 1.0; 0.82 to 0.95",
    ),
    Goal(
        text="time of adaptive over that of the best fixed slot",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive",),
        against="best fixed",
        sign="<=",
        training=1.02,
        forward=1.02,
    ),
    Goal(
        text="communication larger than the window: speed-up of adaptive chunks over one chunk",
        measure=Measure.SPEEDUP,
        arms=("pos2 adaptive chunks",),
        against="pos2 adaptive",
        sign=">",
        training=1.0,
        forward=1.0,
        shares=(0.9,),
    ),
    Goal(
        text="time of ScMoE over that of shared-expert, with nothing to hide",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive",),
        against="shared-expert",
        sign="<=",
        training=1.02,
        forward=1.02,
        unlimited=True,
    ),
    Goal(
        text="honest baseline: speed-up of pipelined top-2 over sequential top-2",
        measure=Measure.SPEEDUP,
        arms=("top-2 2 chunks", "top-2 4 chunks"),
        sign=">",
        training=1.0,
        forward=1.0,
        shares=(0.6,),
        published="faster",
    ),
    Goal(
        text="what recording marks costs: time of recorded over not recorded",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive (recorded)",),
        against="pos2 adaptive",
        sign="<=",
        training=1.01,
        forward=1.01,
    ),
    Goal(
        text="LSH-MoE at a rate of 0.2: speed-up of top-2 lsh over top-2, all-to-all 0.45 of the step",
        measure=Measure.SPEEDUP,
        arms=("top-2 lsh off",),
        training=1.6,
        forward=None,
        step_share=0.45,
        published="1.28x to 2.2x",
    ),
    Goal(
        text="both at once: speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=("pos2 lsh adaptive chunks",),
        training=4.0,
        forward=None,
        shares=(0.9,),
        published="nobody combines them",
    ),
    *(
        Goal(
            text=f"both at once: speed-up over {alone}",
            measure=Measure.SPEEDUP,
            arms=("pos2 lsh adaptive chunks",),
            against=alone,
            sign=">",
            training=1.0,
            forward=None,
            shares=(0.9,),
            published="nobody combines them",
        )
        for alone in ("pos2 adaptive chunks", "top-2 lsh off")
    ),
)
"""Issue 4, "Speed to reach", and of issue 5 what is about time."""


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
    if figure.low == figure.high and goal.measure is Measure.HIDDEN_SHARE:
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
    if row is None or (against, kind) not in rows:
        return Outcome(None, None, "not measured in this run")
    if goal.measure is Measure.HIDDEN_SHARE:
        filled = window_filled(point, "pos2 off", kind)
        if filled is None or row.hidden_share is None:
            return Outcome(None, None, "window unknown: pos2 off was not timed")
        if filled > 1:
            return Outcome(row.hidden_share, None, f"does not fit: {filled:.2f} times the window*")
        judged = judge(goal, kind, row.hidden_share)
        return Outcome(judged.figure, judged.met, f"{judged.words}; fills {filled:.2f} of the window*")
    if goal.measure is Measure.PART_OF_LIMIT:
        figure = row.part_of_limit
    elif goal.measure is Measure.TIME_RATIO:
        figure = analysis.ratio(point, kind, arm, str(against))
    else:
        figure = analysis.ratio(point, kind, str(against), arm)
    return judge(goal, kind, figure) if figure else Outcome(None, None, "not measured in this run")


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
    for goal in goals:
        for where, index in matching(points, goal):
            if index is None:
                lines.append(f"| {_goal_words(goal)} | {where} | | not measured in this run | | {goal.published} |")
                continue
            for arm in goal.arms:
                cells = [outcome(points[index], rows[index], goal, arm, kind).words for kind in KINDS]
                lines.append(f"| {_goal_words(goal)} | {where} | {arm} | {' | '.join(cells)} | {goal.published} |")
    return "\n\n".join([_preface(result["meta"]), "\n".join(lines), _notes()])


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
        "Figures are medians of paired ratios of steps that were timed by turns, in brackets their 95% bootstrap"
        " interval; the verdict is the median's. The limit is what no schedule of the ops, as they were measured one"
        " after the other in the same job, beats; its own uncertainty is in no interval. The best fixed slot is picked"
        " by its median, which favours it.\n\n"
        "\\* Communication over the dense ops behind the tap, of one group of `pos2 off` in one recorded step, in the"
        " direction where it is larger."
    )
