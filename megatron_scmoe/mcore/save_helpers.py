"""Processes that Core starts beside a rank for its saves: none where none is needed, none that outlives its rank."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller


def use_few(is_async: bool, end_with_rank: Callable[[], None]) -> None:
    """Set how writers hand to their rank what they have written; to be called before the first save.

    Core does it through a process (a multiprocessing.Manager) that imports torch anew, which takes seconds at the first
    save and 0.7 GB for each rank, and that waits for ever when the rank is killed with -9.

    Args:
        is_async: --async-save, by --async-strategy mcore: its writer is a process of its own.
        end_with_rank: called in the process between them, to end it with its rank.
    """
    if not is_async:
        filesystem_async._results_queue = queue.Queue()  # writers are threads of this process
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))  # as Core does then
    manager.start(end_with_rank)
    filesystem_async._results_queue = manager.Queue()


def has_lost_writer() -> bool:
    """Whether the process that writes for --async-save has died, as it does of a full disk.

    Core waits for it for ever, in the next save. True for a moment too while Core ends it at the end of a training.
    """
    writer = PersistentAsyncCaller._persistent_process
    return writer is not None and bool(connection.wait([writer.sentinel], timeout=0))
