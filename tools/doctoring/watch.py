"""Ends this process where a check takes too long, or who started it asks: even while it waits in a collective.

A thread does, since no handler of Python's runs in the main thread while that waits in C++.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOOK_S = 1.0
GRACE_S = 2.5 * LOOK_S
"""How long ranks are listened to before a report: who says nothing is gone, or stopped."""
LATER_S = 15.0
"""How much later than rank 0, which reports, the other ranks end: launchers end all ranks as soon as one has ended."""


class Watch:
    """A context manager: inside it checks have limits, and signals end the process.

    Args:
        report: called in a thread with why this process ends now, in words.
        look: called in a thread every second; returns why this process has to end, and is empty where it has not. It
            may raise DistError, where the job's store is gone.
        rank: of this process.
    """

    def __init__(self, report: Callable[[str], None], look: Callable[[], str], rank: int) -> None:
        self._report, self._look, self._rank = report, look, rank
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK)
        self._until_s = float("inf")
        self._stopped_s = float("inf")
        self._limit_s, self._code, self._why = 0.0, 1, ""
        self._missed = "; rank 0 has not ended it: see whether it is stopped, or its node out of reach" if rank else ""
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which the thread reads as the end
        self._thread.join()
        os.close(self._reader)

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Inside, this process ends after so many seconds."""
        self._limit_s = seconds
        self._until_s = time.monotonic() + seconds + (LATER_S if self._rank else 0.0)
        try:
            yield
        finally:
            self._until_s = float("inf")

    def _watch(self) -> None:
        while True:
            if select.select([self._reader], [], [], LOOK_S)[0]:
                numbers = os.read(self._reader, 1)
                if not numbers:
                    return
                if numbers[0] in _SIGNALS:  # the kernel tells of children, too
                    self._stop(signal.Signals(numbers[0]))
            elif time.monotonic() > self._stopped_s:
                self._end(self._why, self._code)
            elif time.monotonic() > self._until_s:
                self._end(f"not over after {self._limit_s:.0f} s{self._missed}", 1)
            elif why := self._looked():
                self._end(why, self._code)

    def _looked(self) -> str:
        try:
            return self._look()
        except dist.DistError as error:
            return f"the job's store is gone, with the first node: {str(error).splitlines()[0]}"

    def _stop(self, number: signal.Signals) -> None:
        self._code, self._why = 128 + number, f"stopped by {number.name}"
        if self._rank == 0:
            self._end(self._why, self._code)
        self._stopped_s = time.monotonic() + 2 * GRACE_S  # and looks on meanwhile, by which rank 0 knows that it lives

    def _end(self, why: str, code: int) -> None:
        try:
            self._report(why)
        finally:
            os._exit(code)
