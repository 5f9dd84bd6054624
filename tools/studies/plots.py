"""Pictures as SVG text for HTML: no file, no network, the same bytes for the same figures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from studies.figures import Figure

WIDTH_IN = 11.0
TITLE, LABEL, TICKS = 10, 9, 8
GRID = "#e4e4e4"


def panels(height_in: float, lines: int, columns: int, **sharing: Any) -> tuple[Picture, list[Axes]]:
    """A picture as wide as the page, and its panels line by line."""
    picture = Picture(figsize=(WIDTH_IN, height_in), layout="constrained")
    picture.patch.set_visible(False)
    return picture, list(picture.subplots(lines, columns, squeeze=False, **sharing).flat)


def grid(axis: Axes, which: str = "both", *, hidden: Sequence[str] = ("top", "right")) -> None:
    """A grid behind what is drawn, and no frame at the ``hidden`` sides."""
    axis.grid(axis=which, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    axis.spines[list(hidden)].set_visible(False)


def band(axis: Axes, curve: Mapping[float, Figure], colour: str, *, alpha: float, **line: Any) -> Any:
    """A line through the medians by their places, and a band around it; returns the line."""
    figures = list(curve.values())
    (drawn,) = axis.plot(list(curve), [one.value for one in figures], color=colour, **line)
    low, high = [one.low for one in figures], [one.high for one in figures]
    axis.fill_between(list(curve), low, high, color=colour, alpha=alpha, linewidth=0)
    return drawn


def whiskers(figures: Sequence[Figure]) -> list[list[float]]:
    """How far they reach below and above their medians, as error bars want it."""
    return [[one.value - one.low for one in figures], [one.high - one.value for one in figures]]


def legend(picture: Picture, handles: Sequence[Any], **options: Any) -> None:
    """One legend for all panels, below them."""
    columns = 5 if len(handles) > 7 else len(handles)
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    picture.legend(handles=handles, ncols=columns, **place, **options)


def svg(picture: Picture, salt: str) -> str:
    """A picture as an element of HTML: without prologue, namespaces and what nothing refers to."""
    for axis in picture.axes:
        axis.tick_params(labelsize=TICKS)
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": ["DejaVu Sans"]}):
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    return re.sub(r"font: ([^;\"]*)'DejaVu Sans'", r"font: \1'DejaVu Sans', Verdana, sans-serif", text)
