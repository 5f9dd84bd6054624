"""What stands between the writers of a save and their rank, and what they are handed."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import ranks
import torch

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
    save_helpers.prepare(is_async, orphans.end_with_rank if ends else _nothing)
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


def written_late(folder: Path, is_mended: bool) -> list[float]:
    """What a writer of --async-save writes when its rank is in the next step already."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_scmoe.mcore import save_helpers

    if is_mended:
        save_helpers.prepare(True, _nothing)
    weights = torch.zeros(3)
    buckets = [(folder / "file", "file", ([], [("weights", weights)]))]
    preload = partial(FileSystemWriterAsync.preload_tensors, buckets, True)
    caller = PersistentAsyncCaller()
    caller.process = PersistentAsyncCaller._get_process(0, mp_mode="fork")  # which has what stands in for CUDA
    caller.schedule_async_call(AsyncRequest(_write_when_told, (folder, buckets), [], preload_fn=preload))
    weights += 1  # as an optimizer does
    (folder / "told").touch()
    caller.is_current_async_call_done(blocking=True)
    caller.close()
    return torch.load(folder / "file").tolist()


def _write_when_told(folder: Path, buckets: list) -> None:
    while not (folder / "told").exists():
        time.sleep(0.01)
    ((file, _, (_, ((_, tensor),))),) = buckets
    torch.save(tensor, file)


@pytest.mark.parametrize(("is_mended", "value"), [(True, 0.0), (False, 1.0)])
def test_a_late_writer_writes_what_was_saved(is_mended, value, tmp_path):
    """Megatron's own writer would write the next step's: the negative control."""
    assert ranks.run(written_late, 1, tmp_path, is_mended) == [[value] * 3]
