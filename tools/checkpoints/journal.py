"""The folder beside the target in which a conversion grows: a killed one continues there, and what is in it does not
load unless it is whole.

.NAME.partial/plan.json         what is converted, and how: another request does not continue it
.NAME.partial/part-00000.json   one for each finished part
.NAME.partial/checkpoint/       what becomes the target, by one rename
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import atomic

from checkpoints.disk.files import Sink, read_json
from checkpoints.tensors import CheckpointError

_PLAN, _PAYLOAD, _LOCK = "plan.json", "checkpoint", "lock"
_VERSION = 1


class Journal:
    """A conversion on its way to ``target``, to be used by one process at a time.

    Attributes:
        folder: hidden, beside the target.
        payload: what becomes the target.
    """

    def __init__(self, target: Path, plan: Mapping[str, Any]) -> None:
        """Begin, or continue what was begun with the same plan, which has all that decides the result, as JSON has it.

        A target that is there, or that another conversion is on its way to, is refused.
        """
        self.folder, self._target = beside(target), target
        self.payload = self.folder / _PAYLOAD
        check_target(target)
        try:
            self.payload.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK).open("w")
        except OSError as error:
            raise CheckpointError(f"{target} cannot be made: {error}; name another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise CheckpointError(f"another process is writing {target}; wait for it") from None
        except OSError as error:  # Lustre without -o flock, for one
            self.close()
            if not has_begun(target):
                self.remove()
            raise CheckpointError(
                f"{self.folder.parent} has no locks ({error.strerror}), without which two processes could write one "
                "checkpoint; mount it with them (Lustre: -o flock), or convert to another disk"
            ) from None
        self._keep(json.loads(json.dumps({**plan, "version": _VERSION})))

    def _keep(self, plan: Mapping[str, Any]) -> None:
        """Note the plan, or compare it with the one that was noted."""
        if not has_begun(self._target):
            try:
                atomic.write_text(self.folder / _PLAN, json.dumps(plan, indent=1) + "\n")
            except OSError:
                self.remove()
                raise
            return
        then = _noted(self.folder / _PLAN)
        for name in plan:
            if then.get(name) != plan[name]:
                raise CheckpointError(
                    f"{self.folder} holds an unfinished conversion that differs in its {name}; repeat that one, or "
                    f"remove it and begin anew: rm -r {self.folder}"
                )

    def finished(self, number: int, path: str) -> dict[str, Any] | None:
        """What was noted of part ``number`` when it was finished; None where it was not."""
        entry, file = _noted(self._note(number)), self.payload / path
        return entry if file.is_file() and file.stat().st_size == entry.get("bytes") else None

    def write_part(
        self, number: int, path: str, write: Callable[[Sink], dict[str, Any]], written: Callable[[int], None]
    ) -> dict[str, Any]:
        """Write the file ``path`` of ``payload``, which is there whole or not at all, and note that it is.

        ``write`` returns what to note, beside the file's ``bytes`` and ``sha256``; ``written`` is told of its progress.
        """
        final = self.payload / path
        final.parent.mkdir(exist_ok=True)
        growing = self.folder / "growing"
        with growing.open("wb") as file:
            sink = Sink(file, written)
            entry = {**write(sink), "path": path, "bytes": sink.position, "sha256": sink.sha256()}
            file.flush()
            os.fsync(file.fileno())
        growing.replace(final)
        atomic.write_text(self._note(number), json.dumps(entry))
        return entry

    def _note(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.json"

    def publish(self) -> None:
        """Give the finished checkpoint its name."""
        for path in [*self.payload.rglob("*"), self.payload]:
            _sync(path)  # else a power cut could leave the name without the bytes
        check_target(self._target)
        self.payload.rename(self._target)
        _sync(self._target.parent)
        self.remove()

    def remove(self) -> None:
        """Remove everything but a published target."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process continue."""
        self._lock.close()


@contextlib.contextmanager
def opened(target: Path, plan: Mapping[str, Any]) -> Iterator[Journal]:
    """A journal; an error in the source or the plan removes it, any other end leaves it to be continued."""
    journal = Journal(target, plan)
    try:
        yield journal
    except CheckpointError:
        journal.remove()
        raise
    finally:
        journal.close()


def _noted(path: Path) -> dict[str, Any]:
    """What a file of the journal holds; nothing where it is not there, or a power cut has damaged it."""
    try:
        return read_json(path)
    except (CheckpointError, FileNotFoundError):
        return {}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def beside(target: Path) -> Path:
    """Where a conversion on its way to ``target`` grows."""
    return target.with_name(f".{target.name}.partial")


def has_begun(target: Path) -> bool:
    """Whether there is a conversion on its way to ``target``, which the same call would continue."""
    return os.path.isfile(beside(target) / _PLAN)  # noqa: PTH113 (Path.is_file raises for names that are too long)


def check_target(target: Path) -> None:
    """Refuse a target that is there already, or cannot be made."""
    if os.path.lexists(target):
        if not (beside(target) / _PAYLOAD).exists():
            shutil.rmtree(beside(target), ignore_errors=True)  # of a call that was killed when all was done
        raise CheckpointError(f"{target} exists, and nothing is overwritten; name another folder or remove it")
    reason = atomic.obstacle(target)
    if reason:
        raise CheckpointError(f"{target} cannot be made: {reason}; name another folder")


def missing_bytes(folder: Path, needed: int) -> int:
    """How many of ``needed`` bytes the disk of ``folder``, or of what is there of its path, has no room for."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return max(0, needed - shutil.disk_usage(place).free)
