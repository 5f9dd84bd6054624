"""What to reach, as data, and a section of Markdown that says which of it a result reaches.

Figures of quality are medians of paired differences over seeds; beside them stand the smallest and the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from codec_study import analysis, cost, wall_time, words
from codec_study.analysis import RunResult, Spread
from codec_study.arms import (
    COMPARED_HASHES,
    COMPRESSED_CONTROL,
    CONTROL,
    HELD,
    HELD_RATE,
    HELD_UNCOMPENSATED,
    NONE,
    PAPER,
    UNCOMPRESSED,
    compensated,
    uncompensated,
)

BEGIN = "<!-- codec study: begin; tools/ablate_codec.py --write-results writes from here to the end mark -->"
END = "<!-- codec study: end; what follows is written by hand -->"
TOLERANCE_PERCENT = 0.5
RATE = 0.20
RATE_TOLERANCE = 0.10
SETTLED = 0.2
"""Part of the steps after which a target rate is held."""
LEAST = {"seeds": 3, "iterations": 1000}
"""A run that the goals are for has at least these."""

type Figure = Callable[[Sequence[RunResult], str], tuple[str, Spread | None]]
"""Of all runs and a model: which arm it is about, and its figure; None where it was not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the goals.

    Attributes:
        text: what it is.
        sign: how its figure must stand to its threshold: ``<=`` or ``>``.
        threshold: in the figure's unit.
        unit: ``percent`` (how much higher a loss is), ``rate`` or ``share``.
        published: what the paper says.
    """

    text: str
    sign: str
    threshold: float
    unit: str
    published: str = "not given"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGoal(Goal):
    """A goal that is judged for each model.

    Attributes:
        figure: of a model.
    """

    figure: Figure


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a result says of one goal, for one model if it is a model's.

    Attributes:
        arm: that the figure is about.
        met: None where nothing was judged.
        words: figure, range and verdict, or why there is none.
    """

    arm: str
    met: bool | None
    words: str


NOT_MEASURED = Outcome("", None, "not measured in this run")


def _loss_above(arm: str, against: str) -> Figure:
    return lambda runs, model: (arm, analysis.spread(analysis.percent_above(runs, model, arm, against)))


def smallest_rate(runs: Sequence[RunResult], model: str) -> tuple[str, Spread | None]:
    """Of the arms with a codec whose loss is within the tolerance of both none and the control: the smallest rate.

    A loss with means in the evaluation may hide what the model has not learned, so where it was evaluated with tokens,
    that loss must be within the tolerance of none too. An arm of fewer seeds than none has is not taken.
    """
    seeds = analysis.by_seed(runs, model, NONE).keys() & analysis.by_seed(runs, model, CONTROL).keys()

    def within(row: analysis.Row) -> bool:
        above = (row.to_none, row.to_control, row.with_tokens_to_none)
        return seeds <= set(row.seeds) and all(one is None or one.value <= TOLERANCE_PERCENT for one in above)

    others = (*UNCOMPRESSED, COMPRESSED_CONTROL)
    good = [row for row in analysis.rows(runs) if row.model == model and row.arm not in others and within(row)]
    best = min(good if seeds else (), key=lambda row: row.rate.value, default=None)
    return (best.arm, best.rate) if best else ("no arm is within 0.5% of both", None)


def _rate_error(arm: str) -> Figure:
    """How far an arm is from its target rate at most, once a fifth of the steps are over."""

    def figure(runs: Sequence[RunResult], model: str) -> tuple[str, Spread | None]:
        found = []
        for run in analysis.by_seed(runs, model, arm).values():
            last, _ = run["rate"][-1]
            found.append(max(abs(rate / HELD_RATE - 1) for step, rate in run["rate"] if step > SETTLED * last))
        return arm, analysis.spread(found)

    return figure


QUALITY = (
    ModelGoal(
        text=f"validation loss at equal tokens, {PAPER} above {NONE}",
        figure=_loss_above(PAPER, NONE),
        sign="<=",
        threshold=TOLERANCE_PERCENT,
        unit="percent",
        published="model quality is maintained",
    ),
    ModelGoal(
        text=f"validation loss at equal tokens, {PAPER} above {CONTROL} (experts that compute E(x) + x)",
        figure=_loss_above(PAPER, CONTROL),
        sign="<=",
        threshold=TOLERANCE_PERCENT,
        unit="percent",
        published="not compared",
    ),
    ModelGoal(
        text="rows, and so bytes, sent by the best arm whose loss is within 0.5% of both none and the control",
        figure=smallest_rate,
        sign="<=",
        threshold=RATE,
        unit="rate",
    ),
)
"""What the paper claims, and what would explain it away; ``claim`` reads them in this order."""
COMPENSATION = tuple(
    ModelGoal(
        text=f"negative control: {without} above {with_it}, {alike}",
        figure=_loss_above(without, with_it),
        sign=">",
        threshold=0.0,
        unit="percent",
    )
    for without, with_it, alike in (
        *((uncompensated(number), compensated(number), "with the same hash functions") for number in COMPARED_HASHES),
        (HELD_UNCOMPENSATED, HELD, "at the same rate"),
    )
)
TARGET = tuple(
    ModelGoal(
        text=(
            f"{arm}: largest relative difference of a mean of ten steps from its target, after a fifth of the training"
        ),
        figure=_rate_error(arm),
        sign="<=",
        threshold=RATE_TOLERANCE,
        unit="share",
    )
    for arm in (HELD, HELD_UNCOMPENSATED)
)
REFINED_WINS_PERCENT = 0.1
"""What refined clusters must win at the same hash functions to pay at equal time: by arithmetic, no training was timed.

At a hidden size of 1024 to refine takes 1.3% of an expert MLP's forward, so at most 0.5% of a step, of which that is
less than a third; a training without a codec that is shorter by a quarter of its steps loses 5%, one by 0.5% so 0.1%.
"""
REFINEMENT = tuple(
    ModelGoal(
        text=(
            "refined clusters win what their time is worth at a hidden size of 1024: "
            f"{uncompensated(hashes, refined=True)} above {uncompensated(hashes)}"
        ),
        figure=_loss_above(uncompensated(hashes, refined=True), uncompensated(hashes)),
        sign="<=",
        threshold=-REFINED_WINS_PERCENT,
        unit="percent",
    )
    for hashes in COMPARED_HASHES
)
GOALS = (*QUALITY, *COMPENSATION, *TARGET, *REFINEMENT)
"""All that is judged for each model."""
ENCODING = Goal(
    text=(
        "encode, residual and decode, 8192 x 1024 rows in fp32 on one core, in forwards of an expert MLP on the same"
        " rows"
    ),
    sign="<=",
    threshold=0.03,
    unit="share",
)
"""Judged once, by what ``cost.py`` measured."""


@dataclass(frozen=True, slots=True)
class Line:
    """A goal and what a result says of it, in words.

    Attributes:
        goal: with its threshold.
        model: that was judged; ``-`` where it is about none.
        outcome: of it.
        published: what the paper says.
    """

    goal: str
    model: str
    outcome: Outcome
    published: str


def judge(goal: ModelGoal, runs: Sequence[RunResult], model: str) -> Outcome:
    """Whether the median reaches the threshold, and whether the seeds disagree about it."""
    arm, figure = goal.figure(runs, model)
    if figure is None:
        seeds = (analysis.by_seed(runs, model, name).keys() for name in (NONE, CONTROL, PAPER))
        compared = goal.figure is smallest_rate and set.intersection(*map(set, seeds))
        return Outcome(arm, False, "**missed**") if compared else NOT_MEASURED
    return _outcome(goal, arm, figure, "the seeds")


def _outcome(goal: Goal, arm: str, figure: Spread, samples: str) -> Outcome:
    met = figure.value <= goal.threshold if goal.sign == "<=" else figure.value > goal.threshold
    missing = abs(figure.value - goal.threshold)
    verdict = "met" if met else f"**missed by {words.WRITE[goal.unit](missing).lstrip('+')}**"
    if (figure.low <= goal.threshold) != (figure.high <= goal.threshold):
        verdict += f", but {samples} disagree"
    return Outcome(arm, met, f"{words.figure(figure, goal.unit)}: {verdict}")


def claim(runs: Sequence[RunResult], model: str) -> str:
    """Whether the paper's claim, no loss of quality at a fifth of the rows, holds for a model, with its figures."""
    none, control, rate = (judge(goal, runs, model) for goal in QUALITY)
    if none.met is None or control.met is None:
        return f"`{model}`: not enough was trained to say."
    figures = f"{PAPER} against {NONE} {none.words}; against the control {control.words}"
    best = rate.arm
    if analysis.by_seed(runs, model, best):
        best = f"of the arms within 0.5% of both, {rate.arm} sends least: {rate.words}"
    if none.met and control.met and rate.met:
        return f"`{model}`: the claim holds here ({figures}; {best})."
    if none.met and control.met:
        return f"`{model}`: no loss, but not at a fifth of the rows ({figures}; {best})."
    why = ""
    if none.met:
        why = (
            f" Against {NONE} it seems to, but the direct path around the experts explains that: without any "
            "compression it gains more"
        )
    return f"`{model}`: **the claim does not hold here.**{why} ({figures}; {best})."


def lines(result: Mapping[str, Any]) -> list[Line]:
    """Every goal: those of each model, and what encoding costs."""
    runs = result["runs"]
    found = [
        Line(_with_threshold(goal), model, judge(goal, runs, model), goal.published)
        for goal in GOALS
        for model in analysis.models_of(runs)
    ]
    outcome = NOT_MEASURED
    if result["encoding"]:
        outcome = _outcome(ENCODING, PAPER, cost.share(result["encoding"], *cost.COMPENSATED), "repetitions")
    return [*found, Line(_with_threshold(ENCODING), "-", outcome, ENCODING.published)]


def _with_threshold(goal: Goal) -> str:
    return f"{goal.text}: {goal.sign} {words.WRITE[goal.unit](goal.threshold).lstrip('+')}"


def section(result: Mapping[str, Any]) -> str:
    """The claim, the goals and all arms, as Markdown."""
    runs = result["runs"]
    models = analysis.models_of(runs)
    claims = "\n".join(f"- {claim(runs, model)}" for model in models)
    heads = ["| goal | model | arm | measured | published |", "|---|---|---|---|---|"]
    cells = ((line.goal, line.model, line.outcome.arm, line.outcome.words, line.published) for line in lines(result))
    table = "\n".join([*heads, *(f"| {' | '.join(row)} |" for row in cells)])
    over_time = "\n".join(f"- {line}" for line in wall_time.lines(result))
    encoding = f"What encoding costs: {cost.described(result['encoding'])}." if result["encoding"] else ""
    parts = [_preface(result["meta"]), claims, table, _table(runs), over_time, words.NOTES, encoding]
    return "\n\n".join(part for part in parts if part)


def shortness(meta: Mapping[str, Any]) -> str:
    """What makes a study smaller than the goals want it; '' for nothing."""
    less = [f"{name} {meta[name]}" for name, least in LEAST.items() if meta[name] < least]
    needed = " and ".join(f"{least} {name}" for name, least in LEAST.items())
    return f"The goals are for at least {needed}; the least of an arm here: {', '.join(less)}." if less else ""


def _preface(meta: Mapping[str, Any]) -> str:
    facts = "\n".join(f"- {heading}: {text}" for heading, text in words.machine(meta).items())
    preface = f"Written by `tools/ablate_codec.py --write-results`; do not edit.\n\n{facts}"
    return "\n\n".join(text for text in (preface, shortness(meta)) if text)


def _table(runs: Sequence[RunResult]) -> str:
    headings = words.HEADINGS
    table = [f"| model | arm | seeds | {' | '.join(headings)} |", "|" + "---|" * (len(headings) + 3)]
    for row in analysis.rows(runs):
        table.append(f"| {row.model} | {row.arm} | {len(row.seeds)} | {' | '.join(words.cells(row))} |")
    return "\n".join(table)
