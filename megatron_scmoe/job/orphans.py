"""Ranks end with their launcher. Standard library only: called before the slow imports, during which it may die too."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_launcher() -> None:
    """Let the kernel kill this process when torchrun, its parent, is gone.

    Workers of a torchrun that was killed with -9 wait for ever otherwise, or train on and write into the folder that a
    restarted job uses. Under Slurm alone, slurmstepd ends its tasks itself; a shell's child may outlive its shell, as
    nohup wants. Linux only: elsewhere nothing is done, and said.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if not sys.platform.startswith("linux"):
        print(f" > {sys.platform} has no parent death signal: kill the ranks of a dead torchrun yourself", flush=True)
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)
