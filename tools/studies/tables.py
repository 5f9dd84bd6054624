"""Tables on the terminal, as wide as it is."""

from __future__ import annotations

from collections.abc import Sequence

from command_line import one_line
from rich import box
from rich.console import Console
from rich.table import Table

type Shape = tuple[int, str, str]
"""How many figures of a row are shown, what stands between a median and its interval, and what between its ends."""

NAME = 24
"""Columns of a name that is folded where it would cost figures."""


def show(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], shapes: Sequence[Shape]
) -> None:
    """Print a table in the first shape that the terminal has room for, or else in the last one.

    Args:
        console: where to.
        title: above it.
        headings: of the columns, the first of which names the rows.
        rows: a name and the figures ``value [low, high]``.
        shapes: to choose from.
    """
    endless = console.options.update(max_width=1000)
    foldable = max(0, max(len(row[0]) for row in rows) - NAME)
    for shape in shapes:
        table = _table(title, headings, rows, shape)
        if console.measure(table, options=endless).maximum - foldable <= console.width:
            break
    console.print(table)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], shape: Shape) -> Table:
    columns, before, between = shape
    table = Table(title=one_line(title), title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1 : 1 + columns]:
        table.add_column(heading, justify="right", overflow="fold")
    for name, *figures in rows:
        table.add_row(
            one_line(name), *(one.replace(" [", f"{before}[").replace(", ", between) for one in figures[:columns])
        )
    return table
