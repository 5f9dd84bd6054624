"""Which codec, when, at what price: a section of ``docs/codec.md``, of losses of a study and step times of an ablation.

What was not measured is said to be so; no figure is written by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablation.analysis import SHARE_TOLERANCE, Point, arm_of, ratio
from ablation.arms import BASELINE
from studies import report
from studies.figures import Figure, spread

from codec_study import analysis, words
from codec_study.analysis import RunResult
from codec_study.arms import (
    BF16,
    FP8,
    FP8_ALL,
    HELD_UNCOMPENSATED,
    MODELS,
    NONE,
    REORDERED,
    UNIQUE,
    UNIQUE_FP8,
    all_arms,
    uncompensated,
)

BEGIN = "<!-- which codec: begin; tools/ablate_codec.py --write-advice writes from here to the end mark -->"
END = "<!-- which codec: end; what follows is written by hand -->"
SHARES = (0.6, 0.8, 0.9)
"""Of the top-2 MoE layer's forward time that the all-to-all takes, at which steps are compared."""
MISSING = "not measured"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Codec:
    """A line of the tables.

    Attributes:
        flags: that choose it.
        when: to use it.
        arm: of the study, whose loss is shown.
        carries: behind the model in names of the ablation's arms; None where it times none.
    """

    flags: str
    when: str
    arm: str
    carries: str | None = None


CODECS = (
    Codec("", "all-to-alls that the overlap hides: `--overlap-report` says it", NONE, ""),
    Codec(
        "`--a2a-unique rank`", "top-k above 1, several experts on a rank: changes the order of sums", UNIQUE, "unique"
    ),
    Codec("`--a2a-codec bf16`", "models of fp32, whose rows it halves", BF16, "bf16"),
    Codec("`--a2a-codec fp8`", "rounds the two transfers that bear it, as others do", FP8, "fp8"),
    Codec("`--a2a-codec fp8 --a2a-unique rank`", "both of these: fewer rows, in fewer bits", UNIQUE_FP8, "unique fp8"),
    Codec("`--a2a-codec fp8` and all of `--fp8-transfers`", "with a loss of your own beside it", FP8_ALL),
    Codec(
        "`--a2a-codec lsh`",
        "exposed all the same, far from converged: with a validation loss beside it",
        uncompensated(6),
    ),
    Codec("`--a2a-codec lsh --lsh-hashes 12 --lsh-target-rate 0.2`", "the slowest links", HELD_UNCOMPENSATED, "lsh"),
)
"""In the order in which to try them: what changes least stands first."""


def section(result: Mapping[str, Any], timed: Mapping[str, Any] | None) -> str:
    """What stands in the document.

    Args:
        result: of a study, with its ``runs``.
        timed: the result of an ablation of step times; None where there is none.
    """
    runs, points = result["runs"], timed["points"] if timed else []
    return report.rendered(
        HERE / "advice.md",
        models=list(MODELS),
        lines=[(one.flags or "none", one.when, bytes_sent(points, one), *_losses(runs, one)) for one in CODECS],
        noise=[_percent(analysis.noise(runs, model)) for model in MODELS],
        reordered=REORDERED,
        shares=SHARES,
        steps=[(one.flags or "none", *_steps(points, one)) for one in CODECS if one.carries is not None],
        timed=timed["meta"] if timed else None,
    )


def _percent(above: Figure | None) -> str:
    return words.figure(above, "percent") if above else MISSING


def bytes_sent(points: Sequence[Point], codec: Codec) -> str:
    """Of a training step of top-2, over those without a codec, by the interface counters; over all link rates."""
    found = []
    for point in points if codec.carries is not None else ():
        mine, base = (_sent(point, name) for name in (_arm_names(codec)[0], BASELINE))
        if mine and base:
            found.append(mine / base)
    return words.figure(spread(found), "rate") if found else MISSING


def _sent(point: Point, name: str) -> float | None:
    arm: Mapping[str, Any] | None = arm_of(point, name)
    return arm["sent_bytes"].get("training") if arm else None


def _losses(runs: Sequence[RunResult], codec: Codec) -> list[str]:
    """How much higher the loss of each model is, and whether rounding alone does as much at every seed."""
    (arm,) = (one for one in all_arms() if one.name == codec.arm)
    cells = []
    for model in MODELS:
        above = spread(analysis.percent_above_none(runs, model, arm.name))
        within = above and arm.name != NONE and analysis.is_noise(runs, model, arm.name, above)
        said = _percent(above) + " (noise)" * bool(within)
        cells.append(said if arm.fits(model) else "one expert a token")
    return cells


def _arm_names(codec: Codec) -> tuple[str, str]:
    """The ablation's arms of top-2 and of pos2 top-2."""
    if not codec.carries:
        return BASELINE, "pos2 top-2 adaptive chunks"
    return f"top-2 {codec.carries} off", f"pos2 top-2 {codec.carries} adaptive chunks"


def _steps(points: Sequence[Point], codec: Codec) -> list[str]:
    """Training steps that fit in one of top-2: of top-2 at each share, and of pos2 top-2."""
    return [_speedup(points, share, name) for name in _arm_names(codec) for share in SHARES]


def _speedup(points: Sequence[Point], share: float, name: str) -> str:
    for point in points:
        where = point["wanted_share"]
        if where is not None and abs(where - share) <= SHARE_TOLERANCE and arm_of(point, name):
            one: Figure = ratio(point, "training", BASELINE, name)
            return one.text("{:.2f}".format)
    return MISSING
