"""From the seconds of every step to medians, paired speed-ups and their spread. Reports need no torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from megatron_scmoe.overlap.spans import hidden_share

RESAMPLES = 2000
CONFIDENCE = 0.95


def read(folder: Path) -> Any:
    """What ``output.write_results`` wrote of an earlier run.

    Raises:
        OSError, ValueError, KeyError: where there is none.
    """
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not result.get("points"):
        raise ValueError("result.json has no points")
    return result


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and the interval that bootstrap gives it at ``CONFIDENCE``."""

    value: float
    low: float
    high: float


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
    seconds: Estimate
    speedup: Estimate
    limit_speedup: float | None
    part_of_limit: Estimate | None
    hidden_share: Estimate | None
    exposed_s: Estimate | None
    communication_s: Estimate | None


def estimate(values: Sequence[float]) -> Estimate:
    """The median of ``values`` and its percentile bootstrap interval; the same at every call."""
    return _estimate(tuple(values))


@cache
def _estimate(values: tuple[float, ...]) -> Estimate:
    # Kept, because the report of a run is written anew after each link rate.
    generator = random.Random(0)
    resampled = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Estimate(median(values), resampled[tail], resampled[-1 - tail])


def rows(points: Sequence[Mapping[str, Any]], baseline: str) -> list[Row]:
    """All rows of a result file's ``points``."""
    result: list[Row] = []
    for index, point in enumerate(points):
        base = next(arm for arm in point["arms"] if arm["arm"]["name"] == baseline)
        for arm in point["arms"]:
            result += [_row(index, arm, base, kind) for kind in arm["seconds"]]
    return result


def ratio(point: Mapping[str, Any], kind: str, numerator: str, denominator: str) -> Estimate:
    """Median of the paired ratios of two arms' seconds, repetition by repetition."""
    seconds = {arm["arm"]["name"]: arm["seconds"][kind] for arm in point["arms"]}
    return estimate([a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True)])


def best_fixed(point: Mapping[str, Any], model: str, kind: str) -> str | None:
    """The arm with a fixed slot that has the smallest median; None where the model has no such arm."""
    medians = {
        arm["arm"]["name"]: median(arm["seconds"][kind])
        for arm in point["arms"]
        if arm["arm"]["model"] == model and arm["arm"]["mode"].startswith("slot ")
    }
    return min(medians, key=medians.__getitem__, default=None)


def _row(point: int, arm: Mapping[str, Any], base: Mapping[str, Any], kind: str) -> Row:
    seconds, base_seconds = arm["seconds"][kind], base["seconds"][kind]
    speedup = estimate([b / a for a, b in zip(seconds, base_seconds, strict=True)])
    limit = median(base_seconds) / arm["limit_s"][kind] if arm["limit_s"] else None
    part = Estimate(speedup.value / limit, speedup.low / limit, speedup.high / limit) if limit else None
    communication, exposed = _steps(arm["communication_s"].get(kind)), _steps(arm["exposed_s"].get(kind))
    hidden = [hidden_share(*step) for step in zip(exposed, communication, strict=True)]
    return Row(
        point=point,
        arm=arm["arm"]["name"],
        kind=kind,
        seconds=estimate(seconds),
        speedup=speedup,
        limit_speedup=limit,
        part_of_limit=part,
        hidden_share=estimate(hidden) if hidden else None,
        exposed_s=estimate(exposed) if exposed else None,
        communication_s=estimate(communication) if communication else None,
    )


def _steps(recorded: float | Sequence[float] | None) -> list[float]:
    """One value for each recorded step; files hold a number where there was one step."""
    if recorded is None:
        return []
    return [recorded] if isinstance(recorded, int | float) else list(recorded)
