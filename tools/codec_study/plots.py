"""Pictures of a study as SVG text for HTML: a panel for each model, a line for each arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ablation.plots import TITLE, WIDTH_IN, svg
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from codec_study import analysis, wall_time
from codec_study.analysis import RunResult, Spread
from codec_study.arms import NONE, SHORTER
from codec_study.wall_time import StepTimes

COLOURS = {
    NONE: "#111111",
    **dict(zip(SHORTER.values(), ("#c4c4c4", "#9a9a9a", "#5c5c5c"), strict=True)),
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

type Curves = Callable[[str, str], Mapping[int, Spread] | Mapping[float, Spread]]
"""Of a model and an arm: figures by step."""


def losses(runs: Sequence[RunResult]) -> str:
    """Validation loss against tokens."""
    return _lines(
        runs,
        lambda model, arm: analysis.over_steps(runs, model, arm, "validation"),
        ("million tokens", "validation loss", "losses"),
        tokens=True,
    )


def over_time(runs: Sequence[RunResult], times: StepTimes) -> str:
    """Validation loss against wall time on a slow link; arms of which no time is known are not there."""
    return _lines(
        runs,
        lambda model, arm: wall_time.curve(runs, times, model, arm),
        (f"steps of top-2, all-to-all {times.step_share:.2f} of each", "validation loss", "over time"),
    )


def differences(runs: Sequence[RunResult]) -> str:
    """How much higher the validation loss is than that of none, over the steps."""
    return _lines(
        runs,
        lambda model, arm: analysis.percent_above_over_steps(runs, model, arm, NONE),
        ("step", f"validation loss above {NONE}", "differences"),
        percent=True,
    )


def rates(runs: Sequence[RunResult]) -> str:
    """Rows sent over rows routed, over the steps."""
    return _lines(
        runs, lambda model, arm: analysis.over_steps(runs, model, arm, "rate"), ("step", "rows sent", "rates")
    )


def residuals(runs: Sequence[RunResult]) -> str:
    """What did not travel, relative to a token, over the steps."""
    return _lines(
        runs,
        lambda model, arm: analysis.over_steps(runs, model, arm, "residual"),
        ("step", "residual of a token", "residuals"),
    )


def differences_and_rates(runs: Sequence[RunResult]) -> str:
    """How much higher the final loss is than that of none against the final rate: a point for each arm, with ranges."""
    figure, axes = _panels(runs)
    for axis, model in zip(axes, analysis.models_of(runs), strict=True):
        for row in analysis.rows(runs):
            if row.model != model or row.to_none is None:
                continue
            axis.errorbar(
                row.rate.value,
                row.to_none.value,
                xerr=_whiskers(row.rate),
                yerr=_whiskers(row.to_none),
                fmt="o", markersize=4, color=COLOURS.get(row.arm, OTHER), elinewidth=0.8, capsize=2.0,
            )  # fmt: skip
            place = (row.rate.value, row.to_none.value)
            axis.annotate(row.arm, place, (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel("rows sent over rows routed", fontsize=9)
        axis.yaxis.set_major_formatter(PercentFormatter(decimals=1))
        axis.margins(x=0.12)
    axes[0].set_ylabel(f"validation loss above {NONE} at the end", fontsize=9)
    return svg(figure, "differences and rates")


def _whiskers(one: Spread) -> list[list[float]]:
    return [[one.value - one.low], [one.high - one.value]]


def _lines(
    runs: Sequence[RunResult],
    curves: Curves,
    labels: tuple[str, str, str],
    *,
    tokens: bool = False,
    percent: bool = False,
) -> str:
    """Median lines with a band from the smallest to the largest seed; labels are those of x and y, and a salt."""
    x_label, y_label, salt = labels
    figure, axes = _panels(runs)
    shown: dict[str, object] = {}
    for axis, model in zip(axes, analysis.models_of(runs), strict=True):
        per_step = next(run["tokens_per_step"] for run in runs if run["model"] == model) / 1e6 if tokens else 1
        for arm in analysis.arms_of(runs, model):
            curve = curves(model, arm)
            places, colour = [step * per_step for step in curve], COLOURS.get(arm, OTHER)
            (line,) = axis.plot(places, [one.value for one in curve.values()], color=colour, linewidth=1.3)
            low, high = [one.low for one in curve.values()], [one.high for one in curve.values()]
            axis.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)
            shown.setdefault(arm, line)
        axis.set_xlabel(x_label, fontsize=9)
        if percent:
            axis.yaxis.set_major_formatter(PercentFormatter(decimals=1))
    axes[0].set_ylabel(y_label, fontsize=9)
    figure.legend(
        handles=list(shown.values()),
        labels=list(shown),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=8,
    )
    return svg(figure, salt)


def _panels(runs: Sequence[RunResult]) -> tuple[Figure, Sequence[Axes]]:
    models = analysis.models_of(runs)
    figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
    figure.patch.set_visible(False)
    axes = list(figure.subplots(1, len(models), squeeze=False).flat)
    for axis, model in zip(axes, models, strict=True):
        axis.set_title(model, loc="left", fontsize=TITLE)
        axis.grid(color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
