"""Pictures of a study, for the report: a panel for each model, a line for each arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import PercentFormatter
from studies.figures import Figure
from studies.plots import LABEL, TITLE, band, grid, legend, panels, svg, whiskers

from codec_study import analysis, wall_time
from codec_study.analysis import RunResult
from codec_study.arms import NONE, SHORTER
from codec_study.wall_time import StepTimes

COLOURS = {
    NONE: "#111111",
    **dict(zip(SHORTER.values(), ("#c4c4c4", "#9a9a9a", "#5c5c5c"), strict=True)),
    "none 2 chunks": "#a88f5a",
    "none 2 ranks": "#777777",
    "unique 2 ranks": "#0f8a8a",
    "unique fp8 2 ranks": "#f4978e",
    "bf16": "#d9b310",
    "fp8": "#e2711d",
    "fp8 four transfers": "#9d0208",
    "control": "#3a8f4d",
    "lsh q2": "#c6dbef",
    "lsh q4": "#8fc0e3",
    "lsh q6": "#2f74b5",
    "lsh q8": "#1c4f85",
    "lsh q10": "#0b2545",
    "lsh q4 no compensation": "#f0a58a",
    "lsh q6 no compensation": "#d0582e",
    "lsh q6 lowrank": "#b8860b",
    "control lsh q6": "#7fc97f",
    "lsh q6 lloyd": "#17becf",
    "lsh q4 lloyd no compensation": "#f5bfe3",
    "lsh q6 lloyd no compensation": "#e377c2",
    "spherical q12": "#8b5aa8",
    "lsh q12 at 0.2": "#c2185b",
}
"""Of the arms."""
OTHER = "#8c8c8c"

type Curves = Callable[[str, str], Mapping[Any, Figure]]
"""Of a model and an arm: figures by step."""


def losses(runs: Sequence[RunResult]) -> str:
    """Validation loss against tokens."""
    millions = {run["model"]: run["tokens_per_step"] / 1e6 for run in runs}

    def curve(model: str, arm: str) -> Mapping[Any, Figure]:
        found = analysis.over_steps(runs, model, arm, "validation")
        return {step * millions[model]: one for step, one in found.items()}

    return _lines(runs, curve, ("million tokens", "validation loss", "losses"))


def over_time(runs: Sequence[RunResult], times: StepTimes) -> str:
    """Validation loss against wall time on a slow link; arms of which no time is known are not there."""
    place = f"steps of top-2, all-to-all {times.step_share:.2f} of each"
    labels = (place, "validation loss", "over time")
    return _lines(runs, partial(wall_time.curve, runs, times), labels)


def differences(runs: Sequence[RunResult]) -> str:
    """How much higher the validation loss is than that of none, over the steps."""
    labels = ("step", f"validation loss above {NONE}", "differences")
    return _lines(runs, partial(analysis.percent_above_none_over_steps, runs), labels, percent=True)


def rates(runs: Sequence[RunResult]) -> str:
    """Rows sent over rows routed, over the steps."""
    return _lines(runs, partial(analysis.over_steps, runs, curve="rate"), ("step", "rows sent", "rates"))


def residuals(runs: Sequence[RunResult]) -> str:
    """What did not travel, relative to a token, over the steps."""
    labels = ("step", "residual of a token", "residuals")
    return _lines(runs, partial(analysis.over_steps, runs, curve="residual"), labels)


def differences_and_rates(runs: Sequence[RunResult]) -> str:
    """How much higher the final loss is than that of none against the final rate: a point for each arm, with ranges."""
    picture, axes = _panels(runs)
    style = {"fmt": "o", "markersize": 4, "elinewidth": 0.8, "capsize": 2.0}
    for model, axis in axes.items():
        for row in analysis.rows(runs):
            if row.model != model or row.to_none is None:
                continue
            place = (row.rate.value, row.to_none.value)
            spread: dict[str, Any] = {"xerr": whiskers([row.rate]), "yerr": whiskers([row.to_none]), **style}
            axis.errorbar(*place, color=COLOURS.get(row.arm, OTHER), **spread)
            axis.annotate(row.arm, place, (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel("rows sent over rows routed", fontsize=LABEL)
        axis.yaxis.set_major_formatter(PercentFormatter(decimals=1))
        axis.margins(x=0.12)
    next(iter(axes.values())).set_ylabel(f"validation loss above {NONE} at the end", fontsize=LABEL)
    return svg(picture, "differences and rates")


def _lines(runs: Sequence[RunResult], curves: Curves, labels: tuple[str, str, str], *, percent: bool = False) -> str:
    """Median lines with a band from the smallest to the largest seed; labels are those of x and y, and a salt."""
    x_label, y_label, salt = labels
    picture, axes = _panels(runs)
    shown: dict[str, Any] = {}
    for model, axis in axes.items():
        for arm in analysis.arms_of(runs, model):
            line = band(axis, curves(model, arm), COLOURS.get(arm, OTHER), alpha=0.13, linewidth=1.3)
            shown.setdefault(arm, line)
        axis.set_xlabel(x_label, fontsize=LABEL)
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(decimals=1))
    next(iter(axes.values())).set_ylabel(y_label, fontsize=LABEL)
    legend(picture, list(shown.values()), labels=list(shown))
    return svg(picture, salt)


def _panels(runs: Sequence[RunResult]) -> tuple[Picture, dict[str, Axes]]:
    """A panel for each model, by its name."""
    models = analysis.models_of(runs)
    picture, axes = panels(4.2, 1, len(models))
    for axis, model in zip(axes, models, strict=True):
        axis.set_title(model, loc="left", fontsize=TITLE)
        grid(axis)
    return picture, dict(zip(models, axes, strict=True))
