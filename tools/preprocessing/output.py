"""The output folder: dataset and manifest in a hidden folder, its one rename, and what an earlier run has left."""
# ruff: noqa: PLC0415 - imported late, so that --help takes a tenth of a second

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from preprocessing.sources import Source, UserError, shown

FORMAT_VERSION = 1
MODEL, DATA, MANIFEST = "tokenizer.model", "text_document", "manifest.json"


# --- earlier results -------------------------------------------------------------------------------------------------


def read_manifest(output: Path) -> dict[str, Any] | None:
    """Return the manifest of an earlier result; None if `output` is new or an empty folder. Raises UserError."""
    if not output.exists() or not any(output.iterdir()):
        return None
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if _is_whole(manifest):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # the refusal below covers them all: this folder is not ours to judge or to replace
    raise UserError(f"--output {shown(output)} is not empty and not a result of this tool; choose another folder")


_OF_ENTRY = {"name": str, "sha256": str, "bytes": int, "mtime_ns": int, "skipped_lines": list, "skipped": object}
_OF_TOTALS = ("files", "documents", "tokens", "inexact_documents")


def _is_whole(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has what is read of it. Raises KeyError, TypeError or AttributeError where a part lacks."""
    inputs = [isinstance(entry[key], kind) for entry in manifest["inputs"] for key, kind in _OF_ENTRY.items()]
    numbers = [entry["bytes"] for entry in manifest["outputs"].values()]
    numbers += [manifest["totals"][key] for key in _OF_TOTALS]
    numbers += [manifest["vocabulary"][key] for key in ("size", "eod_id")]
    are_whole = all(inputs) and all(isinstance(number, int) for number in numbers)
    return are_whole and manifest["format_version"] == FORMAT_VERSION and isinstance(manifest["settings"], dict)


def difference(manifest: dict[str, Any], settings: dict[str, Any], sources: list[Source]) -> str:
    """Return how an earlier result differs from this request in settings or files; '' if equal.

    Contents are compared only where `sources` have been scanned.
    """
    old_settings = manifest["settings"]
    for key in sorted(old_settings.keys() | settings.keys()):
        if old_settings.get(key) != settings.get(key):
            return f"{key} was {old_settings.get(key)}, now {settings.get(key)}"
    for old, new in itertools.zip_longest(manifest["inputs"], sources):
        if old is None or new is None or old["name"] != new.name:
            return f"its input {shown(old['name']) if old else 'ends'}, now {shown(new.name) if new else 'ends'}"
        if old["bytes"] != new.num_bytes:
            return f"{shown(new.name)} had {old['bytes']} bytes, now {new.num_bytes}"
        if new.sha256 and old["sha256"] != new.sha256:
            return f"{shown(new.name)} has other contents now"
    return ""


def is_fresh(manifest: dict[str, Any], sources: list[Source], skip_bad: bool) -> bool:
    """Return whether file times alone show that a scan would find again what it found for `manifest`."""
    was_bad = any(entry["skipped"] or entry["skipped_lines"] for entry in manifest["inputs"])
    same_times = all(entry["mtime_ns"] == new.mtime_ns for entry, new in zip(manifest["inputs"], sources, strict=True))
    return same_times and (skip_bad or not was_bad)


def damage(manifest: dict[str, Any], output: Path) -> str:
    """Return which output file lacks the size that the manifest states; '' if none."""
    for name, expected in manifest["outputs"].items():
        num_bytes = (output / name).stat().st_size if (output / name).is_file() else None
        if num_bytes != expected["bytes"]:
            return f"{name} is damaged: {expected['bytes']} bytes expected, {num_bytes or 'none'} found"
    return ""


def remove_stale(output: Path) -> None:
    """Clean up after killed runs: remove partial folders, give back a folder that was just being replaced."""
    siblings = list(output.parent.iterdir()) if output.parent.is_dir() else []
    for kind in ("partial", "replaced"):
        prefix = beside(output, kind, "").name
        for path in siblings:
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdigit() or Path("/proc", pid).exists():
                continue
            if kind == "replaced" and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path)


# --- writing ---------------------------------------------------------------------------------------------------------


def beside(output: Path, kind: str, pid: int | str) -> Path:
    """Return the path of a hidden sibling of `output`; a process id means nothing without its host."""
    return output.with_name(f".{output.name}.{kind}-{socket.gethostname()}-{pid}")


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `output`; whatever is still there when the block ends is removed."""
    path = beside(output, "partial", os.getpid())
    try:
        path.mkdir(parents=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def write_dataset(
    folder: Path, vocab_size: int, encoded: Iterable[tuple[Path, list[int], list[Source]]]
) -> list[Source]:
    """Write the dataset from what the workers return, remove their files, and return all sources."""
    import numpy

    logging.disable(logging.WARNING)  # Core's imports report missing devices and extras, which do not matter here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    logging.disable(logging.NOTSET)
    builder = IndexedDatasetBuilder(str(folder / f"{DATA}.bin"), dtype=DType.optimal_dtype(vocab_size))
    written: list[Source] = []
    for path, lengths, sources in encoded:
        with path.open("rb") as ids:
            for length in lengths:
                builder.add_document(numpy.frombuffer(ids.read(4 * length), numpy.int32), [length])
        path.unlink()
        written += sources
    builder.finalize(str(folder / f"{DATA}.idx"))
    return written


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path, settings: dict[str, Any], sources: list[Source], vocabulary: dict[str, int]
) -> dict[str, Any]:
    """Write and return the manifest. It names no host and no time of the run: equal input gives equal bytes."""
    inputs = [_entry(source) for source in sources]
    keys = ("documents", "tokens", "bytes", "inexact_documents")
    totals = {key: sum(entry[key] for entry in inputs if not entry["skipped"]) for key in keys}
    totals["files"] = sum(not entry["skipped"] for entry in inputs)
    totals["skipped_files"] = len(inputs) - totals["files"]
    totals["skipped_lines"] = sum(len(entry["skipped_lines"]) for entry in inputs)
    paths = [folder / name for name in (MODEL, DATA + ".bin", DATA + ".idx")]
    outputs = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
    manifest = {"format_version": FORMAT_VERSION, "settings": settings, "vocabulary": vocabulary, "totals": totals}
    manifest |= {"outputs": outputs, "inputs": inputs}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _entry(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "bytes": source.num_bytes,
        "mtime_ns": source.mtime_ns,
        "sha256": source.sha256,
        "documents": source.num_documents,
        "tokens": source.num_tokens,
        "inexact_documents": source.num_inexact,
        "skipped": source.problem,
        "skipped_lines": source.bad_lines,
    }


def publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Give the finished folder its name. With `overwrite` an older result is moved aside first and removed last.

    Raises OSError if `output` has appeared since the start and is not to be overwritten.
    """
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # else a power cut could leave the name without the bytes
        os.close(descriptor)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # from here on "was not written" would be a lie
    replaced = beside(output, "replaced", os.getpid())
    if overwrite and output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
