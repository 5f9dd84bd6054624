"""How far a long piece of work is: a bar on a terminal, else a line every few seconds."""
# ruff: noqa: PLC0415 - imported late: not every call shows anything, and --help takes a tenth of a second

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

LINE_INTERVAL_S = 5.0

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0, *, in_bytes: bool = True) -> Iterator[Advance]:
    """Yield a function that is told what more is done, and shows how much that is, the rate and the time to go.

    Args:
        label: of the work.
        total: of all of it; 0 where nobody can say how much is done: then the time so far alone is shown.
        done: what an earlier call has done; it does not count for the rate.
        in_bytes: whether bytes are counted.
    """
    if not sys.stderr.isatty() or find_spec("rich") is None:  # where a report was copied to, for one
        yield _line_writer(label, total, done, in_words if in_bytes else _count)
        return
    from rich import console
    from rich import progress as rich

    sizes = (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn()) if in_bytes and total else ()
    columns = (rich.TextColumn("{task.description:16}"), rich.BarColumn(), rich.TaskProgressColumn(), *sizes)
    times = (rich.TimeElapsedColumn(), "ETA", rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total or None, completed=done)
        yield lambda count: bar.advance(task, count)
        bar.update(task, total=total or 1, completed=total or 1)


def say(text: str) -> None:
    """A line on stderr, at once; also while a bar is shown, which it does not break."""
    print(text, file=sys.stderr, flush=True)


def _line_writer(label: str, total: int, before: int, words: Callable[[float], str]) -> Advance:
    start_s = last_s = time.monotonic()
    done = before

    def advance(count: int) -> None:
        nonlocal last_s, done
        done += count
        now_s = time.monotonic()
        if now_s - last_s < LINE_INTERVAL_S:
            return
        last_s, rate = now_s, (done - before) / (now_s - start_s)
        left = f"{max(total - done, 0) / rate:.0f} s" if total and rate else "unknown"
        sizes = f"{words(done)} of {words(total)} ({done / total:.0%}), {words(rate)}/s, " if total else ""
        print(f"{label}: {sizes}{now_s - start_s:.0f} s so far, ETA {left}", file=sys.stderr, flush=True)

    return advance


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def in_words(num_bytes: float) -> str:
    """A number of bytes with a unit, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
