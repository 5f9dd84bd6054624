"""One job at a time writes checkpoints to a folder.

Rank 0 holds a lock of the operating system on a file in it, which ends with its process, however that ends, and writes
that file anew every few seconds. Where a file system has no locks, or locks that other machines do not see, the age of
the file says whether its writer lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_scmoe.config import ConfigError

NAME = ".writer"
REFRESH_S = 5.0
STALE_S = 30.0
"""Age at which a file that nobody has locked, as far as this machine sees, was left by a dead job."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Be the only job that writes to ``folder``, which is made, until the block ends.

    Raises:
        ConfigError: where another job is.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"checkpoints are files in a folder: --save is {folder}, where none can be written "
            f"({error.strerror}); give another folder"
        ) from error
    try:
        _claim(file, path)
        ended = threading.Event()
        keeper = threading.Thread(target=_keep, args=(file, ended), name="writer", daemon=True)
        _write(file)
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def _claim(file: int, path: Path) -> None:
    """Raise ConfigError while another job writes; wait for one that may be dead."""
    began_s, seen, has_said = time.monotonic(), os.pread(file, 4096, 0), False
    while True:
        locks = _lock(file)
        holder = _holder(file)
        is_elsewhere = bool(holder) and holder.get("host") != socket.gethostname()
        if locks == "ours" and not is_elsewhere:
            return  # free, or left by a process of this machine that is dead
        if locks == "none" and not holder:
            print(f" > {path.parent}: this file system has no locks; the age of {NAME} stands for one", flush=True)
            return
        if os.pread(file, 4096, 0) != seen or (locks == "theirs" and not is_elsewhere and _lives(holder)):
            raise ConfigError(
                f"one job at a time writes to a folder: --save is {path.parent}, where process {holder.get('pid')} on "
                f"{holder.get('host')} writes since {_age(holder)}; stop it, or give another folder"
            )
        if time.monotonic() - began_s > STALE_S and locks != "theirs":
            print(f" > {path.parent}: taken over from process {holder.get('pid')} on {holder.get('host')}", flush=True)
            return
        if time.monotonic() - began_s > 4 * STALE_S:
            raise ConfigError(
                f"one job at a time writes to a folder: --save is {path.parent}, and {path} is locked by a process "
                "that writes nothing; find and stop it, or give another folder"
            )
        if not has_said:
            has_said = True
            print(f" > {path.parent}: waiting {STALE_S:.0f} s to see whether its writer lives", flush=True)
        time.sleep(REFRESH_S / 5)


def _lock(file: int) -> str:
    """Whose the lock is now: ``ours``, ``theirs``, or ``none`` where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: forked children do not keep it
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return "none"
        return "theirs"
    return "ours"


def _write(file: int) -> None:
    """Say who writes, and that it lives: the text is another one each time, and of one length."""
    now = {"host": socket.gethostname(), "pid": os.getpid(), "began": _BEGAN, "said": time.time_ns()}
    os.pwrite(file, json.dumps(now).ljust(512).encode(), 0)


_BEGAN = time.time()


def _keep(file: int, ended: threading.Event) -> None:
    while not ended.wait(REFRESH_S):
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            _write(file)


def _holder(file: int) -> dict[str, Any]:
    """Who wrote last; empty where nobody does now."""
    try:
        found = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:  # in the middle of its writing, or somebody else's file
        found = {"host": "?", "pid": "?"}
    return found if isinstance(found, dict) else {}


def _lives(holder: dict[str, Any]) -> bool:
    return isinstance(holder.get("pid"), int) and Path(f"/proc/{holder['pid']}").exists()


def _age(holder: dict[str, Any]) -> str:
    began = holder.get("began")
    if not isinstance(began, int | float):
        return "?"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(began))} ({(time.time() - began) / 60:.0f} minutes)"
