"""Files that untrusted files name, bytes at a place in a file, and a file that hashes what is written into it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints.tensors import CheckpointError

_STEP_BYTES = 1 << 26  # of one write or read: progress moves, and no system call takes more than 2 GiB
_HASHED_BYTES = 1 << 22


def is_plain(name: object) -> bool:
    """Whether an untrusted name can only be that of a file inside a folder."""
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not set(name) & {"/", "\\"}


def inside(folder: Path, name: object, origin: Path) -> Path:
    """A file of a folder by its untrusted name, as read from ``origin``; refuses what leads out of it or is no file."""
    if not is_plain(name):
        raise CheckpointError(
            f"{origin} names a file that is not in its folder: {str(name)[:80]!a}; get it from a source that you trust"
        )
    path = folder / str(name)
    if not path.is_file():
        found = "is no file" if path.exists() else "is missing"
        raise CheckpointError(f"{path} {found}, and {origin} names it; get the whole checkpoint")
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":  # Hugging Face's cache: folders of links to files named by their hash
        homes.append(home.parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link that leads out of its folder; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; refuses what holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({str(error)[:80]}); get it anew") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object but {type(value).__name__}; get it anew")
    return value


def read_into(file: io.FileIO, offset: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes at ``offset`` of an unbuffered file; EOFError where it ends too early."""
    view = bytes_of(tensor)
    file.seek(offset)
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + _STEP_BYTES])
        if not count:
            raise EOFError
        done += count


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class Sink:
    """A file that counts and hashes what is written into it.

    Attributes:
        position: bytes written so far.
    """

    def __init__(self, file: BinaryIO, written: Callable[[int], None]) -> None:
        """``written`` is told the number of bytes of each write."""
        self.position = 0
        self._file, self._written = file, written
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data``."""
        view = memoryview(data)  # of bytes
        for start in range(0, len(view), _STEP_BYTES):
            part = view[start : start + _STEP_BYTES]
            self._file.write(part)
            self._sha256.update(part)
            self.position += len(part)
            self._written(len(part))
        return len(view)

    def flush(self) -> None:
        """What torch.save wants of a file."""
        self._file.flush()

    def sha256(self) -> str:
        """Of all bytes so far, in hexadecimal digits."""
        return self._sha256.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """What tells these files from others: name and size, and the hash of a small file or the time of a large one."""
    entries = []
    for path in paths:
        status = path.stat()
        is_small = status.st_size <= _HASHED_BYTES
        mark = {"sha256": file_sha256(path)} if is_small else {"modified_ns": status.st_mtime_ns}
        entries.append({"name": path.name, "bytes": status.st_size, **mark})
    return entries
