"""Validation loss against wall time on a slow link: a study's losses, and step times of ``tools/ablate_overlap.py``.

The two were measured on models of other sizes, so a time here is that of as many steps of another model with the same
layers. It was timed sending all rows and about a fifth of them; what sends another part lies on the line between the
two, since transfers and experts take as long as there are rows.

What none reaches in less time is what it reaches when it is trained for fewer steps (``arms.SHORTER``), each with a
whole schedule of learning rates and evaluated on the same text. In the middle of a longer one it would look worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ablation.analysis import ratios
from ablation.analysis import read as read_ablation
from studies.figures import Figure, spread

from codec_study import analysis, words
from codec_study.analysis import RunResult
from codec_study.arms import CONTROL, NONE, ROUNDING, SHORTER, UNCOMPRESSED

SHARE = 0.45
"""The all-to-all's part of the whole step of top-2, at which training is compared."""

TIMED = {
    "top-2": ("top-2", "top-2 lsh off"),
    "pos2": ("pos2 adaptive chunks", "pos2 lsh adaptive chunks"),
}
"""Arms of the other tool that send all rows and a part of them, by model."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long steps take on one link.

    Attributes:
        step_share: the all-to-all's part of the whole step of top-2.
        link: in words.
        steps: a step of each timed arm, in steps of top-2: medians of paired ratios.
        rates: part of the rows that each of them sends.
    """

    step_share: float
    link: str
    steps: Mapping[str, float]
    rates: Mapping[str, float]

    def step(self, run: RunResult) -> float | None:
        """The mean step of this run, in steps of top-2; None where nothing alike was timed."""
        names = TIMED.get(run["model"])
        if names is None or not all(name in self.steps for name in names):
            return None
        all_rows, part = (self.steps[name] for name in names)
        if run["arm"] in (NONE, *SHORTER.values(), CONTROL):
            return all_rows
        if run["arm"] in (*UNCOMPRESSED, *ROUNDING):
            return None
        rate = fmean(rate for _, rate in run["rate"])  # it rises as the model learns
        return part + (all_rows - part) * (rate - self.rates[names[1]]) / (1 - self.rates[names[1]])


def read(folder: Path) -> StepTimes:
    """The link of an ablation at which the all-to-all's part of the step is nearest to ``SHARE``.

    Raises:
        ValueError: where it has no such link, or timed no top-2.
        OSError: where there is no result.
    """
    points = [point for point in read_ablation(folder)["points"] if point.get("step_share") is not None]
    if not points:
        raise ValueError("it has no link whose share of the step is known")
    point = min(points, key=lambda point: abs(point["step_share"] - SHARE))
    arms = {arm["arm"]["name"]: arm for arm in point["arms"]}
    if "top-2" not in arms:
        raise ValueError("it did not time top-2")
    return StepTimes(
        step_share=point["step_share"],
        link=str(point["rate"]),
        steps={name: median(ratios(point, "training", name, "top-2")) for name in arms},
        rates={name: arm["sent_rate"] for name, arm in arms.items()},
    )


def curve(runs: Sequence[RunResult], times: StepTimes, model: str, arm: str) -> dict[float, Figure]:
    """Validation loss over the time that it took, in steps of top-2; empty where no time is known.

    Seeds send other parts of the rows; the time is that of their median.
    """
    steps = [step for run in analysis.by_seed(runs, model, arm).values() if (step := times.step(run)) is not None]
    if not steps:
        return {}
    step = median(steps)
    return {number * step: one for number, one in analysis.over_steps(runs, model, arm, "validation").items()}


def percent_above_none(
    runs: Sequence[RunResult], times: StepTimes, model: str, arm: str, loss: str = analysis.LOSS
) -> Figure | None:
    """How much higher an arm's final loss is than what none reaches in the same time, in percent, over the seeds.

    Between trainings of none of two lengths its loss is a power of the steps. None where the arm is not the faster one,
    where no time or no such loss is known, or where no training of none was so short.
    """
    found = []
    whole, *shorter = (analysis.by_seed(runs, model, name) for name in (NONE, *SHORTER.values()))
    mine = analysis.by_seed(runs, model, arm)
    for seed in sorted(mine.keys() & whole.keys()):
        if loss not in mine[seed]:
            continue
        step, its_step = times.step(mine[seed]), times.step(whole[seed])
        if step is None or its_step is None:
            return None
        trainings = [its[seed] for its in (whole, *shorter) if seed in its]
        ends = sorted((its["validation"][-1][0], its[analysis.LOSS]) for its in trainings)
        reached = _loss_at(ends, mine[seed]["validation"][-1][0] * step / its_step)
        if reached is not None:
            found.append(100 * (mine[seed][loss] / reached - 1))
    return spread(found)


def _loss_at(ends: Sequence[tuple[int, float]], steps: float) -> float | None:
    """Final loss of a training of ``steps``, between those of a shorter and a longer one; None where one is missing."""
    for (fewer, loss), (more, next_loss) in pairwise(ends):
        if fewer <= steps <= more:
            return loss * (next_loss / loss) ** (log(steps / fewer) / log(more / fewer))
    return None


def lines(result: Mapping[str, Any]) -> list[str]:
    """What there is to say of a result that has step times: texts for each model, with the arms faster than none."""
    times: StepTimes | None = result.get("step_times")
    if times is None:
        return []
    runs = result["runs"]
    texts = []
    for model in analysis.models_of(runs):
        arms = [arm for arm in analysis.arms_of(runs, model) if arm not in (*UNCOMPRESSED, *ROUNDING)]
        kinds = {analysis.LOSS: "as trained", analysis.TOKENS_LOSS: "with tokens (the seeds that were)"}
        for loss, evaluated in kinds.items():
            found = {arm: percent_above_none(runs, times, model, arm, loss) for arm in arms}
            figures = [f"{arm} {words.figure(above, 'percent')}" for arm, above in found.items() if above is not None]
            if figures:
                texts.append(
                    f"{model}, final loss, evaluated {evaluated}, against that of none, trained for as many steps as "
                    f"fit the same wall time, where the all-to-all takes {times.step_share:.2f} of a whole step of "
                    f"top-2 ({times.link}), negative where the arm is better: {'; '.join(figures)}"
                )
    return texts
