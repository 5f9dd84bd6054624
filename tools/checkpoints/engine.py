"""Runs a conversion part by part: what is in memory is one piece, and what is on disk is whole or hidden."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from progress import in_words, progress
from provenance import provenance
from torch import Tensor

from checkpoints import journal
from checkpoints.disk.files import Sink, described, file_sha256
from checkpoints.plan import Account, Conversion, Piece, check
from checkpoints.tensors import Checkpoint, CheckpointError, TensorInfo, row_range

RECEIPT = "conversion.json"
_FORMAT_VERSION = 1
_SPARE_BYTES = 1 << 26  # what headers, names and the receipt may take
_CHECKED_ELEMENTS = 1 << 24  # at a time, for numbers that are not finite


class Writer(Protocol):
    """A format to write.

    Attributes:
        keeps_tensors_whole: whether all pieces of a tensor have to lie in one part.
    """

    keeps_tensors_whole: bool

    def part_path(self, number: int, total: int) -> str:
        """Where part ``number``, counted from 0, of ``total`` lies in the target."""

    def write_part(self, sink: Sink, pieces: Sequence[Piece], tensors: Iterator[Tensor]) -> list[dict[str, Any]]:
        """Write one part, and return what ``finish`` has to know of it, as JSON has it."""

    def finish(self, folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write everything but the parts; ``parts`` is what ``write_part`` returned, by path."""


class MismatchError(RuntimeError):
    """The target does not compute what the source does; it was not published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to convert, into what.

    Attributes:
        target: the folder to make.
        shard_bytes: of a part at most, unless a single piece is larger.
        options: of the request, as JSON has them: they decide the result, and are in the receipt.
        verify: compares the finished target, which has not its name yet, with the source. Returns figures for the
            receipt, or raises MismatchError.
    """

    source: Checkpoint
    conversion: Conversion
    writer: Writer
    target: Path
    shard_bytes: int
    options: Mapping[str, Any]
    verify: Callable[[Path], Mapping[str, Any] | None] | None = None

    def parts(self) -> list[list[Piece]]:
        """The pieces of each part, in the order in which they are written."""
        units: dict[Any, list[Piece]] = {}
        for number, piece in enumerate(self.conversion.pieces):
            units.setdefault(piece.name if self.writer.keeps_tensors_whole else number, []).append(piece)
        parts: list[list[Piece]] = []
        filled = self.shard_bytes
        for unit in units.values():
            size = num_bytes(unit)
            if not parts or filled + size > self.shard_bytes:
                parts.append([])
                filled = 0
            parts[-1] += sorted(unit, key=lambda piece: piece.row)
            filled += size
        return parts

    def account(self) -> Account:
        """Both sides in names; refuses what is not balanced, and pieces of rows that there are not."""
        result = check(self.conversion, self.source.infos)
        for piece in self.conversion.pieces:
            for read in piece.reads:
                row_range(read.name, self.source.infos[read.name], read.start, read.stop)
        return result

    def plan(self) -> dict[str, Any]:
        """All that decides the result."""
        digest = hashlib.sha256()
        for piece in self.conversion.pieces:
            digest.update(repr((piece.name, piece.info, piece.reads, piece.row)).encode())
        options = {**self.options, "shard_bytes": self.shard_bytes}
        return {"source": described(self.source.files), "options": options, "plan": digest.hexdigest()}


def run(job: Job) -> dict[str, Any]:
    """Convert, and return the receipt that is in the target, too.

    Raises:
        CheckpointError: where the source, the plan or the target forbid it; nothing is left of it then.
        MismatchError: from ``Job.verify``.
        OSError: where reading or writing fails; a second call continues.
    """
    start_s, origin = time.monotonic(), provenance()
    journal.check_target(job.target)
    account, plan = job.account(), job.plan()
    with journal.opened(job.target, plan) as log:
        entries = _write_parts(job, log)
        if described(job.source.files) != plan["source"]:
            raise CheckpointError(f"{job.source.folder} changed while it was read; begin anew")
        job.writer.finish(log.payload, {path: entry["contents"] for path, entry in entries.items()})
        figures = job.verify(log.payload) if job.verify else None
        receipt = make_receipt(job, account, origin) | {
            "source": {"folder": str(job.source.folder), "files": plan["source"]},
            "files": _files(log.payload, entries),
            "not_finite": dict(sum((Counter(entry["not_finite"]) for entry in entries.values()), Counter())),
            "verified": figures,
            "seconds": round(time.monotonic() - start_s, 1),
        }
        (log.payload / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        log.publish()
    return receipt


def _write_parts(job: Job, log: journal.Journal) -> dict[str, Any]:
    """Write the parts that are not there yet, and return what is noted of each, by its path."""
    parts = job.parts()
    paths = [job.writer.part_path(number, len(parts)) for number in range(len(parts))]
    finished = {number: entry for number, path in enumerate(paths) if (entry := log.finished(number, path))}
    done_bytes = sum(num_bytes(parts[number]) for number in finished)
    total_bytes = num_bytes(job.conversion.pieces)
    _check_disk(job.target.parent, total_bytes - done_bytes, has_begun=bool(finished))
    if finished:
        print(f"continued: {len(finished)} of {len(parts)} files were there already, {in_words(done_bytes)}")
    with progress("convert", total_bytes, done_bytes) as written:
        for number, pieces in enumerate(parts):
            if number in finished:
                continue

            def write(sink: Sink, pieces: Sequence[Piece] = pieces) -> dict[str, Any]:
                not_finite: Counter[str] = Counter()
                contents = job.writer.write_part(sink, pieces, _made(job.source, pieces, not_finite))
                return {"contents": contents, "not_finite": dict(+not_finite)}

            finished[number] = log.write_part(number, paths[number], write, written)
    return {path: finished[number] for number, path in enumerate(paths)}


def num_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes of all these pieces."""
    return sum(piece.info.nbytes for piece in pieces)


def make_receipt(job: Job, account: Account, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is written: both sides in numbers and names, and where all this comes from."""
    infos, by_reason = job.source.infos, dict[str, list[str]]()
    for name, reason in {**job.source.others, **account.dropped}.items():
        by_reason.setdefault(reason, []).append(name)
    expected = job.conversion.expected
    versions = {
        name: importlib.metadata.version(name)
        for name in ("safetensors", "transformers")
        if any(importlib.metadata.distributions(name=name))
    }
    return {
        "format_version": _FORMAT_VERSION,
        "options": dict(job.options),
        "converted": _counted(infos, account.converted),
        "dropped": [
            {"reason": reason, **_counted(infos, names), "names": names} for reason, names in by_reason.items()
        ],
        "carried": sorted(job.conversion.carried),
        "target": {**_counted(expected, expected), "bytes": sum(info.nbytes for info in expected.values())},
        "notes": list(job.conversion.notes),
        **origin,
        "versions": {**origin["versions"], **versions},
    }


def _counted(infos: Mapping[str, TensorInfo], names: Collection[str]) -> dict[str, int]:
    shapes = [infos[name].shape for name in names if name in infos]
    return {"tensors": len(names), "parameters": sum(torch.Size(shape).numel() for shape in shapes)}


def _check_disk(folder: Path, needed: int, *, has_begun: bool) -> None:
    if missing := journal.missing_bytes(folder, needed + needed // 100 + _SPARE_BYTES):
        error = OSError if has_begun else CheckpointError  # what an earlier call has written is kept
        raise error(
            f"{folder} has too little room: {in_words(needed)} are to be written and {in_words(missing)} are missing; "
            "free them or name another disk"
        )


def _made(source: Checkpoint, pieces: Sequence[Piece], not_finite: Counter[str]) -> Iterator[Tensor]:
    """Make one piece after the other; numbers that are not finite are counted by the name of the tensor."""
    for piece in pieces:
        tensor = piece.make(*(source.read(*read) for read in piece.reads)).contiguous()
        found = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if found != piece.info:
            words = (f"{list(info.shape)} {info.dtype_name}" for info in (found, piece.info))
            raise CheckpointError(
                f"{piece.name} came out as {' and should be '.join(words)}; the source is damaged, or the conversion "
                "is wrong"
            )
        not_finite[piece.name] += _num_not_finite(tensor)
        yield tensor
        del tensor  # before the next one is made


def _num_not_finite(tensor: Tensor) -> int:
    if not tensor.dtype.is_floating_point:
        return 0
    count = 0
    for part in tensor.reshape(-1).split(_CHECKED_ELEMENTS):
        wide = part.float() if part.dtype.itemsize == 1 else part
        if not wide.sum(dtype=torch.float64).isfinite():  # one number that is not finite makes the sum so: a fast no
            count += wide.numel() - int(wide.isfinite().sum())
    return count


def _files(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every file of the target with its size and hash, which of parts is known."""
    entries = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECEIPT):
        name = str(path.relative_to(folder))
        digest = parts[name]["sha256"] if name in parts else file_sha256(path)
        entries.append({"path": name, "bytes": path.stat().st_size, "sha256": digest})
    return entries
