"""What to reach, as data, and which of it a result reaches.

Figures of quality are medians of paired differences over seeds; beside them stand the smallest and the largest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from studies.figures import NOT_MEASURED, SIGNS, Figure, Outcome, spread

from codec_study import analysis, cost, words
from codec_study.analysis import RunResult
from codec_study.arms import (
    BF16,
    COMPARED_HASHES,
    COMPRESSED_CONTROL,
    CONTROL,
    FP8,
    FP8_ALL,
    HELD,
    HELD_RATE,
    HELD_UNCOMPENSATED,
    NONE,
    NONE_TWO_RANKS,
    PAPER,
    REORDERED,
    ROUNDING,
    UNCOMPRESSED,
    UNIQUE,
    compensated,
    uncompensated,
)

BEGIN = "<!-- codec study: begin; tools/ablate_codec.py --write-results writes from here to the end mark -->"
END = "<!-- codec study: end; what follows is written by hand -->"
TOLERANCE_PERCENT = 0.5
CLOSE_PERCENT = 0.1
"""Of what is said to cost nothing."""
RATE = 0.20
RATE_TOLERANCE = 0.10
SETTLED = 0.2
"""Part of the steps after which a target rate is held."""
LEAST = {"seeds": 3, "iterations": 1000}
"""A run that the goals are for has at least these."""

type FigureOf = Callable[[Sequence[RunResult], str], tuple[str, Figure | None]]
"""Of all runs and a model: which arm it is about, and its figure; None where it was not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the goals.

    Attributes:
        text: what it is.
        sign: how its figure must stand to its threshold: ``<=`` or ``>``.
        threshold: in the figure's unit; None: the figure is shown and not judged.
        unit: ``percent`` (how much higher a loss is), ``rate`` or ``share``.
        figure: of a model; None where it is about none.
        published: what the paper says.
        fine: whether its threshold may be less than what rounding alone does, so that a miss may be nothing.
    """

    text: str
    sign: str
    threshold: float | None
    unit: str
    figure: FigureOf | None = None
    published: str = "not given"
    fine: bool = False

    def __str__(self) -> str:
        if self.threshold is None:
            return f"{self.text}: reported"
        return f"{self.text}: {self.sign} {words.WRITE[self.unit](self.threshold).lstrip('+')}"


def _loss(text: str, arm: str, against: str, *, sign: str, percent: float | None, **more: Any) -> Goal:
    """How much higher the loss of an arm is than that of another one."""

    def figure(runs: Sequence[RunResult], model: str) -> tuple[str, Figure | None]:
        return arm, spread(analysis.percent_above(runs, model, arm, against))

    return Goal(text=text, figure=figure, sign=sign, threshold=percent, unit="percent", **more)


def smallest_rate(runs: Sequence[RunResult], model: str) -> tuple[str, Figure | None]:
    """Of arms that send centroids and whose loss is within the tolerance of none and the control: the smallest rate.

    A loss with means in the evaluation may hide what the model has not learned, so where it was evaluated with tokens,
    that loss must be within the tolerance of none too. An arm of fewer seeds than none has is not taken.
    """
    seeds = analysis.by_seed(runs, model, NONE).keys() & analysis.by_seed(runs, model, CONTROL).keys()

    def within(row: analysis.Row) -> bool:
        above = (row.to_none, row.to_control, row.with_tokens_to_none)
        return seeds <= set(row.seeds) and all(one is None or one.value <= TOLERANCE_PERCENT for one in above)

    others = (*UNCOMPRESSED, *ROUNDING, COMPRESSED_CONTROL)
    good = [row for row in analysis.rows(runs) if row.model == model and row.arm not in others and within(row)]
    best = min(good if seeds else (), key=lambda row: row.rate.value, default=None)
    return (best.arm, best.rate) if best else ("no arm is within 0.5% of both", None)


def _target(arm: str) -> Goal:
    """How far an arm is from its target rate at most, once a fifth of the steps are over."""

    def figure(runs: Sequence[RunResult], model: str) -> tuple[str, Figure | None]:
        found = []
        for run in analysis.by_seed(runs, model, arm).values():
            last, _ = run["rate"][-1]
            found.append(max(abs(rate / HELD_RATE - 1) for step, rate in run["rate"] if step > SETTLED * last))
        return arm, spread(found)

    text = f"{arm}: largest relative difference of a mean of ten steps from its target, after a fifth of the training"
    return Goal(text=text, figure=figure, sign="<=", threshold=RATE_TOLERANCE, unit="share")


_AT_EQUAL_TOKENS = "validation loss at equal tokens"
_ABOVE = f"{_AT_EQUAL_TOKENS}, {PAPER} above"
_CLOSE: Any = {"sign": "<=", "percent": CLOSE_PERCENT, "fine": True}
_HOLDS: Any = {"sign": "<=", "percent": TOLERANCE_PERCENT}
QUALITY = (
    _loss(f"{_ABOVE} {NONE}", PAPER, NONE, **_HOLDS, published="model quality is maintained"),
    _loss(f"{_ABOVE} {CONTROL} (experts that compute E(x) + x)", PAPER, CONTROL, **_HOLDS, published="not compared"),
    Goal(
        text="rows, and so bytes, sent by the best arm whose loss is within 0.5% of both none and the control",
        figure=smallest_rate,
        sign="<=",
        threshold=RATE,
        unit="rate",
    ),
)
"""What the paper claims, and what would explain it away; ``claim`` reads them in this order."""
COMPENSATION = tuple(
    _loss(f"negative control: {without} above {with_it}, {alike}", without, with_it, sign=">", percent=0.0)
    for without, with_it, alike in (
        *((uncompensated(number), compensated(number), "with the same hash functions") for number in COMPARED_HASHES),
        (HELD_UNCOMPENSATED, HELD, "at the same rate"),
    )
)
TARGET = tuple(map(_target, (HELD, HELD_UNCOMPENSATED)))
REFINED_WINS_PERCENT = 0.1
"""What refined clusters must win at the same hash functions to pay at equal time: by arithmetic, no training was timed.

At a hidden size of 1024 to refine takes 1.3% of an expert MLP's forward, so at most 0.5% of a step, of which that is
less than a third; a training without a codec that is shorter by a quarter of its steps loses 5%, one by 0.5% so 0.1%.
"""
_PAYS = "refined clusters win what their time is worth at a hidden size of 1024:"
REFINEMENT = tuple(
    _loss(f"{_PAYS} {refined} above {plain}", refined, plain, sign="<=", percent=-REFINED_WINS_PERCENT)
    for refined, plain in ((uncompensated(hashes, refined=True), uncompensated(hashes)) for hashes in COMPARED_HASHES)
)
EQUAL_PERCENT = 0.01
"""Of the loss of the first steps, before rounding has grown: what is wrong in kind shows there, and not at the end."""


def _first_loss(arm: str, against: str) -> Goal:
    """How far the mean training loss of the first ten steps is from that of another arm."""

    def figure(runs: Sequence[RunResult], model: str) -> tuple[str, Figure | None]:
        mine, others = analysis.by_seed(runs, model, arm), analysis.by_seed(runs, model, against)
        both = sorted(mine.keys() & others.keys())
        first = [(mine[seed]["train"][0][1], others[seed]["train"][0][1]) for seed in both]
        return arm, spread(100 * abs(one / other - 1) for one, other in first)

    text = f"{arm}: mean training loss of the first steps, distance from {against}"
    return Goal(text=text, figure=figure, sign="<=", threshold=EQUAL_PERCENT, unit="fine percent")


EXACT = (
    _first_loss(UNIQUE, NONE_TWO_RANKS),
    _loss(f"{_AT_EQUAL_TOKENS}, {UNIQUE} above {NONE_TWO_RANKS}", UNIQUE, NONE_TWO_RANKS, **_CLOSE),
)
"""Of what changes the order of sums alone."""
ROUNDED = (
    _loss(f"{_AT_EQUAL_TOKENS}, {FP8} (two transfers) above {NONE}", FP8, NONE, **_CLOSE, published="+0.06% to +0.2%"),
    *(
        _loss(f"{_AT_EQUAL_TOKENS}, {arm} above {NONE}", arm, NONE, **_CLOSE | {"percent": None})
        for arm in (FP8_ALL, BF16)
    ),
)
"""Of rows in fewer bits. Published of whole recipes in MXFP8."""
GOALS = (*QUALITY, *COMPENSATION, *TARGET, *REFINEMENT, *EXACT, *ROUNDED)
"""All that is judged for each model."""
_ROWS_ON_ONE_CORE = "8192 x 1024 rows in fp32 on one core, in forwards of an expert MLP on the same rows"
ENCODING = {
    cost.COMPENSATED: (PAPER, f"encode, residual and decode, {_ROWS_ON_ONE_CORE}"),
    cost.FP8: (FP8, f"encode and decode of fp8, {_ROWS_ON_ONE_CORE}"),
}
"""Arm and goal of what ``cost.py`` measured, judged once; by its parts."""
ENCODING_SHARE = 0.03


def judge(goal: Goal, runs: Sequence[RunResult], model: str) -> Outcome:
    """Whether the median reaches the threshold, and whether the seeds disagree about it."""
    assert goal.figure is not None
    arm, figure = goal.figure(runs, model)
    if figure is None:
        seeds = (analysis.by_seed(runs, model, name).keys() for name in (NONE, CONTROL, PAPER))
        compared = goal.figure is smallest_rate and set.intersection(*map(set, seeds))
        return Outcome(False, "**missed**", arm) if compared else NOT_MEASURED
    outcome = _outcome(goal, arm, figure, "the seeds")
    return _beside_noise(goal, outcome, figure, runs, model) if goal.fine else outcome


def _beside_noise(goal: Goal, outcome: Outcome, figure: Figure, runs: Sequence[RunResult], model: str) -> Outcome:
    """What rounding alone does beside an outcome: a miss that is noise at all seeds is none, and nothing is met."""
    noise = analysis.noise(runs, model)
    if noise is None:
        return replace(outcome, words=f"{outcome.words}; what rounding alone does was not measured")
    beside = f"rounding alone ({REORDERED} against {NONE}) does {words.figure(noise, goal.unit)}"
    if outcome.met is not False or not analysis.is_noise(runs, model, outcome.arm, figure):
        return replace(outcome, words=f"{outcome.words}; {beside}")
    return replace(outcome, met=None, words=f"{words.figure(figure, goal.unit)}: within noise, {beside}")


def _outcome(goal: Goal, arm: str, figure: Figure, samples: str) -> Outcome:
    if goal.threshold is None:
        return Outcome(None, words.figure(figure, goal.unit), arm)
    met = SIGNS[goal.sign](figure.value, goal.threshold)
    missing = abs(figure.value - goal.threshold)
    verdict = "met" if met else f"**missed by {words.WRITE[goal.unit](missing).lstrip('+')}**"
    if (figure.low <= goal.threshold) != (figure.high <= goal.threshold):
        verdict += f", but {samples} disagree"
    return Outcome(met, f"{words.figure(figure, goal.unit)}: {verdict}", arm)


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


def lines(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Every goal of each model, and what encoding costs: goal, model, arm, what was measured, what is published."""
    runs = result["runs"]
    found: list[tuple[Goal, str, Outcome]] = [
        (goal, model, judge(goal, runs, model)) for goal in GOALS for model in analysis.models_of(runs)
    ]
    for parts, (arm, text) in ENCODING.items():
        goal, outcome = Goal(text=text, sign="<=", threshold=ENCODING_SHARE, unit="share"), NOT_MEASURED
        if result["encoding"] and cost.measures(result["encoding"], *parts):
            outcome = _outcome(goal, arm, cost.share(result["encoding"], *parts), "repetitions")
        found.append((goal, "-", outcome))
    return [(str(goal), model, outcome.arm, outcome.words, goal.published) for goal, model, outcome in found]


def shortness(meta: Mapping[str, Any]) -> str:
    """What makes a study smaller than the goals want it; '' for nothing."""
    less = [f"{name} {meta[name]}" for name, least in LEAST.items() if meta[name] < least]
    needed = " and ".join(f"{least} {name}" for name, least in LEAST.items())
    return f"The goals are for at least {needed}; the least of an arm here: {', '.join(less)}." if less else ""
