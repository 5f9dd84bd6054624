"""Is a checkpoint whole? Seen from the sizes of its files, without reading what is in them."""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


def folder_of(load: Path, iteration: int) -> Path:
    """Where Core keeps the checkpoint of an iteration."""
    return load / f"iter_{iteration:07d}"


def newest_iteration(load: Path) -> int | None:
    """What Core's tracker in ``load`` says; None where there is none, or it says something else."""
    try:
        return int((load / TRACKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a release, for one
        return None


def tracker_says(load: Path) -> str | None:
    """The text of Core's tracker; None where there is none."""
    path = load / TRACKER
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None


def write_tracker(load: Path, iteration: int) -> None:
    """Let Core's tracker say that iteration, whole at any moment."""
    new = load / f"{TRACKER}.new"
    new.write_text(str(iteration), encoding="utf-8")
    new.replace(load / TRACKER)


def whole_iterations(load: Path, before: int | None = None) -> Iterator[int]:
    """Those in ``load`` whose checkpoints are whole, the newest first, all or ``before`` one."""
    found = (_ITERATION.fullmatch(path.name) for path in load.iterdir() if path.is_dir())
    numbers = sorted((int(match[1]) for match in found if match), reverse=True)
    return (n for n in numbers if (before is None or n < before) and not flaw(folder_of(load, n)))


def flaw(folder: Path) -> str:
    """What a ``torch_dist`` checkpoint lacks, in words; empty where it is whole, or one of another format."""
    if not folder.is_dir():
        return "its folder is missing"
    if any(folder.glob("mp_rank_*")):
        return ""
    missing = [name for name in ("metadata.json", ".metadata") if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    try:
        json.loads((folder / "metadata.json").read_bytes())
    except ValueError:
        return "metadata.json is cut"
    common = folder / "common.pt"  # of older versions of Core
    if common.is_file() and not zipfile.is_zipfile(common):
        return "common.pt is cut"
    return _flaw_of_pieces(folder)


def _flaw_of_pieces(folder: Path) -> str:
    """Which file has not all that the metadata say is in it."""
    try:
        pieces = FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # whatever a damaged file makes of torch's reader
        return f".metadata cannot be read ({type(error).__name__})"
    ends: dict[str, int] = defaultdict(int)
    for piece in pieces:
        ends[piece.relative_path] = max(ends[piece.relative_path], piece.offset + piece.length)
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size < end:
            return f"{name} has {size} of {end} bytes"
    return ""
