"""Folders that the job writes to, and shared memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from progress import in_words as in_bytes

from doctoring.check import Finding, by_host, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.job.roll_call import looks

FLAGS = ("save", "data_cache_path")
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 1 << 30
"""Of NCCL inside a node and of data loaders: what NVIDIA's containers ask for; without asking there are 64 MB."""
SHARED_LOOK_S = 10.0
"""How long another node's file may take to be seen."""
_TRIED_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_TAKE = "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"


def existing(path: str) -> Path:
    """The folder in which ``path`` would be made, or itself; what cannot be looked at fails when it is tried."""
    place = Path(path).absolute()
    with contextlib.suppress(OSError):
        while not place.is_dir():
            place = place.parent
    return place


def tried(folder: Path) -> dict[str, Any]:
    """What ``folder`` can do: bytes in all and free, inodes, and what fails there and how to mend it, in words.

    It leaves nothing behind.
    """
    found: dict[str, Any] = {
        "fails": "",
        "fix": "give a folder of another file system, mounted with locks where it is NFS",
    }
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_own_file(folder)) for _ in range(2))
        try:
            status = os.statvfs(folder)
            found |= {"total": status.f_blocks * status.f_frsize, "free": status.f_bavail * status.f_frsize}
            found |= {"inodes": status.f_favail, "counts_inodes": status.f_files > 0}
            first.write_bytes(b"\1" * _TRIED_BYTES)
            second.write_bytes(b"\2" * _TRIED_BYTES)
            second.replace(first)
            if first.read_bytes() != b"\2" * _TRIED_BYTES:
                found["fails"] = "a file that was renamed over another one reads as the other one"
            else:
                found["fails"] = _lock_fails(first)
        except OSError as error:
            found["fails"] = f"writing and renaming a file ends with: {error.strerror}"
            if error.errno in _NO_ROOM:
                found["fix"] = "make room, or give another folder"
            elif error.errno in _NO_RIGHT:
                found["fix"] = "give a folder that this user may write to"
    return found


@contextlib.contextmanager
def _own_file(folder: Path) -> Iterator[Path]:
    path = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _lock_fails(path: Path) -> str:
    """Whether another process is kept from a lock that this one holds: two jobs could write to one folder else."""
    with path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"locking a file ends with: {error.strerror}"
        taken = subprocess.run([sys.executable, "-c", _TAKE, path], check=False, capture_output=True).returncode == 0
    return "two processes lock the same file" if taken else ""


class Storage:
    """See ``CATALOG``."""

    name, communicates = "storage", False

    def look(self, job: Job) -> dict[str, Any]:
        """Folders as this rank's machine sees them: its first rank looks for all, and at rank 0's file."""
        found: dict[str, Any] = {"host": job.host, "folders": {}}
        for name in FLAGS if job.args else ():
            path = getattr(job.args, name)
            if path and "://" not in path:
                place = existing(path)
                sees = _sees_rank_0(job, name, place)
                if job.local_rank == 0:
                    found["folders"][name] = tried(place) | {"path": str(place), "sees_rank_0": sees}
        if job.local_rank == 0:
            found["shared"] = _shared_memory()
        return found

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Host by host, and then what was asked for and is nowhere."""
        found = []
        for host, ranks in by_host([one["host"] for one in seen]).items():
            one = next((seen[rank] for rank in ranks if "shared" in seen[rank]), None)
            if one is None:
                found.append(not_tried(f"{host}: none of its ranks has LOCAL_RANK 0, which looks for all"))
                continue
            for name, folder in one["folders"].items():
                found += judged(f"--{name.replace('_', '-')}", host, folder, job.free_bytes)
            found += judged_shared(host, one["shared"])
        if not job.args:
            why = "the flags are refused" if job.flags else "no flags were given"
            found.append(not_tried(f"--save and --data-cache-path: {why}"))
        elif not seen[0]["folders"]:
            found.append(not_tried("--save and --data-cache-path: neither is given as a folder"))
        return found


def _sees_rank_0(job: Job, name: str, place: Path) -> bool:
    """Whether a file that rank 0 leaves in ``place``, until all have looked, is seen by this machine."""

    def looked(rank: int) -> str:
        return f"looked for {name}/{rank}"

    def leave() -> str:
        path = stack.enter_context(_own_file(place))
        with contextlib.suppress(OSError):  # what fails here is found by itself
            path.touch()
        return path.name

    with contextlib.ExitStack() as stack:
        left = job.meeting.told(f"file in {name}", leave)
        found = bool(job.local_rank) or any(_is_there(place / left) for _ in looks(SHARED_LOOK_S))
        job.meeting.store.set(looked(job.rank), "")
        if job.rank == 0:
            job.meeting.missing(looked, range(job.world_size))
    return found


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def _shared_memory() -> dict[str, Any]:
    if not SHARED_MEMORY.is_dir():
        return {"total": 0, "fails": "it is not there"}
    return tried(SHARED_MEMORY)


def judged(flag: str, host: str, folder: Mapping[str, Any], free_bytes: int) -> list[Finding]:
    """What there is to say of a folder on a host."""
    where = f"{flag} is in {folder['path']} on {host}"
    if folder["fails"]:
        return [problem(f"{where}: {folder['fails']}", folder["fix"])]
    if not folder["sees_rank_0"]:
        fix = "give a folder of a file system that all nodes share"
        return [problem(f"{where}: a file that rank 0 wrote there is not seen", fix)]
    if folder["free"] < free_bytes:
        text = f"{where}: {in_bytes(folder['free'])} are free, and {in_bytes(free_bytes)} are wanted (--free-space)"
        return [problem(text, "make room, or give another folder")]
    if folder["counts_inodes"] and not folder["inodes"]:
        return [problem(f"{where}: no file can be made, for want of inodes", "remove files, or give another folder")]
    return [ok(f"{where}: {in_bytes(folder['free'])} free; renames are atomic, and locks hold between its processes")]


def judged_shared(host: str, shared: Mapping[str, Any]) -> list[Finding]:
    """What there is to say of /dev/shm on a host."""
    fix = "start the container with --ipc=host or --shm-size=8g, or mount it larger"
    if shared["fails"]:
        return [problem(f"{SHARED_MEMORY} on {host}: {shared['fails']}", fix)]
    if shared["total"] < LEAST_SHARED:
        text = f"{SHARED_MEMORY} on {host} has {in_bytes(shared['total'])}, and {in_bytes(LEAST_SHARED)} are needed"
        return [problem(text, fix)]
    return [ok(f"{SHARED_MEMORY} on {host} has {in_bytes(shared['total'])}")]
