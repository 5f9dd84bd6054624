"""How far a long piece of work is: a bar on a terminal, else a line every few seconds."""
# ruff: noqa: PLC0415 - imported late: not every call shows anything

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_INTERVAL_S = 5.0

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress(label: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Advance]:
    """Yield a function that is told of every number of bytes that is done, and shows bytes, rate and time to go.

    Args:
        label: of the work.
        total_bytes: of all of it.
        done_bytes: what an earlier call has done; it does not count for the rate.
    """
    if not sys.stderr.isatty():
        yield _line_writer(label, total_bytes, done_bytes)
        return
    from rich import console
    from rich import progress as rich

    sizes = (rich.DownloadColumn(binary_units=True), rich.TransferSpeedColumn())
    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn(), *sizes)
    times = (rich.TimeElapsedColumn(), "ETA", rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes, completed=done_bytes)
        yield lambda count: bar.advance(task, count)
        bar.update(task, completed=total_bytes)


def _line_writer(label: str, total_bytes: int, done_bytes: int) -> Advance:
    start_s = last_s = time.monotonic()
    done = done_bytes

    def advance(count: int) -> None:
        nonlocal last_s, done
        done += count
        now_s = time.monotonic()
        if now_s - last_s >= LINE_INTERVAL_S:
            last_s = now_s
            rate = (done - done_bytes) / (now_s - start_s)
            left = f"{max(total_bytes - done, 0) / rate:.0f} s" if rate else "unknown"
            sizes = f"{in_words(done)} of {in_words(total_bytes)} ({done / max(total_bytes, 1):.0%})"
            print(f"{label}: {sizes}, {in_words(rate)}/s, ETA {left}", file=sys.stderr, flush=True)

    return advance


def in_words(num_bytes: float) -> str:
    """A number of bytes with a unit, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
