"""Figures with their spread: a median, and an interval or a range beside it. Reports need no torch."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import cache
from statistics import median

RESAMPLES = 2000
CONFIDENCE = 0.95
SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
"""How a figure must stand to the threshold of a goal."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A median, and what is around it: a bootstrap interval (``estimate``) or the range of all values (``spread``)."""

    value: float
    low: float
    high: float

    def map(self, convert: Callable[[float], float]) -> Figure:
        """The same in another unit."""
        return Figure(*map(convert, astuple(self)))

    def text(self, write: Callable[[float], str]) -> str:
        """``value [low, high]``."""
        return "{} [{}, {}]".format(*map(write, astuple(self)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a result says about one goal.

    Attributes:
        met: None where nothing was judged.
        words: figure, spread and verdict, or why there is none.
        arm: that it is about, where the goal does not name it.
    """

    met: bool | None
    words: str
    arm: str = ""


NOT_MEASURED = Outcome(None, "not measured in this run")


def ranged(values: Iterable[float]) -> Figure:
    """Median and range of some values. Raises ValueError where there is none."""
    found = list(values)
    return Figure(median(found), min(found), max(found))


def spread(values: Iterable[float]) -> Figure | None:
    """Median and range; None of nothing."""
    found = list(values)
    return ranged(found) if found else None


def estimate(values: Iterable[float]) -> Figure:
    """Median and percentile bootstrap interval at ``CONFIDENCE``; the same at every call."""
    return _estimate(tuple(values))


@cache
def _estimate(values: tuple[float, ...]) -> Figure:
    # Kept, because the report of a run is written anew after each link rate.
    generator = random.Random(0)
    resampled = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Figure(median(values), resampled[tail], resampled[-1 - tail])
