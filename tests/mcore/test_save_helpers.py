"""What stands between the writers of a save and their rank."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time

import psutil
import pytest
import ranks

from megatron_scmoe.job import orphans


def started(is_async: bool, ends: bool) -> tuple[str, list[bool]]:
    """Of a rank that is killed: the kind of queue, and whether each of its processes lives on."""
    ours, theirs = multiprocessing.Pipe()
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(theirs, is_async, ends))
    rank.start()
    kind = ours.recv()
    processes = psutil.Process(rank.pid).children(recursive=True)
    rank.kill()
    rank.join()
    deadline_s = time.monotonic() + (5 if ends else 0.5)
    while any(map(_lives, processes)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return kind, [_lives(process) for process in processes]


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _rank(pipe: object, is_async: bool, ends: bool) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_scmoe.mcore import save_helpers

    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    orphans.die_with_launcher()
    save_helpers.use_few(is_async, orphans.end_with_rank if ends else _nothing)
    made = filesystem_async.get_write_results_queue()
    made.put("written")
    assert made.get() == "written"
    pipe.send(type(made).__name__)  # type: ignore[attr-defined]
    signal.pause()


def _nothing() -> None:
    """Negative control."""


@pytest.mark.parametrize(
    ("is_async", "ends", "kind", "live_on"),
    [
        (False, True, queue.Queue.__name__, []),
        (True, True, "AutoProxy[Queue]", [False]),
        (True, False, "AutoProxy[Queue]", [True]),
    ],
)
def test_nothing_outlives_a_rank(is_async, ends, kind, live_on):
    assert ranks.run(started, 1, is_async, ends) == [(kind, live_on)]
