"""Places for tests that run beside one another, and for those that must not, over all workers of a test run."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def place(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait for a place, and keep it: beside others, or ``alone`` once all of them have left.

    Everybody enters through a gate, and who will be alone waits in it, so that no others come in meanwhile.
    """
    with (folder / "gate").open("w") as gate, (folder / "room").open("w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing would not do where a child has the file too
