"""What people read of a study: a table on the terminal, an HTML report, a section of Markdown.

A result is what ``folder.read`` says, with ``encoding`` and maybe ``step_times`` beside.
Every figure is one of it, or of ``analysis`` made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from studies import report, tables

from codec_study import analysis, cost, goals, plots, wall_time, words

HERE = Path(__file__).parent
ALL, FEW = len(words.HEADINGS), 4
SHAPES = ((ALL, " ", ","), (ALL, "\n", ",\n "), (FEW, "\n", ",\n "))
"""Of the table on the terminal."""


def print_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the figures of all arms, as many and as wide as the terminal has room for; on ``console`` if given."""
    console = console or Console(highlight=False)
    rows = analysis.rows(result["runs"])
    for model in analysis.models_of(result["runs"]):
        lines = [(row.arm, *words.cells(row)) for row in rows if row.model == model]
        title = f"{model}; medians over seeds, and their range"
        tables.show(console, title, ("arm", *words.HEADINGS), lines, SHAPES)
    for text in _said(result):
        console.print(text, markup=False)


def html(result: Mapping[str, Any]) -> str:
    """The report: one page that loads nothing from anywhere."""
    runs, times = result["runs"], result.get("step_times")
    return report.rendered(
        HERE / "template.html",
        **_shared(result),
        machine=result["meta"],
        said=_said(result),
        runs=runs,
        figures={
            "Validation loss against tokens": plots.losses(runs),
            "Validation loss relative to none": plots.differences(runs),
            "Loss against the rows that are sent": plots.differences_and_rates(runs),
            "Rows sent": plots.rates(runs),
            "Residual": plots.residuals(runs),
            **({"Validation loss against wall time": plots.over_time(runs, times)} if times else {}),
        },
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The claim, the goals and all arms."""
    return report.rendered(
        HERE / "section.md",
        **_shared(result),
        claims=_claims(result),
        shortness=goals.shortness(result["meta"]),
        over_time=wall_time.lines(result),
    )


def _shared(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "meta": words.machine(result["meta"]),
        "goals": goals.lines(result),
        "encoding": cost.described(result["encoding"]) if result["encoding"] else "",
        "rows": analysis.rows(result["runs"]),
        "words": words,
    }


def _claims(result: Mapping[str, Any]) -> list[str]:
    """What can be said of the paper's claim, a text for each model."""
    return [goals.claim(result["runs"], model) for model in analysis.models_of(result["runs"])]


def _said(result: Mapping[str, Any]) -> list[str]:
    """The claims, and what makes them say less; without Markdown."""
    texts = [*_claims(result), goals.shortness(result["meta"]), *wall_time.lines(result)]
    return [text.replace("`", "").replace("**", "") for text in texts if text]
