"""From the seconds of every step to medians, paired speed-ups and their spread. Reports need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from studies import kept
from studies.figures import Figure, estimate

from ablation.arms import BASELINE
from megatron_scmoe.overlap.spans import hidden_share

RESULT = "result.json"
FORMAT = 2
"""Of a result: 1 had no number, and of the ops of an arm what they cost in one chunk alone."""
SHARE_TOLERANCE = 0.015
"""How far the share at a link rate may be from the one that was asked for."""
KINDS = ("training", "forward")
"""Of steps."""


@dataclass(frozen=True, slots=True)
class Row:
    """One arm at one link rate, in one kind of step.

    Attributes:
        point: which link rate, by its place in the results.
        arm, kind: what was timed.
        seconds: of a step.
        speedup: the baseline's seconds over this arm's, paired by repetition.
        limit_speedup: what no plan of this architecture beats; None where it was not computed.
        part_of_limit: speed-up over that; the spread is the speed-up's.
        hidden_share, exposed_s, communication_s: of recorded steps; None for Megatron's own layers. With one recorded
            step the interval has no length: it has no spread to tell.
    """

    point: int
    arm: str
    kind: str
    seconds: Figure
    speedup: Figure
    limit_speedup: float | None
    part_of_limit: Figure | None
    hidden_share: Figure | None
    exposed_s: Figure | None
    communication_s: Figure | None


type Point = Mapping[str, Any]
"""One link rate of a result, as result.json holds it."""
type Rows = Mapping[tuple[str, str], Row]
"""Rows of one link rate by arm and kind."""


def read(folder: Path) -> dict[str, Any]:
    """What ``render.write_results`` wrote of an earlier run.

    Raises:
        OSError, ValueError: where there is none.
    """
    result = kept.read(folder / RESULT)
    if not result.get("points"):
        raise ValueError(f"{RESULT} has no link whose share was measured")
    if (its := result.get("format", 1)) != FORMAT:
        raise ValueError(f"{RESULT} is of format {its!a:.20}, and this version reads format {FORMAT}: measure anew")
    return result


def rows(points: Sequence[Point], baseline: str = BASELINE) -> list[Row]:
    """All rows of a result file's ``points``."""
    result: list[Row] = []
    for index, point in enumerate(points):
        base = arm_of(point, baseline)
        for arm in point["arms"]:
            result += [_row(index, arm, base, kind) for kind in arm["seconds"]]
    return result


def rows_by_point(points: Sequence[Point]) -> list[Rows]:
    """The rows of each link rate."""
    found = rows(points)
    return [{(row.arm, row.kind): row for row in found if row.point == index} for index in range(len(points))]


def arm_of(point: Point, name: str) -> Any:
    """What an arm did at a link rate; None where it was not timed."""
    return next((arm for arm in point["arms"] if arm["arm"]["name"] == name), None)


def ratios(point: Point, kind: str, numerator: str, denominator: str) -> list[float]:
    """Paired ratios of two arms' seconds, repetition by repetition."""
    above, below = (arm_of(point, name)["seconds"][kind] for name in (numerator, denominator))
    return [a / b for a, b in zip(above, below, strict=True)]


def ratio(point: Point, kind: str, numerator: str, denominator: str) -> Figure:
    """Median of the paired ratios, with its interval."""
    return estimate(ratios(point, kind, numerator, denominator))


def best_fixed(point: Point, model: str, kind: str) -> str | None:
    """The arm with a fixed slot that has the smallest median; None where the model has no such arm."""
    medians = {
        arm["arm"]["name"]: median(arm["seconds"][kind])
        for arm in point["arms"]
        if arm["arm"]["model"] == model and arm["arm"]["mode"].startswith("slot ")
    }
    return min(medians, key=medians.__getitem__, default=None)


def _row(point: int, arm: Mapping[str, Any], base: Mapping[str, Any], kind: str) -> Row:
    seconds, base_seconds = arm["seconds"][kind], base["seconds"][kind]
    speedup = estimate(b / a for a, b in zip(seconds, base_seconds, strict=True))
    limit = median(base_seconds) / arm["limit_s"][kind] if arm["limit_s"] else None
    communication, exposed = (_steps(arm[name].get(kind)) for name in ("communication_s", "exposed_s"))
    hidden = [hidden_share(*step) for step in zip(exposed, communication, strict=True)]
    of_steps = [estimate(values) if values else None for values in (hidden, exposed, communication)]
    part = speedup.map(lambda value: value / limit) if limit else None
    return Row(point, arm["arm"]["name"], kind, estimate(seconds), speedup, limit, part, *of_steps)


def _steps(recorded: float | Sequence[float] | None) -> list[float]:
    """One value for each recorded step; files hold a number where there was one step."""
    if recorded is None:
        return []
    return [recorded] if isinstance(recorded, int | float) else list(recorded)
