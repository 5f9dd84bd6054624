"""The fastest settings of a model: every layout that memory allows, best first.

A layout has a bound, the least time that any form of it can take. Layouts wait in a heap by their bounds; one that
comes to the top is predicted with every form, and waits again by its time. What comes to the top with its time is the
next fastest of all: nothing behind it has even a bound below.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from planning.settings import Form, Layout

TIE = 1e-3
"""Part of the time below which a simpler form counts as fast: far below what a prediction is worth."""


def fastest(
    layouts: Iterable[Layout],
    bound: Callable[[Layout], float],
    forms: Callable[[Layout], Iterable[Form]],
    predict: Callable[[Layout, Form], float],
) -> Iterator[tuple[float, Layout, Form]]:
    """Layouts with their fastest form and its time, the fastest first; each is predicted when it may be the next.

    Args:
        layouts: to choose from.
        bound: seconds that no form of a layout beats.
        forms: of a layout.
        predict: seconds of a step.
    """
    order = count()
    heap: list[tuple[float, int, Layout, Form | None]] = []
    for layout in layouts:
        heapq.heappush(heap, (bound(layout), next(order), layout, None))
    while heap:
        seconds, _, layout, form = heapq.heappop(heap)
        if form is not None:
            yield seconds, layout, form
            continue
        timed = [(predict(layout, one), number, one) for number, one in enumerate(forms(layout))]
        if timed:
            seconds, _, form = min(timed)
            heapq.heappush(heap, (seconds, next(order), layout, form))


def simplest(
    layout: Layout, seconds: float, ways: Iterable[Form], predict: Callable[[Layout, Form], float]
) -> tuple[float, Form]:
    """The first of ``ways`` that is as fast as ``seconds``, but for ``TIE``, and its time."""
    for way in ways:
        its = predict(layout, way)
        if its <= seconds * (1 + TIE):
            return its, way
    raise ValueError(f"no way of {layout} takes {seconds} s")
