"""The input files: which there are, the documents in them, and what is wrong with them."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from command_line import UserError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json")
SUFFIXES = (".txt", ".md", ".rst", ".py", *JSON_LINES[:-1])
_GZIP = b"\x1f\x8b"
SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages")
STDLIB_TESTS = ("test", "tests", "idle_test")  # some of these files are not UTF-8 on purpose

BadLines = list[tuple[int, str]]  # (line number, reason); the number is 0 for a text file as a whole


@dataclass(frozen=True)
class Source:
    """One input file and what each stage found out about it; `problem` is why nothing of it can be used."""

    name: str  # what reports and the manifest call it
    path: Path
    num_bytes: int = 0
    mtime_ns: int = 0
    problem: str | None = None
    # Known after the scan.
    sha256: str = ""
    num_documents: int = 0
    bad_lines: tuple[tuple[int, str], ...] = ()
    # Known after encoding.
    num_tokens: int = 0
    num_inexact: int = 0


@dataclass(frozen=True)
class Reading:
    """How a file becomes documents: the key of the text in a JSON object, and where to cut a text file (0: nowhere)."""

    json_key: str
    document_kib: int


def shown(path: Path | str) -> str:
    """Return `path` such that it stays on one line and can be printed anywhere."""
    name = str(path)
    return name if name.isprintable() and name.isascii() else ascii(name)


# --- finding ---------------------------------------------------------------------------------------------------------


def _make_source(name: str, path: Path) -> Source:
    try:
        info = path.stat()
    except OSError as exc:
        return Source(name, path, problem=f"cannot be read ({exc.strerror})")
    problem = None if stat.S_ISREG(info.st_mode) else "cannot be read (not a regular file)"  # opening a FIFO blocks
    return Source(name, path, info.st_size, info.st_mtime_ns, problem)


def _walk(word: str, suffixes: tuple[str, ...]) -> list[Source]:
    """Return the files of the folder `word`, or of the standard library, sorted by name."""
    is_stdlib = word == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"] if is_stdlib else word)
    suffixes, skipped = ((".py",), SKIPPED_FOLDERS + STDLIB_TESTS) if is_stdlib else (suffixes, SKIPPED_FOLDERS)
    errors: list[OSError] = []
    found: list[Source] = []
    for folder, folders, files in root.walk(on_error=errors.append):  # links to folders are not followed: no loops
        folders[:] = [f for f in folders if f not in skipped and not f.startswith(".")]
        for path in (folder / f for f in files if f.lower().endswith(suffixes)):
            found.append(_make_source(str(Path(word) / path.relative_to(root)), path))
    found += [Source(e.filename, Path(e.filename), problem=f"cannot be read ({e.strerror})") for e in errors]
    if is_stdlib:  # empty __init__.py files are normal there
        found = [source for source in found if source.num_bytes > 0]
    if not found:
        raise UserError(f"--input {shown(word)}: no file in it ends in {' '.join(suffixes)}; name others with --suffix")
    return sorted(found, key=lambda source: source.name)


def list_sources(words: list[str], suffixes: tuple[str, ...]) -> list[Source]:
    """Return every file that the --input words name, in the order of the words. Raises UserError.

    A file that is named again, under whatever name, is listed with a problem.
    """
    sources: list[Source] = []
    first_names: dict[str, str] = {}
    for word in words:
        is_folder = word == "stdlib" or Path(word).is_dir()
        for source in _walk(word, suffixes) if is_folder else [_make_source(word, Path(word))]:
            first = first_names.get(real := os.path.realpath(source.path))  # Path.resolve() raises on a link loop
            first_names.setdefault(real, source.name)
            twice = None if first is None else f"the same file as {shown(first)}; name it once"
            sources.append(replace(source, problem=source.problem or twice))
    return sources


# --- reading ---------------------------------------------------------------------------------------------------------


def _parse_record(raw: bytes, json_key: str | None) -> str:
    """Return the text of one record (a JSONL line, or a whole file if `json_key` is None), or raise ValueError."""
    if raw.startswith(_GZIP):
        raise ValueError("compressed by gzip; unpack it with gunzip")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        where = f"byte 0x{raw[exc.start]:02x} at offset {exc.start}"
        raise ValueError(f"not UTF-8 ({where}); convert it with iconv") from exc
    if json_key is not None:
        text = _text_of_object(text, json_key)
    if not text.strip():
        raise ValueError("empty")
    return text


def _text_of_object(line: str, json_key: str) -> str:
    try:
        record = json.loads(line, parse_int=float)  # of numbers, which nobody reads, int() refuses long ones
    except json.JSONDecodeError as exc:
        where = f"{exc.msg} at column {exc.colno}"
        raise ValueError(f"not valid JSON ({where}); one object per line is needed") from exc
    except RecursionError as exc:
        raise ValueError("not usable JSON (nested too deeply)") from exc
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    text = record.get(json_key)
    if not isinstance(text, str):
        what = "no key" if json_key not in record else "no text under key"
        raise ValueError(f"{what} {json_key!a}; set --json-key (keys: {', '.join(map(ascii, record)) or 'none'})")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError("a lone surrogate such as \\ud800, which is no UTF-8 text") from exc
    return text


def cut(text: str, max_bytes: int) -> Iterator[str]:
    """Cut `text` at line ends into parts of at most `max_bytes` of UTF-8; a longer line is a part of its own.

    The parts in order are the text. `max_bytes` 0 does not cut.
    """
    if not max_bytes:
        yield text
        return
    part: list[str] = []
    num_bytes = 0
    for line in io.StringIO(text, newline="\n"):  # splitlines() would cut at U+2028 and form feeds, too
        line_bytes = len(line.encode())
        if part and num_bytes + line_bytes > max_bytes:
            yield "".join(part)
            part, num_bytes = [], 0
        part.append(line)
        num_bytes += line_bytes
    if part:
        yield "".join(part)


def iter_documents(source: Source, reading: Reading, digest: Any, bad_lines: BadLines) -> Iterator[str]:
    """Yield the documents of `source`, feed each byte to `digest`, append what is bad. Raises OSError.

    Blank lines of a JSONL file are no records and no error.
    """
    is_jsonl = source.name.lower().endswith(JSON_LINES)
    with source.path.open("rb") as file:
        for line, raw in enumerate(file, 1) if is_jsonl else [(0, file.read())]:
            digest.update(raw)
            record = raw.removeprefix(codecs.BOM_UTF8) if line <= 1 else raw  # it is no text, but says what follows
            if is_jsonl and not record.strip():
                continue
            try:
                text = _parse_record(record, reading.json_key if is_jsonl else None)
            except ValueError as exc:
                bad_lines.append((line, str(exc)))
            else:
                yield from [text] if is_jsonl else cut(text, reading.document_kib << 10)


def scan_files(sources: list[Source], reading: Reading) -> list[Source]:
    """Read all files to their ends and return them with hash, document count and everything that is bad."""
    return [source if source.problem else _scan(source, reading) for source in sources]


def _scan(source: Source, reading: Reading) -> Source:
    bad_lines: BadLines = []
    digest, count = hashlib.sha256(), 0
    try:
        count = sum(1 for _ in iter_documents(source, reading, digest, bad_lines))
        problem = None if count else describe_lines(bad_lines) or "empty"
    except OSError as exc:
        problem = f"cannot be read ({exc.strerror})"
    found = tuple(bad_lines)
    return replace(source, sha256=digest.hexdigest(), num_documents=count, bad_lines=found, problem=problem)


def describe_lines(bad_lines: BadLines | tuple[tuple[int, str], ...]) -> str:
    """Return the first bad line and the number of others as one phrase; '' if there is none."""
    if not bad_lines:
        return ""
    line, reason = bad_lines[0]
    more = f" (and {len(bad_lines) - 1} more bad lines)" if len(bad_lines) > 1 else ""
    return (f"line {line}: " if line else "") + reason + more
