"""The fastest settings of a model: every layout that memory allows, best first.

A layout has a bound, the least time that anything of it can take; so has what of it may be computed again, a closer
one. All wait in a heap by their bounds. What comes to the top is looked at more closely and waits again, in the end by
its predicted time. What comes to the top with its time is the next fastest of all: nothing behind it has even a bound
below. So nothing is left out, and most of it is never predicted.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

from planning.settings import Form, Layout

TIE = 1e-3
"""Part of the time below which a simpler form counts as fast: far below what a prediction is worth."""


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        floor: seconds that nothing of a layout beats, soon found.
        ways: a layout with all that may be computed again, as far as memory allows.
        bound: seconds that no form of such a layout beats.
        forms: of it.
        predict: seconds of a step.
    """

    floor: Callable[[Layout], float]
    ways: Callable[[Layout], Iterable[Layout]]
    bound: Callable[[Layout], float]
    forms: Callable[[Layout], Iterable[Form]]
    predict: Callable[[Layout, Form], float]


def fastest(layouts: Iterable[Layout], space: Space) -> Iterator[tuple[float, Layout, Form]]:
    """Everything in the order of its time; each is predicted when it may be the next.

    Args:
        layouts: to choose from, which compute nothing again.
        space: what there is of each.
    """
    order = count()
    heap: list[tuple[float, int, Layout, Form | None, bool]] = []

    def push(seconds: float, layout: Layout, form: Form | None = None, *, bounded: bool = True) -> None:
        heapq.heappush(heap, (seconds, next(order), layout, form, bounded))

    for layout in layouts:
        push(space.floor(layout), layout, bounded=False)
    while heap:
        seconds, _, layout, form, bounded = heapq.heappop(heap)
        if form is not None:
            yield seconds, layout, form
        elif bounded:
            for one in space.forms(layout):
                push(space.predict(layout, one), layout, one)
        else:
            for way in space.ways(layout):
                push(space.bound(way), way)


def simplest(
    layout: Layout, seconds: float, ways: Iterable[Form], predict: Callable[[Layout, Form], float]
) -> tuple[float, Form]:
    """The first of ``ways`` that is as fast as ``seconds``, but for ``TIE``, and its time."""
    for way in ways:
        its = predict(layout, way)
        if its <= seconds * (1 + TIE):
            return its, way
    raise ValueError(f"no way of {layout} takes {seconds} s")
