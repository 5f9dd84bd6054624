"""What people read of a study: a table on the terminal, an HTML report, a section of Markdown.

A result is what ``folder.read`` says, with ``encoding`` and maybe ``step_times`` beside.
Every figure is one of it, or of ``analysis`` made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
from rich import box
from rich.console import Console
from rich.table import Table

from codec_study import analysis, cost, goals, plots, wall_time, words
from codec_study.analysis import Row

FEW = 4
"""Figures of an arm that are shown where there is no room for all."""


def print_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the figures of all arms, as many and as wide as the terminal has room for; on ``console`` if given."""
    console = console or Console(highlight=False)
    endless = console.options.update(max_width=1000)
    rows = analysis.rows(result["runs"])
    for model in analysis.models_of(result["runs"]):
        mine = [row for row in rows if row.model == model]
        shapes = ((len(words.HEADINGS), True), (len(words.HEADINGS), False), (FEW, False))
        tables = (_table(model, mine, columns, one_line=one_line) for columns, one_line in shapes)
        for table in tables:  # the first one that fits, or the last one
            if console.measure(table, options=endless).maximum <= console.width:
                break
        console.print(table)
    for text in _claims(result):
        console.print(text, markup=False)


def _table(model: str, rows: Sequence[Row], columns: int, *, one_line: bool) -> Table:
    """The arms of a model with their first ``columns`` figures, ranges beside or below medians."""
    title = f"{model}; medians over seeds, and their range"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for heading in words.HEADINGS[:columns]:
        table.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        figures = [cell.replace(", ", ",") for cell in words.cells(row)[:columns]]
        if not one_line:
            figures = [figure.replace(" [", "\n[").replace(",", ",\n ") for figure in figures]
        table.add_row(row.arm, *figures)
    return table


def html(result: Mapping[str, Any]) -> str:
    """The report: one page that loads nothing from anywhere."""
    runs, times = result["runs"], result.get("step_times")
    return pages.page(
        Path(__file__).parent,
        meta=words.machine(result["meta"]),
        machine=result["meta"],
        claims=_claims(result),
        goals=goals.lines(result),
        encoding=cost.described(result["encoding"]) if result["encoding"] else "",
        rows=analysis.rows(runs),
        runs=runs,
        words=words,
        figures={
            "Validation loss against tokens": plots.losses(runs),
            "Validation loss relative to none": plots.differences(runs),
            "Loss against the rows that are sent": plots.differences_and_rates(runs),
            "Rows sent": plots.rates(runs),
            "Residual": plots.residuals(runs),
            **({"Validation loss against wall time": plots.over_time(runs, times)} if times else {}),
        },
    )


def _claims(result: Mapping[str, Any]) -> list[str]:
    """What can be said of the paper's claim, a text for each model, and what makes it say less; without Markdown."""
    runs = result["runs"]
    texts = [goals.claim(runs, model) for model in analysis.models_of(runs)]
    texts += [goals.shortness(result["meta"]), *wall_time.lines(result)]
    return [text.replace("`", "").replace("**", "") for text in texts if text]
