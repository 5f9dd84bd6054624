"""Exposed time by merging intervals: hand-made spans, and any spans against counting on a grid."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_scmoe.overlap.spans import (
    Lane,
    Span,
    communication_s,
    exposed_s,
    hidden_share,
    intersection,
    length,
    union,
)

GRID = 24


def compute(start: float, end: float) -> Span:
    return Span("op", Lane.COMPUTE, start, end)


def communication(start: float, end: float) -> Span:
    return Span("all-to-all", Lane.COMMUNICATION, start, end)


def test_hand_made_spans():
    spans = [
        communication(0, 10),  # beside 2..6: 6 exposed, 0..2 and 6..10
        communication(8, 12),  # overlaps the first: 10..12 are new and hidden
        compute(2, 6),
        compute(10, 20),
        compute(11, 13),  # inside another one: hides nothing twice
        communication(18, 25),  # 20..25 exposed
    ]
    assert communication_s(spans) == 12 + 7
    assert exposed_s(spans) == 6 + 0 + 5
    assert hidden_share(exposed_s(spans), communication_s(spans)) == 1 - 11 / 19


@pytest.mark.parametrize(
    ("spans", "exposed", "share"),
    [
        ([], 0, 1.0),
        ([compute(0, 5)], 0, 1.0),
        ([communication(0, 5)], 5, 0.0),
        ([communication(3, 3)], 0, 1.0),
        ([communication(0, 4), compute(4, 8)], 4, 0.0),  # touching is not covering
        ([communication(1, 4), compute(0, 2), compute(2, 5)], 0, 1.0),  # two ops in a row cover what one would
    ],
)
def test_edges(spans, exposed, share):
    assert exposed_s(spans) == exposed
    assert hidden_share(exposed_s(spans), communication_s(spans)) == share


def test_union_and_intersection():
    assert union([(5, 6), (1, 3), (2, 4), (4, 4), (6, 7)]) == [(1, 4), (5, 7)]
    assert intersection([(0, 4), (5, 9)], [(1, 2), (3, 6), (9, 10)]) == [(1, 2), (3, 4), (5, 6)]


INTERVALS = st.lists(st.tuples(st.integers(0, GRID), st.integers(0, GRID)).map(sorted).map(tuple), max_size=8)


def cells(intervals) -> set[int]:
    return {cell for start, end in intervals for cell in range(start, end)}


@given(INTERVALS, INTERVALS)
def test_equals_counting_on_a_grid(busy, flying):
    merged = union(busy)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(merged))
    assert cells(merged) == cells(busy) and length(merged) == len(cells(busy))
    assert cells(intersection(merged, union(flying))) == cells(busy) & cells(flying)

    spans = [compute(*interval) for interval in busy] + [communication(*interval) for interval in flying]
    assert communication_s(spans) == len(cells(flying))
    assert exposed_s(spans) == len(cells(flying) - cells(busy))
    assert 0 <= hidden_share(exposed_s(spans), communication_s(spans)) <= 1
