"""Signs of life: what each rank says every few seconds in the job's store, and what follows from it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch.distributed as dist

from megatron_scmoe.job import neighbours
from megatron_scmoe.mcore.nodes import boot

BEAT_S = 3.0
SILENT_S = {"step": 25.0, "setup": 120.0, "checkpointing": 40.0, "between": 40.0}
"""How long a rank may say nothing, by the section that it was in last. A thread of its own speaks, so silence means a
stopped or dead process, an unreachable node, or a call that keeps Python's lock. Where data are indexed such calls take
minutes: the section ``data`` has no limit. A process of this machine that is seen to be stopped or dead has the time of
a step wherever it was."""
ASKED_AGAIN_S = 15.0
"""Between two looks at all ranks where a step takes too long: several signs of life."""
PATIENCE = 10.0
_BEAT = "beat/"


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        number: of this sign.
        step: training step under way, from 1; the last one outside of steps.
        section: ``setup`` until the first step has ended, but for ``data``; ``step``, ``checkpointing``, ``between``
            or ``ended``.
        still_s: seconds since the main thread was last seen at another place of its code.
        machine: where it runs, and where its ``pid`` means a process.
        pid: its process.
    """

    number: int
    step: int
    section: str
    still_s: float
    machine: str
    pid: int

    def in_words(self) -> str:
        """Where the rank is."""
        return f"in step {self.step}" if self.section == "step" else f"{self.section}, step {self.step}"


class Pulse:
    """Speaks for this rank."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._number = 0
        self._place: list[tuple[int, int]] = []
        self._moved_s = time.monotonic()
        self._main = threading.main_thread().ident

    def say(self, step: int, section: str) -> None:
        """Write the next sign of life."""
        now_s, place = time.monotonic(), _place(sys._current_frames().get(self._main or 0))
        if place != self._place:
            self._place, self._moved_s = place, now_s
        self._number += 1
        beat = Beat(self._number, step, section, now_s - self._moved_s, this_machine(), os.getpid())
        self._store.set(f"{_BEAT}{self._rank}", json.dumps(asdict(beat)))


def _place(frame: FrameType | None) -> list[tuple[int, int]]:
    """Where a thread is in its code, frame by frame."""
    place = []
    while frame is not None:
        place.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return place


@functools.cache
def this_machine() -> str:
    """Where numbers of processes mean the same: a boot of Linux, whatever its name, and a container's namespace."""
    with contextlib.suppress(OSError):
        return f"{boot()} {Path('/proc/self/ns/pid').readlink()}"
    return boot()


def _cannot_speak(beat: Beat) -> bool:
    """Whether the rank's process can be seen from here, and is stopped or gone."""
    return beat.machine == this_machine() and neighbours.cannot_speak(beat.pid)


def heard(store: dist.Store, rank: int) -> Beat | None:
    """The last sign of life of a rank; None before its first."""
    key = f"{_BEAT}{rank}"
    return Beat(**json.loads(store.get(key))) if store.check([key]) else None


class Finding(NamedTuple):
    """Why a job has to end: ranks, what they are, and whether they say nothing more."""

    ranks: list[int]
    words: str
    are_silent: bool


class Ear:
    """Listens to one other rank."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.rank = rank
        self._store = store
        self._last: Beat | None = None
        self._heard_s = time.monotonic()

    def silence(self) -> Finding | None:
        """Where it has been silent for too long, for how long and where."""
        beat, now_s = heard(self._store, self.rank), time.monotonic()
        if beat != self._last:
            self._last, self._heard_s = beat, now_s
        silent_s = now_s - self._heard_s
        if beat is None or beat.section == "ended" or silent_s <= SILENT_S["step"]:
            return None
        if silent_s <= SILENT_S.get(beat.section, float("inf")) and not _cannot_speak(beat):
            return None
        return Finding([self.rank], f"silent for {silent_s:.0f} s, last heard of {beat.in_words()}", are_silent=True)


def diagnosis(before: Mapping[int, Beat], after: Mapping[int, Beat], limit_s: float) -> Finding | None:
    """Why a step takes longer than ``limit_s``.

    Args:
        before: a sign of life of every rank.
        after: another one, at least ``ASKED_AGAIN_S`` later.
        limit_s: of a step; elsewhere a rank may stand still for ``PATIENCE`` times as long.

    Returns:
        What hangs; None where some rank computes, or saves: then it is slow and does not hang.
    """
    silent = [rank for rank, beat in after.items() if beat == before.get(rank) and beat.section != "ended"]
    if silent:
        words = f"silent for {ASKED_AGAIN_S:.0f} s or more, {after[silent[0]].in_words()}"
        return Finding(silent, words, are_silent=True)
    allowed_s = {"step": limit_s}
    if any(beat.still_s < allowed_s.get(beat.section, PATIENCE * limit_s) for beat in after.values()):
        return None
    last_step = min(beat.step for beat in after.values())
    behind = [rank for rank, beat in after.items() if beat.step == last_step]
    where = "as all ranks do" if len(behind) == len(after) else "behind all others"
    words = f"standing still for {limit_s:.0f} s or more, {after[behind[0]].in_words()}, {where}"
    return Finding(behind, words, are_silent=False)
