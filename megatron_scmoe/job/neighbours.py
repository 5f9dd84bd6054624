"""Other processes of this machine: whether one can still speak, and which rank speaks for all that are here."""

from __future__ import annotations

import os

import psutil

_SILENT_STATES = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}  # one that is debugged speaks again


def cannot_speak(pid: int) -> bool:
    """Whether the process can be seen from here, and is stopped or gone."""
    try:
        return psutil.Process(pid).status() in _SILENT_STATES
    except psutil.NoSuchProcess:
        return True


def is_spokesman() -> bool:
    """Whether this is the first rank that one launcher has started here and that can still speak.

    Torchrun's are its children, which know the same store. Ranks that others have started do not see one another, and
    each speaks. Where processes took their places after their start, these cannot be seen, and the first one speaks.
    """
    mine = _place(os.environ)
    try:
        if _place(psutil.Process().environ()) != mine:
            return mine[1] == 0
        others = psutil.Process(os.getppid()).children()
    except psutil.Error:
        return True
    return not any(_speaks_before(other, mine) for other in others if other.pid != os.getpid())


def _place(environment: dict[str, str] | os._Environ[str]) -> tuple[tuple[str | None, ...], int]:
    """The job, and which of its ranks here."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return tuple(environment.get(name) for name in names), int(environment.get("LOCAL_RANK", "0"))


def _speaks_before(other: psutil.Process, mine: tuple[tuple[str | None, ...], int]) -> bool:
    try:
        job, local_rank = _place(other.environ())
    except (psutil.Error, ValueError):  # gone, or another one's
        return False
    return job == mine[0] and local_rank < mine[1] and not cannot_speak(other.pid)
