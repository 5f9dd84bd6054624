"""Running tasks in worker processes, and showing how far they are."""
# ruff: noqa: PLC0415 - imported late, so that --help takes a tenth of a second

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from preprocessing.sources import Source

TASK_BYTES, TASK_FILES = 1 << 20, 256  # one unit of work of a worker; files are never split
LINE_INTERVAL_S = 5.0  # seconds between progress lines when stderr is no terminal

Show = Callable[[int], None]


def plan_tasks(sources: list[Source]) -> list[list[Source]]:
    """Group neighbouring sources into tasks of about TASK_BYTES."""
    tasks: list[list[Source]] = [[]]
    for source in sources:
        if len(tasks[-1]) >= TASK_FILES or _num_bytes(tasks[-1]) >= TASK_BYTES:
            tasks.append([])
        tasks[-1].append(source)
    return tasks


def _num_bytes(sources: list[Source]) -> int:
    return sum(source.num_bytes for source in sources)


@contextlib.contextmanager
def working(
    label: str, function: Callable[..., Any], tasks: list[tuple[Any, ...]], num_workers: int
) -> Iterator[Iterator[Any]]:
    """Start `function(*task)` for all tasks in spawned processes and yield an iterator over the results, in order.

    The first item of a task is its list of sources. The processes are killed if the block fails.
    """
    weights = [_num_bytes(task[0]) for task in tasks]
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), mp_context=spawn, initializer=_start_worker)
    try:
        futures = _submit(pool, function, tasks)
        with progress(label, sum(weights) if len(tasks) > 1 else 0) as show:
            yield _results(futures, weights, show)
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """A killed parent cannot tell its workers to stop, and they would wait for tasks for ever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _submit(pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Future[Any]]:
    """Start all tasks. Workers inherit a blocked SIGINT: Ctrl-C is the parent's to handle."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(function, *task) for task in tasks]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _results(futures: list[Future[Any]], weights: list[int], show: Show) -> Iterator[Any]:
    last_s = time.monotonic()
    for future in futures:
        while not future.done():
            wait([future], timeout=0.2)
            if time.monotonic() - last_s >= 0.2:
                show(sum(weight for weight, other in zip(weights, futures, strict=True) if other.done()))
                last_s = time.monotonic()
        yield future.result()


@contextlib.contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Show]:
    """Yield a function that takes the bytes done: a bar on a terminal, else a line every LINE_INTERVAL_S seconds.

    `total_bytes` 0 means that it is not known how much of the work is done; then only the elapsed time is shown.
    """
    if not sys.stderr.isatty():
        yield _line_writer(label, total_bytes)
        return
    from rich import console
    from rich import progress as rich

    columns = (rich.TextColumn("{task.description:16}"), rich.BarColumn(), rich.TaskProgressColumn())
    times = (rich.TimeElapsedColumn(), "ETA", rich.TimeRemainingColumn())
    with rich.Progress(*columns, *times, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes or None)
        yield lambda done: bar.update(task, completed=done)
        bar.update(task, total=total_bytes or 1, completed=total_bytes or 1)


def _line_writer(label: str, total_bytes: int) -> Show:
    start_s = last_s = time.monotonic()

    def show(done_bytes: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= LINE_INTERVAL_S:
            last_s, elapsed_s = now_s, now_s - start_s
            eta = f"{elapsed_s * (total_bytes - done_bytes) / done_bytes:.0f} s" if done_bytes else "unknown"
            share = f"{done_bytes / total_bytes:.0%}, " if total_bytes else ""
            print(f"{label}: {share}{elapsed_s:.0f} s so far, ETA {eta}", file=sys.stderr, flush=True)

    return show
