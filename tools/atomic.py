"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


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
    if path.is_dir():
        return "it is a folder"
    if path.is_symlink():
        return "it is a link"
    if os.path.lexists(path) and not path.is_file():
        return "it is no regular file"
    for source in sources:
        if is_within(path, source):
            return f"it lies in {source}, which is read"
    return f"{path.parent} is no folder" if not path.parent.is_dir() else obstacle(path)


def is_within(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder``, or lies in it by whatever name."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def obstacle(path: Path) -> str | None:
    """What keeps ``path`` from being made, in words, as far as it shows before it is tried; None: nothing."""
    place = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110 (never raises)
    if not place.is_dir():
        return f"{place} is no folder"
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()  # /proc, for one, says that it is writable
    except OSError:
        writable = False
    else:
        writable = os.access(place, os.W_OK | os.X_OK)
    return None if writable else f"{place} is not writable"
