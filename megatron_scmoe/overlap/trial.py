"""Which of several plans is fastest? They run by turns, as often as their times scatter. Standard library only.

What one turn adds to all of them, such as a busy neighbour, is in their ratios no more: so plans are compared turn by
turn, and the middle half of the ratios counts, which a few outliers do not move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

TURNS = 3
"""Of each candidate before anybody looks, and between two looks."""

MOST_TURNS = 24
"""Of each candidate: whoever is left then is compared by what there is."""

TIE = 0.01
"""Candidates that are slower than the fastest by less than this part are as good: the simplest of them wins."""

SURE = 0.005
"""Ratios that are known to within this part need no further turns."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the turns so far say.

    Attributes:
        best: number of the candidate to take.
        left: numbers of those that need more turns to be told apart; empty where it is decided.
        known_to: the part to within which ratios are known, of the candidate of which least is known.
    """

    best: int
    left: tuple[int, ...]
    known_to: float


def judge(seconds: Sequence[Sequence[float]]) -> Verdict:
    """Compare candidates, the simplest first.

    A ratio's middle half is about 1.35 standard deviations wide, and its mean known to about 1.1 of these over the
    square root of the turns: so to its width over that root. A candidate is out where it is slower than a tie by twice
    as much.

    Args:
        seconds: of each candidate in each of its turns. One that was out earlier has fewer turns than others, and stays
            out; a turn in which any time is infinite is left out, as nothing was timed.
    """
    turns = max(map(len, seconds))
    racing = [number for number, its in enumerate(seconds) if len(its) == turns]
    timed = [turn for turn in range(turns) if all(math.isfinite(seconds[number][turn]) for number in racing)]
    if not timed:
        return Verdict(racing[0], (), 0.0)
    fastest = min(racing, key=lambda number: median(seconds[number][turn] for turn in timed))
    cut = len(timed) // 4
    ratio, known_to = {}, {}
    for number in racing:
        middle = sorted(seconds[number][turn] / seconds[fastest][turn] for turn in timed)[cut : len(timed) - cut]
        ratio[number], known_to[number] = fmean(middle), (middle[-1] - middle[0]) / math.sqrt(len(timed))
    left = [number for number in racing if ratio[number] - 2 * known_to[number] <= 1 + TIE]
    least = max(known_to[number] for number in left)
    best = next(number for number in left if ratio[number] <= 1 + TIE)
    decided = least <= SURE or turns >= MOST_TURNS
    return Verdict(best, () if decided else tuple(left), least)
