"""Running tasks in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from progress import Advance, progress

from preprocessing.sources import Source

TASK_BYTES, TASK_FILES = 1 << 20, 256  # one unit of work of a worker; files are never split


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
        with progress(label, sum(weights) if len(tasks) > 1 else 0) as advance:
            yield _results(futures, weights, advance)
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


def _results(futures: list[Future[Any]], weights: list[int], advance: Advance) -> Iterator[Any]:
    shown, last_s = 0, time.monotonic()
    for future in futures:
        while not future.done():
            wait([future], timeout=0.2)
            if time.monotonic() - last_s >= 0.2:
                done = sum(weight for weight, other in zip(weights, futures, strict=True) if other.done())
                advance(done - shown)
                shown, last_s = done, time.monotonic()
        yield future.result()
