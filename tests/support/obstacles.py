"""What happens to a training: signals, a full disk, files of a checkpoint that are cut or gone."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from pathlib import Path
from random import Random
from typing import NamedTuple

from victim import RANKS, Job

RANK, ALL, LAUNCHER = "kill -9 of a rank", "kill -9 of all ranks", "kill -9 of torchrun"
STOP, DISK, DAMAGE = "SIGSTOP of a rank", "full disk", "kill -9 and damage to the newest checkpoint"
KINDS = (RANK, ALL, LAUNCHER, DAMAGE, STOP, DISK)
KILLS = (RANK, ALL, LAUNCHER, DAMAGE)
STEP, SAVE = "step", "save"
DISK_BYTES = 64 << 20
_CHECKPOINT_BYTES = 1 << 20
_LOG_BYTES = 150_000


class Obstacle(NamedTuple):
    """One of ``KINDS``, in a ``STEP`` or a ``SAVE``."""

    kind: str
    moment: str


def strike(kind: str, job: Job, disk: Disk, random: Random) -> str:
    """Let it happen; returns what was done, in words, or nothing for a job that has ended.

    Damage comes later: here it is a kill of all ranks.
    """
    ranks = job.ranks()
    if len(ranks) < RANKS:
        return ""
    rank = random.randrange(len(ranks))
    if kind == DISK:
        return disk.fill(random.randrange(_CHECKPOINT_BYTES), ranks[rank])
    pids = {RANK: [ranks[rank]], STOP: [ranks[rank]], LAUNCHER: [job.launcher()]}.get(kind, ranks)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the end of one may end the other
            os.kill(pid, signal.SIGSTOP if kind == STOP else signal.SIGKILL)
    return {RANK: f"kill -9 of rank {rank}", STOP: f"SIGSTOP of rank {rank}", LAUNCHER: LAUNCHER}.get(kind, ALL)


def damage(save: Path, whole: set[int], random: Random) -> tuple[str, int | None]:
    """Cut or remove a file of the newest checkpoint, or tear Megatron's tracker.

    Args:
        save: folder of checkpoints.
        whole: steps of those that are; where there is one it is left alone.
        random: what decides.

    Returns:
        What was done, in words, and the step whose checkpoint is whole no more.
    """
    tracker = save / "latest_checkpointed_iteration.txt"
    if len(whole) < 2 or random.random() < 0.25:
        text = random.choice(["", "\0\0", None])
        if text is None:
            tracker.unlink()
        else:
            tracker.write_text(text)
        return f"{tracker.name} {'gone' if text is None else f'torn to {text!r}'}", None
    step = max(whole)
    path = random.choice(sorted((save / f"iter_{step:07d}").iterdir()))
    size = path.stat().st_size
    kept = random.choice([None, 0, random.randrange(size)])
    if kept is None:
        path.unlink()
    else:
        os.truncate(path, kept)
    return f"{path.name} of step {step} {'gone' if kept is None else f'cut to {kept} of {size} bytes'}", step


class Disk:
    """A small file system in memory; where it cannot be mounted, a folder, and a limit of file sizes in its place.

    Args:
        folder: that it is, made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        folder.mkdir(parents=True, exist_ok=True)
        self.release()  # of a call that was killed
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
        self.is_mounted = subprocess.run(mounted, capture_output=True, check=False).returncode == 0

    def fill(self, free_bytes: int, pid: int) -> str:
        """Leave so many bytes free; without a file system of its own, let ``pid`` write no longer file."""
        if not self.is_mounted:
            limit = _LOG_BYTES + free_bytes // 4  # less than the piece of a rank in a checkpoint
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
            return f"a rank may write no more than {limit} bytes to a file"
        with self._ballast.open("wb") as file:
            while (size := self._free_bytes() - free_bytes) > 0:
                with contextlib.suppress(OSError):  # a save took some of it meanwhile
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
        return f"the disk has {free_bytes} bytes left"

    def _free_bytes(self) -> int:
        state = os.statvfs(self.folder)
        return state.f_bavail * state.f_frsize

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    def release(self) -> None:
        """Unmount it."""
        if os.path.ismount(self.folder):
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def obstacles(kills: int, random: Random) -> list[Obstacle]:
    """Until there are so many kills: each kind of them in turn, in a step and in a save, and what takes its time less
    often: of 8 rounds 4 have a full disk, one a rank that stops in a step, and one a rank that stops in a save.
    """
    found: list[Obstacle] = []
    for number in range(-(-kills // len(KILLS))):
        wanted = [Obstacle(kind, (STEP, SAVE)[(number + i) % 2]) for i, kind in enumerate(KILLS)]
        if number % 2 == 0:
            wanted.append(Obstacle(DISK, SAVE))
        if number % 4 == 0:
            wanted.append(Obstacle(STOP, (STEP, SAVE)[number // 4 % 2]))
        random.shuffle(wanted)
        found += wanted
    return found
