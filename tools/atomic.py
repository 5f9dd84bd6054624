"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_LONGEST_NAME = 170
"""Bytes; file systems take 255, and a hidden name beside it has a host and a process, too."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A text file to write into; it takes the place of ``path`` when the ``with`` block ends without an exception."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in the place of what ``path`` held."""
    with written(path) as file:
        file.write(text)


def obstacle_of_file(path: Path, *sources: Path) -> str | None:
    """What keeps ``path`` from being written as a file, in words; None: nothing.

    A link or a device would be replaced by the file, and what is read from ``sources``, files or folders, be lost.
    """
    if os.path.isdir(path):  # noqa: PTH112 (never raises, as all of os.path here)
        return "it is a folder"
    if os.path.islink(path):  # noqa: PTH114
        return "it is a link"
    if os.path.lexists(path) and not os.path.isfile(path):  # noqa: PTH113
        return "it is no regular file"
    for source in sources:
        if is_within(path, source):
            return f"it lies in {source}, which is read"
    return obstacle(path) if os.path.isdir(path.parent) else f"{path.parent} is no folder"  # noqa: PTH112


def obstacle_of_folder(path: Path) -> str | None:
    """What keeps files from being written into the folder ``path``, which may be there or not, in words."""
    if os.path.isdir(path):  # noqa: PTH112
        return obstacle(path / "new")
    if os.path.islink(path):  # noqa: PTH114
        return "it is a link that leads to no folder"
    return "it is a file" if os.path.lexists(path) else obstacle(path)


def is_within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder``, or lies in it by whatever name."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def obstacle(path: Path) -> str | None:
    """What keeps ``path`` from being made, in words, as far as it shows before it is tried; None: nothing."""
    path = path.absolute()
    place = next(parent for parent in path.parents if os.path.exists(parent))  # noqa: PTH110
    if not place.is_dir():
        return f"{place} is no folder"
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in path.relative_to(place).parts):
        return os.strerror(errno.ENAMETOOLONG)
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()  # /proc, for one, says that it is writable
    except OSError:
        writable = False
    else:
        writable = os.access(place, os.W_OK | os.X_OK)
    return None if writable else f"{place} is not writable"
