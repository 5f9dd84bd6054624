"""Ranks end with their launcher, and it with them where a restart is no use.

Standard library only: called before the slow imports, during which it may die too.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RANK = "SCMOE_RANK_PID"
"""Environment variable that tells processes which a rank has started whose they are."""


def die_with_launcher() -> None:
    """Under torchrun: let the kernel kill this process when torchrun is gone.

    Workers of a torchrun that was killed with -9 wait for ever otherwise, or train on and write into the folder that a
    restarted job uses. Under Slurm alone, slurmstepd ends its tasks itself; a shell's child may outlive its shell, as
    nohup wants.
    """
    os.environ[_RANK] = str(os.getpid())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent is gone. Linux only: elsewhere nothing is done, and said."""
    if not sys.platform.startswith("linux"):
        print(f" > {sys.platform} has no parent death signal: this process may outlive its parent", flush=True)
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def end_launcher() -> None:
    """Under a torchrun that would start its ranks again: end it, as Slurm or a user would, and this process with it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        os.kill(os.getppid(), signal.SIGTERM)


def end_with_rank() -> None:
    """In a process that a rank has started, be it by a fork server: end it as soon as the rank has ended. Linux only.

    Such a process, which waits for work of a rank that was killed with -9, waits for ever otherwise, or writes on.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        rank = os.pidfd_open(int(os.environ[_RANK]))
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([rank], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end with rank", daemon=True).start()
