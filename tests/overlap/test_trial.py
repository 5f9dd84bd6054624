"""Which of several plans is fastest, by turns: told apart where times are steady, seldom wrong where they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from statistics import fmean

import pytest

from megatron_scmoe.overlap.trial import MOST_TURNS, SURE, TIE, TURNS, judge


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ([[1.0], [1.2]], 0),
        ([[1.2], [1.0]], 1),
        ([[1.005], [1.0]], 0),  # a tie: the simpler one, which comes first
        ([[1.02], [1.0]], 1),
        ([[1.0], [1.005], [0.9]], 2),
        ([[0.909], [1.0], [0.9]], 0),
    ],
)
def test_steady_times_are_decided_at_once(seconds, best):
    verdict = judge([its * TURNS for its in seconds])
    assert (verdict.best, verdict.left, verdict.known_to) == (best, (), 0.0)


def test_a_load_on_a_whole_turn_does_not_count():
    """All candidates of a turn share it: their ratios are steady, though times are not."""
    loads = [1.0, 3.0, 2.0]
    verdict = judge([[1.05 * load for load in loads], loads])
    assert (verdict.best, verdict.left) == (1, ())


def test_one_outlier_of_four_turns_and_more_does_not_count():
    steady, hit = [1.0] * 6, [0.97] * 5 + [9.0]
    assert judge([steady, hit]).best == 1
    assert fmean(hit) > fmean(steady)  # negative control: by their means the other one would have won


def test_scattering_times_get_more_turns_but_not_for_ever():
    wide = [0.9, 1.0, 1.1]
    verdict = judge([[1.0] * 3, wide, [1.5] * 3])
    assert verdict.left == (0, 1)  # the third is slower whatever the others do
    assert verdict.known_to == pytest.approx(0.2 / 3**0.5) and verdict.known_to > SURE
    end = judge([[1.0] * MOST_TURNS, wide * (MOST_TURNS // 3), [1.5] * 3])
    assert end.left == () and end.best == 0


def test_who_is_out_stays_out():
    verdict = judge([[1.0] * 6, [1.3] * 6, [0.1] * 3])
    assert verdict.best == 0 and verdict.left == ()


def test_turns_in_which_nothing_was_timed_are_left_out():
    infinite = float("inf")
    assert judge([[1.0, infinite, 1.0], [0.9, 0.9, 0.9]]).best == 1
    assert judge([[infinite] * 3, [infinite] * 3]).left == ()


def take_turns(true_s: Sequence[float], noise: Callable[[], float]) -> tuple[int, int]:
    """Which candidate is chosen, and after how many turns of it."""
    seconds: list[list[float]] = [[] for _ in true_s]
    left: Sequence[int] = range(len(true_s))
    while True:
        for _ in range(TURNS):
            for number in left:
                seconds[number].append(true_s[number] * noise())
        verdict = judge(seconds)
        if not verdict.left:
            return verdict.best, len(seconds[verdict.best])
        left = verdict.left


SIX = (1.0, 1.08, 0.95, 0.98, 0.99, 1.3)


@pytest.mark.parametrize(("scatter", "wrong"), [(0.003, 0.0), (0.02, 0.01), (0.05, 0.05)])
def test_how_often_it_is_wrong_where_times_scatter(scatter, wrong):
    """The chosen one is at most 1.02 times as slow as the best, but for a known part of 400 trials."""
    random = Random(1)
    chosen = [take_turns(SIX, lambda: random.lognormvariate(0, scatter)) for _ in range(400)]
    misses = sum(SIX[best] > 1.02 * min(SIX) for best, _ in chosen) / len(chosen)
    assert misses <= wrong
    turns = fmean(number for _, number in chosen)
    assert turns < TURNS + 0.1 if scatter < TIE / 2 else turns > 2 * TURNS
    once = [min(range(len(SIX)), key=lambda n: SIX[n] * random.lognormvariate(0, scatter)) for _ in range(400)]
    missed_by_one = sum(SIX[best] > 1.02 * min(SIX) for best in once) / len(once)
    assert missed_by_one > 0.1 or scatter < TIE  # negative control: one turn of each is wrong far more often
