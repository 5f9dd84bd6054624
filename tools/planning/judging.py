"""A prediction beside what was measured, and what a goal says of many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One figure.

    Attributes:
        what: in words.
        measured: by whoever published it.
        predicted: by the model of time.
        group: of which others it is one, such as a family of models.
    """

    what: str
    measured: float
    predicted: float
    group: str = ""

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """How near predictions have to be.

    Attributes:
        name: of what is judged.
        each: largest error that ``part`` of the figures may have.
        part: of the figures.
        middle: largest median of the errors; None: no such goal.
        unit: of what is measured and predicted; speed-ups and shares are ratios.
    """

    name: str
    each: float
    part: float = 1.0
    middle: float | None = None
    unit: str = "ratio"

    def within(self, figures: Sequence[Judged]) -> int:
        """How many are within ``each``."""
        return sum(abs(figure.error) <= self.each for figure in figures)

    def met(self, figures: Sequence[Judged]) -> bool:
        """Whether enough are near enough; of no figure nothing is known, and nothing met."""
        if not figures:
            return False
        near = self.within(figures) >= self.part * len(figures)
        return near and (self.middle is None or middle_error(figures) <= self.middle)


def middle_error(figures: Sequence[Judged]) -> float:
    """Median of the absolute errors."""
    return median(abs(figure.error) for figure in figures)
