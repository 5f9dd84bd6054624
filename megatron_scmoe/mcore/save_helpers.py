"""Processes that Core starts beside a rank for its saves: none where none is needed, none that outlives its rank."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, WriteBucket


def prepare(is_async: bool, end_with_rank: Callable[[], None]) -> None:
    """Set what writers are handed, and how they hand back what they have written; to be called before the first save.

    Core does the latter through a process (a multiprocessing.Manager) that imports torch anew, which takes seconds at
    the first save and 0.7 GB for each rank, and that waits for ever when the rank is killed with -9.

    Args:
        is_async: --async-save, by --async-strategy mcore: its writer is a process of its own.
        end_with_rank: called in the process between them, to end it with its rank.
    """
    if not is_async:
        filesystem_async._results_queue = queue.Queue()  # writers are threads of this process
        return
    FileSystemWriterAsync.preload_tensors = staticmethod(stage)
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))  # as Core does then
    manager.start(end_with_rank)
    filesystem_async._results_queue = manager.Queue()


_stage = FileSystemWriterAsync.preload_tensors


def stage(write_buckets: list[WriteBucket], non_blocking: bool = True) -> list[WriteBucket]:
    """Copy what a writer of --async-save is to write; its rank goes on training when this returns.

    Core copies what a GPU holds. Tensors in host memory, all of them under gloo, its writer shares with the rank, whose
    next step would change them while they are written: a checkpoint of two steps, without a word.

    Args:
        write_buckets: files with their tensors, as Core cut them.
        non_blocking: copy from GPUs without waiting for each tensor.
    """
    staged = _stage(write_buckets, non_blocking)
    for (*_, (_, tensors)), (*_, (_, copies)) in zip(write_buckets, staged, strict=True):
        pairs = zip(tensors, copies, strict=True)
        copies[:] = [(item, copy.clone() if copy is tensor else copy) for (item, tensor), (_, copy) in pairs]
    return staged


def has_lost_writer() -> bool:
    """Whether the process that writes for --async-save has died, as it does of a full disk.

    Core waits for it for ever, in the next save. True for a moment too while Core ends it at the end of a training.
    """
    writer = PersistentAsyncCaller._persistent_process
    return writer is not None and bool(connection.wait([writer.sentinel], timeout=0))
