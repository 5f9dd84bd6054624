"""The overlap's results, whose runs were not kept: what their tables say of their own figures can still be checked."""

from __future__ import annotations

import operator
import re

import pytest
from training import ROOT

DOCUMENTS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "ablation: begin" in path.read_text())
GOAL = re.compile(r": (>=|<=|>) ([\d.]+)(?: and ([\d.]+))?")
FIGURE = re.compile(r"([\d.]+) \[([\d.]+), ([\d.]+)\]: (?:(met)|\*\*missed by ([\d.]+)\*\*)(.*within the spread)?")
HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
ROUNDED = 1e-3  # three decimals are printed


def contradictions(text: str) -> list[str]:
    """Lines of a table of goals whose verdicts do not follow from their figures."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        goal = GOAL.search(cells[0])
        if not line.startswith("|") or goal is None:
            continue
        sign, *limits = goal.groups()
        for cell, limit in zip(cells[3:5], (limits[0], limits[1] or limits[0]), strict=True):
            figure = FIGURE.match(cell)
            if figure is not None and not _follows(figure, sign, float(limit)):
                found.append(line)
    return found


def _follows(figure: re.Match[str], sign: str, limit: float) -> bool:
    value, low, high = map(float, figure.groups()[:3])
    met, missed, spread = figure.groups()[3:]
    if abs(value - limit) > ROUNDED and HOLDS[sign](value, limit) != bool(met):
        return False
    if missed and abs(abs(value - limit) - float(missed)) > 1.1 * ROUNDED:
        return False
    near = min(abs(low - limit), abs(high - limit)) <= ROUNDED
    return low <= value <= high and (near or (low <= limit <= high) == bool(spread))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_verdicts_follow_from_figures(document):
    text = document.read_text()
    assert len(re.findall(FIGURE, text)) >= 4  # of the page with the fewest
    assert contradictions(text) == []


def test_there_are_some():
    assert len(DOCUMENTS) >= 3


CHANGED = {"1.461 [": "1.361 [", "1.443 [1.404": "1.443 [1.304", ": met |": ": **missed by 0.011** (1.0%) |"}


@pytest.mark.parametrize("figure", CHANGED)
def test_another_figure_is_noticed(figure):
    """Negative control."""
    (document,) = (path for path in DOCUMENTS if path.name == "architectures.md")
    text = document.read_text()
    assert figure in text and contradictions(text.replace(figure, CHANGED[figure], 1))
