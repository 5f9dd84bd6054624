"""The files of ``--overlap-report``: JSON lines, a file for each rank. ``tools/trace.py`` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from megatron_scmoe.overlap.costs import GroupPass
from megatron_scmoe.report.figures import GroupRow


class ReportFile:
    """The JSON lines of one rank. Where a process is killed its last line may be torn; a run that continues in the same
    folder begins a new one.

    Args:
        folder: made if need be.
        rank: names the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        path = folder / f"rank{rank:05d}.jsonl"
        torn = path.exists() and not _ends_a_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def write(self, iteration: int, rows: Sequence[GroupRow], passes: Sequence[GroupPass]) -> None:
        """Add a step.

        Args:
            iteration: that ended.
            rows: its groups.
            passes: those whose spans to keep for ``tools/trace.py``; none for a line without spans.
        """
        line = {
            "iteration": iteration,
            "rank": self._rank,
            "groups": [asdict(row) for row in rows],
            "passes": [asdict(one) for one in passes],
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
