"""What was found, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from command_line import one_line
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from doctoring.catalog import CATALOG
from doctoring.check import Status
from doctoring.examination import Outcome

_STYLES = {Status.OK: "green", Status.PROBLEM: "bold red", Status.NOT_TRIED: "yellow"}


def print_report(outcomes: Sequence[Outcome], ranks: int, file: TextIO) -> None:
    """A table of all findings, a line for each problem with its fix, and a line that sums up."""
    console = Console(file=file)
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("check")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for one in outcomes:
        for number, finding in enumerate(one.findings):
            name = "" if number else one.name
            table.add_row(name, f"[{_STYLES[finding.status]}]{finding.status}[/]", escape(one_line(finding.text)))
    console.print(table)
    problems = [(one.name, finding) for one in outcomes for finding in one.findings if finding.status is Status.PROBLEM]
    for name, finding in problems:
        print(f"problem: {name}: {one_line(finding.in_words())}", file=file)
    untried = sum(finding.status is Status.NOT_TRIED for one in outcomes for finding in one.findings)
    verdict = f"NOT READY: {_counted(len(problems), 'problem')}" if problems else "ready, as far as was tried"
    of = f"{_counted(len(outcomes), 'check')} on {_counted(ranks, 'rank')}"
    print(f"{verdict}; {of}, {_counted(untried, 'thing')} not tried", file=file, flush=True)


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def as_json(outcomes: Sequence[Outcome], ranks: int) -> dict[str, Any]:
    """What --json holds; numbers that JSON has no words for are words."""
    return {
        "ready": is_ready(outcomes),
        "ranks": ranks,
        "checks": [
            {
                "name": one.name,
                "proves": CATALOG.get(one.name, ""),
                "status": one.status,
                "seconds": round(one.seconds, 3),
                "findings": [asdict(finding) for finding in one.findings],
                "seen": _sayable(one.seen),
            }
            for one in outcomes
        ],
    }


def _sayable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _sayable(one) for key, one in value.items()}
    return [_sayable(one) for one in value] if isinstance(value, list | tuple) else value


def is_ready(outcomes: Sequence[Outcome]) -> bool:
    """Whether there is no problem."""
    return all(one.status is not Status.PROBLEM for one in outcomes)
