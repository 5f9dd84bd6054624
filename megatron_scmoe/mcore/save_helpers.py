"""Processes that Core starts beside a rank for its saves: none where none is needed, none that outlives its rank."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async


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
