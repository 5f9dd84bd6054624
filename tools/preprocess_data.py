#!/usr/bin/env python3
"""Turn text or JSONL files into a SentencePiece tokenizer and a Megatron-Core indexed dataset.

Flow: list the input files -> scan (hash and check every byte) -> train or copy the tokenizer -> encode -> rename.
Nothing is written before the scan has passed. All output goes to a hidden folder beside --output and appears under
its own name by one rename, so a killed run leaves nothing that looks finished. Only the standard library is imported
at the top: --help and refusals stay fast, and the spawned workers never load torch.
"""
# ruff: noqa: PLC0415 - the late imports are the reason why --help takes a tenth of a second

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import stat
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MODEL, DATA, MANIFEST = "tokenizer.model", "text_document", "manifest.json"
SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
SKIPPED_FOLDERS = ("__pycache__", "site-packages", "dist-packages")
STDLIB_TESTS = ("test", "tests", "idle_test")  # some of these files are not UTF-8 on purpose
TASK_BYTES, TASK_FILES = 1 << 20, 256  # one unit of work of a worker; files are never split
TRAIN_THREADS = 2  # a constant: it is stored in the model file and decides the order of float sums
LINE_INTERVAL_S = 5.0  # seconds between progress lines when stderr is no terminal
EPILOG = """\
examples:
  # the Python standard library of this machine: 11 MB of text, half a minute
  preprocess_data.py --input stdlib --output data/stdlib

  # a folder of notes and two JSONL files, 8 processes, a vocabulary of 8192
  preprocess_data.py --input notes a.jsonl b.jsonl --output data/mine --vocab-size 8192 --workers 8

  # more text for a model that exists: its tokenizer, another JSON key, bad files named and left out
  preprocess_data.py --input new.jsonl --output data/new --tokenizer-model data/mine/tokenizer.model \\
      --json-key content --skip-bad

then train with:
  --tokenizer-type SentencePieceTokenizer --tokenizer-model data/mine/tokenizer.model \\
  --data-path data/mine/text_document --split 99,1,0

Exit codes: 0 done (or done before), 1 unexpected failure, 2 bad input or request, 130 / 143 stopped by a signal.
"""


class UserError(Exception):
    """Bad input or request. The message is one line that names the value and the fix; the exit code is 2."""


@dataclass(frozen=True)
class Source:
    """One input file. `name` is how reports and the manifest call it; `problem` is why it cannot even be opened."""

    name: str
    path: Path
    num_bytes: int = 0
    mtime_ns: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """What the scan found in one source: `bad_lines` holds (line number, reason); `problem` rules out all of it."""

    sha256: str
    num_documents: int
    bad_lines: tuple[tuple[int, str], ...]
    problem: str | None


@dataclass(frozen=True)
class Job:
    """What every worker of one stage knows, sent once, so that a task is only a range of indices into `sources`."""

    sources: list[Source]
    json_key: str
    folder: Path = Path()
    sha256s: tuple[str, ...] = ()


_worker_job: Job  # set once in each worker process by _start_worker


# --- reading ---------------------------------------------------------------------------------------------------------


def shown(path: Path | str) -> str:
    """Return `path` such that it stays on one line and can be printed anywhere."""
    name = str(path)
    return name if name.isprintable() and name.isascii() else ascii(name)


def _parse_record(raw: bytes, json_key: str | None) -> str:
    """Return the text of one record (a JSONL line, or a whole file if `json_key` is None), or raise ValueError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        where = f"byte 0x{raw[exc.start]:02x} at offset {exc.start}"
        raise ValueError(f"not UTF-8 ({where}); convert it with iconv") from exc
    if json_key is not None:
        try:
            record = json.loads(text)
        except json.JSONDecodeError as exc:
            where = f"{exc.msg} at column {exc.colno}"
            raise ValueError(f"not valid JSON ({where}); one object per line is needed") from exc
        except RecursionError as exc:
            raise ValueError("not usable JSON (nested too deeply)") from exc
        if not isinstance(record, dict):
            raise ValueError(f"a JSON {type(record).__name__}, not an object")
        if not isinstance(record.get(json_key), str):
            what = "no key" if json_key not in record else "no text under key"
            raise ValueError(f"{what} {json_key!a}; set --json-key (keys: {', '.join(map(ascii, record)) or 'none'})")
        text = record[json_key]
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError("a lone surrogate such as \\ud800, which is no UTF-8 text")
    if not text.strip():
        raise ValueError("empty")
    return text


def iter_documents(source: Source, json_key: str, digest: Any, bad_lines: list[tuple[int, str]]) -> Iterator[str]:
    """Yield the documents of `source`, feed each byte to `digest`, append what is bad. Raises OSError.

    Blank lines of a JSONL file are no records and no error. The line number of a text file is 0.
    """
    is_jsonl = source.name.lower().endswith((".jsonl", ".json"))
    with source.path.open("rb") as file:
        records = enumerate(file, 1) if is_jsonl else [(0, file.read())]
        for line, read in records:
            digest.update(read)
            raw = read.removeprefix(codecs.BOM_UTF8) if is_jsonl and line == 1 else read
            if is_jsonl and not raw.strip():
                continue
            try:
                text = _parse_record(raw, json_key if is_jsonl else None)
            except ValueError as exc:
                bad_lines.append((line, str(exc)))
            else:
                yield text


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
    found: list[Source] = []
    errors: list[OSError] = []
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
    """Return every file that the --input words name, each once, in the order of the words. Raises UserError."""
    sources: list[Source] = []
    first_names: dict[Path, str] = {}
    for word in words:
        path = Path(word)
        listed = _walk(word, suffixes) if word == "stdlib" or path.is_dir() else [_make_source(word, path)]
        for source in listed:
            first = first_names.get(real := Path(os.path.realpath(source.path)))  # resolve() raises on a link loop
            first_names.setdefault(real, source.name)
            twice = None if first is None else f"the same file as {shown(first)}; name it once"
            sources.append(replace(source, problem=source.problem or twice))
    return sources


# --- work of the worker processes ------------------------------------------------------------------------------------


def _start_worker(job: Job) -> None:
    global _worker_job  # noqa: PLW0603 - the one thing that a process pool can give its workers ahead
    _worker_job = job
    # A killed parent cannot tell its workers to stop, and they would wait for tasks for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def scan_range(start: int, stop: int) -> list[Report]:
    """Read sources[start:stop] completely and report hash, document count and everything that is bad."""
    return [_scan(source, _worker_job.json_key) for source in _worker_job.sources[start:stop]]


def _scan(source: Source, json_key: str) -> Report:
    bad_lines: list[tuple[int, str]] = []
    digest, count, problem = hashlib.sha256(), 0, source.problem
    if problem is None:
        try:
            count = sum(1 for _ in iter_documents(source, json_key, digest, bad_lines))
        except OSError as exc:
            problem = f"cannot be read ({exc.strerror})"
        else:
            problem = None if count else describe_lines(bad_lines) or "empty"
    return Report(digest.hexdigest(), count, tuple(bad_lines), problem)


def describe_lines(bad_lines: list[tuple[int, str]] | tuple[tuple[int, str], ...]) -> str:
    """Return the first bad line and the number of others as one phrase; '' if there is none."""
    if not bad_lines:
        return ""
    line, reason = bad_lines[0]
    more = f" (and {len(bad_lines) - 1} more bad lines)" if len(bad_lines) > 1 else ""
    return (f"line {line}: " if line else "") + reason + more


def _training_lines(job: Job, max_chars: int) -> Iterator[str]:
    """Yield lines from the head of every file, in proportion to its size, about `max_chars` in total."""
    total = sum(source.num_bytes for source in job.sources)
    for source in job.sources:
        left = max(1, source.num_bytes * max_chars // total)
        for text in iter_documents(source, job.json_key, hashlib.sha256(), []):
            yield from (line for line in text[:left].split("\n") if line.strip())
            left -= len(text)
            if left <= 0:
                break


def train_tokenizer(vocab_size: int, model_type: str, max_chars: int) -> None:
    """Train on `sources` and write the model into `folder`; the same text gives the same bytes. Raises UserError.

    Identity normalization, byte fallback and kept white space make decode(encode(text)) == text for all UTF-8 text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(_worker_job, max_chars),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=TRAIN_THREADS,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,  # indentation becomes one token
            split_digits=True,
            user_defined_symbols=["\n", "\t"],  # lines are trained one by one, so no piece may span them
            pad_id=3,  # own id: Core masks the loss where a label is the padding id
            max_sentence_length=1 << 24,
            minloglevel=2,
        )
    except RuntimeError as exc:
        reason = str(exc).rpartition("] ")[2] or "no usable line"
        fix = "change it or give more text"
        raise UserError(f"--vocab-size {vocab_size} does not suit the text ({reason}); {fix}") from exc
    (_worker_job.folder / MODEL).write_bytes(_keep_u2581(model.getvalue()))


def _keep_u2581(model: bytes) -> bytes:
    """Return the model with plain spaces in its pieces, so that a literal U+2581 in a text survives.

    SentencePiece writes a space as U+2581 and turns both into a space when it decodes. Without that escape the pieces
    match spaces directly, U+2581 goes through byte fallback, and every other text keeps its ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
    return proto.SerializeToString(deterministic=True)


@functools.cache
def _load_tokenizer(path: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def encode_range(start: int, stop: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Write the ids of sources[start:stop] as int32 to a shard; each document ends with the EOD id.

    Returns the length of every document in tokens, and per source (tokens, documents that do not decode to the
    original). Raises UserError if a file is not what the scan saw.
    """
    import numpy

    job, lengths, per_source = _worker_job, [], []
    tokenizer = _load_tokenizer(job.folder / MODEL)
    eod = tokenizer.eos_id()
    with shard_path(job.folder, start).open("wb") as shard:
        for source, sha256 in zip(job.sources[start:stop], job.sha256s[start:stop], strict=True):
            digest = hashlib.sha256()
            num_tokens = num_inexact = 0
            for text in iter_documents(source, job.json_key, digest, []):
                ids = tokenizer.encode(text)
                num_inexact += int(eod in ids or tokenizer.decode(ids) != text)
                ids.append(eod)
                shard.write(numpy.array(ids, dtype=numpy.int32).tobytes())
                lengths.append(len(ids))
                num_tokens += len(ids)
            if digest.hexdigest() != sha256:
                raise UserError(f"{shown(source.name)} changed while it was read; run again when it is complete")
            per_source.append((num_tokens, num_inexact))
    return lengths, per_source


def shard_path(folder: Path, start: int) -> Path:
    """Return the path of the temporary ids of the task that starts at source `start`."""
    return folder / f"shard-{start}.ids"


# --- running the workers ---------------------------------------------------------------------------------------------


def plan_tasks(sources: list[Source]) -> tuple[list[tuple[int, int]], list[int]]:
    """Group neighbouring sources into ranges (start, stop) of about TASK_BYTES; also return the bytes of each."""
    ranges, weights, start = [], [], 0
    for stop in range(1, len(sources) + 1):
        num_bytes = sum(source.num_bytes for source in sources[start:stop])
        if num_bytes >= TASK_BYTES or stop - start >= TASK_FILES or stop == len(sources):
            ranges.append((start, stop))
            weights.append(num_bytes)
            start = stop
    return ranges, weights


@contextlib.contextmanager
def worker_pool(num_workers: int, job: Job) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes that know `job`; they are killed if the block fails."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Future[Any]]:
    """Start `function(*task)` for every task. Workers inherit a blocked SIGINT: Ctrl-C is the parent's to handle."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(function, *task) for task in tasks]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def collect(label: str, futures: list[Future[Any]], weights: list[int]) -> Iterator[Any]:
    """Yield the results in order and show how many of the `weights` (bytes) are done."""
    with progress(label, sum(weights)) as show:
        last_s = time.monotonic()
        for future in futures:
            while not future.done():
                wait([future], timeout=0.2)
                if time.monotonic() - last_s >= 0.2:
                    show(sum(weight for weight, other in zip(weights, futures, strict=True) if other.done()))
                    last_s = time.monotonic()
            yield future.result()


@contextlib.contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes done: a bar on a terminal, else a line every LINE_INTERVAL_S seconds.

    `total_bytes` 0 means that the amount of work is not known; then only the elapsed time is shown.
    """
    if sys.stderr.isatty():
        from rich import console
        from rich import progress as rich

        columns = (rich.TextColumn("{task.description:16}"), rich.BarColumn(), rich.TaskProgressColumn())
        times = (rich.TimeElapsedColumn(), "ETA", rich.TimeRemainingColumn())
        with rich.Progress(*columns, *times, console=console.Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total_bytes or None)
            yield lambda done: bar.update(task, completed=done)
            bar.update(task, total=total_bytes or 1, completed=total_bytes or 1)
        return
    start_s = last_s = time.monotonic()

    def show(done_bytes: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= LINE_INTERVAL_S:
            last_s, elapsed_s = now_s, now_s - start_s
            eta = f"{elapsed_s * (total_bytes - done_bytes) / done_bytes:.0f} s" if done_bytes else "unknown"
            share = f"{done_bytes / total_bytes:.0%}, " if total_bytes else ""
            print(f"{label}: {share}{elapsed_s:.0f} s so far, ETA {eta}", file=sys.stderr, flush=True)

    yield show


# --- request and earlier results -------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Say it in one line: argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!a} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Turn text or JSONL files into a SentencePiece tokenizer and a Megatron-Core indexed dataset."
    parser = _Parser("preprocess_data.py", description=about, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (one document each), .jsonl or .json"
        " files (one object per line), folders (searched; hidden folders and links to folders are not), or the word"
        " 'stdlib': the Python standard library's own source without its tests",
    )
    add("--output", required=True, metavar="DIR", help=f"new folder for {MODEL}, {DATA}.bin and .idx, {MANIFEST}")
    add("--tokenizer-model", metavar="FILE", help="use this SentencePiece model instead of training one")
    add("--vocab-size", type=_number(300, 1_000_000), metavar="N", help="vocabulary to train (default 4096)")
    add("--model-type", choices=("bpe", "unigram"), help="kind of model to train (default bpe; unigram is 20x slower)")
    add(
        "--train-mib",
        type=_number(1, 10_000),
        metavar="N",
        help="train on about this much text, from the head of each file by its size (default 16, unigram 4)",
    )
    add("--json-key", default="text", metavar="KEY", help="the key of the text in JSON objects (default text)")
    add(
        "--suffix",
        nargs="+",
        default=list(SUFFIXES),
        metavar=".S",
        help=f"which files of a folder are read, in any case (default {' '.join(SUFFIXES)})",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out bad files and bad JSONL lines; each is named, also in the"
        " manifest (default: refuse and write nothing)",
    )
    add(
        "--workers",
        type=_number(1, 1024),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes; each file is read by one (default: %(default)s, the CPUs); the output does not depend on it",
    )
    add("--overwrite", action="store_true", help="replace a folder that an earlier run made")
    return parser


def make_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Check the tokenizer options and return the settings that decide the result. Raises UserError."""
    options = {"vocab_size": args.vocab_size, "model_type": args.model_type, "train_mib": args.train_mib}
    if args.tokenizer_model is None:
        defaults = {"vocab_size": 4096, "model_type": "bpe", "train_mib": 4 if args.model_type == "unigram" else 16}
        return {key: options[key] or defaults[key] for key in options} | {"json_key": args.json_key}
    for key, value in options.items():
        if value is not None:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {value} only matters for training; drop it or drop --tokenizer-model")
    name = shown(args.tokenizer_model)
    try:
        sha256 = file_sha256(Path(args.tokenizer_model))
        eos_id = _load_tokenizer(Path(args.tokenizer_model)).eos_id()
    except OSError as exc:
        raise UserError(f"--tokenizer-model {name}: cannot be read ({exc.strerror}); check the path") from exc
    except RuntimeError as exc:
        raise UserError(f"--tokenizer-model {name}: not a SentencePiece model; give a .model file") from exc
    if eos_id < 0:
        raise UserError(f"--tokenizer-model {name}: it has no end-of-sentence id to end documents; train with eos_id")
    return {"tokenizer_sha256": sha256, "json_key": args.json_key}


def check_request(args: argparse.Namespace) -> Path:
    """Return the real path of --output, or raise UserError if work could not succeed."""
    output = Path(os.path.realpath(args.output))
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {shown(args.output)}: {shown(output.parent)} is no writable folder; create it")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {shown(args.output)} is a file; name a new folder")
    for word in args.input:
        path = Path(os.path.realpath(word))
        if word != "stdlib" and (path.is_relative_to(output) or output.is_relative_to(path)):
            raise UserError(f"--output {shown(args.output)} and --input {shown(word)} contain each other; part them")
    for suffix in args.suffix:
        if not suffix.startswith(".") or len(suffix) < 2:
            raise UserError(f"--suffix {shown(suffix)} does not start with a dot; write .{shown(suffix).lstrip('.')}")
    needed = {"sentencepiece": "sentencepiece", "megatron.core": "megatron-core", "google.protobuf": "protobuf"}
    for module, package in needed.items():
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise UserError(f"the Python package {package} is missing; pip install {package}")
    return output


def read_manifest(output: Path) -> dict[str, Any] | None:
    """Return the manifest of an earlier result; None if `output` is new or an empty folder. Raises UserError."""
    if not output.exists() or not any(output.iterdir()):
        return None
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] == FORMAT_VERSION:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the refusal below covers them all: this folder is not ours to judge or to replace
    raise UserError(f"--output {shown(output)} is not empty and not a result of this tool; choose another folder")


def difference(manifest: dict[str, Any], settings: dict[str, Any], sources: list[Source]) -> str:
    """Return how an earlier result differs from this request in settings, names or sizes of files; '' if equal."""
    old_settings = manifest["settings"]
    for key in sorted(old_settings.keys() | settings.keys()):
        if old_settings.get(key) != settings.get(key):
            return f"{key} was {old_settings.get(key)}, now {settings.get(key)}"
    for old, new in itertools.zip_longest(manifest["inputs"], sources):
        if old is None or new is None or old["name"] != new.name:
            return f"its input {shown(old['name']) if old else 'ends'}, now {shown(new.name) if new else 'ends'}"
        if old["bytes"] != new.num_bytes:
            return f"{shown(new.name)} had {old['bytes']} bytes, now {new.num_bytes}"
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


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def _beside(output: Path, kind: str, pid: int | str) -> Path:
    """Return the path of a hidden sibling of `output`; a process id means nothing without its host."""
    return output.with_name(f".{output.name}.{kind}-{socket.gethostname()}-{pid}")


def remove_stale(output: Path) -> None:
    """Clean up after killed runs: remove partial folders, give back a folder that was just being replaced."""
    for kind in ("partial", "replaced"):
        prefix = _beside(output, kind, "").name
        for path in list(output.parent.iterdir()):
            pid = path.name.removeprefix(prefix)
            if not path.name.startswith(prefix) or not pid.isdigit() or _is_alive(int(pid)):
                continue
            if kind == "replaced" and not output.exists():
                path.rename(output)
            else:
                shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        pass
    return True


@contextlib.contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside `output`; whatever is still there when the block ends is removed."""
    path = _beside(output, "partial", os.getpid())
    try:
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


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
    replaced = _beside(output, "replaced", os.getpid())
    if overwrite and output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def write_dataset(pool: ProcessPoolExecutor, job: Job, vocab_size: int) -> list[tuple[int, int]]:
    """Encode all sources of `job` into its folder; return per source (tokens, inexact documents)."""
    import numpy

    ranges, weights = plan_tasks(job.sources)
    futures = submit(pool, encode_range, ranges)
    prefix = str(job.folder / DATA)
    builder: Any = None
    counts: list[tuple[int, int]] = []
    for (start, _), (lengths, per_source) in zip(ranges, collect("encode", futures, weights), strict=True):
        if builder is None:  # not earlier: the import takes seconds, in which the workers encode
            builder = _open_builder(prefix + ".bin", vocab_size)
        shard = numpy.memmap(shard_path(job.folder, start), dtype=numpy.int32, mode="r")
        offset = 0
        for length in lengths:
            builder.add_document(shard[offset : offset + length], [length])
            offset += length
        shard_path(job.folder, start).unlink()
        counts += per_source
    builder.finalize(prefix + ".idx")
    return counts


def _open_builder(path: str, vocab_size: int) -> Any:
    logging.disable(logging.WARNING)  # Core's imports report missing devices and extras, which do not matter here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    logging.disable(logging.NOTSET)
    return IndexedDatasetBuilder(path, dtype=DType.optimal_dtype(vocab_size))


def write_manifest(
    folder: Path, settings: dict[str, Any], inputs: list[dict[str, Any]], vocabulary: dict[str, int]
) -> dict[str, Any]:
    """Write and return the manifest. It names no time, host or worker count: equal input gives equal bytes."""
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


# --- the run ---------------------------------------------------------------------------------------------------------


def scan(sources: list[Source], args: argparse.Namespace) -> list[Report]:
    """Scan everything and name each bad file on stderr. Raises UserError unless what is left may be used."""
    ranges, weights = plan_tasks(sources)
    with worker_pool(args.workers, Job(sources, args.json_key)) as pool:
        reports = [r for part in collect("scan", submit(pool, scan_range, ranges), weights) for r in part]
    num_bad = 0
    for source, report in zip(sources, reports, strict=True):
        problem = report.problem or describe_lines(report.bad_lines)
        if problem:
            num_bad += 1
            print(f"{'skipped' if args.skip_bad else 'bad'}: {shown(source.name)}: {problem}", file=sys.stderr)
    if all(report.problem for report in reports):
        raise UserError(f"all {len(sources)} input files are bad, so there is nothing to write; mend them")
    if num_bad and not args.skip_bad:
        raise UserError(f"{num_bad} of {len(sources)} input files are bad; mend them or add --skip-bad")
    return reports


def build(
    args: argparse.Namespace, output: Path, settings: dict[str, Any], sources: list[Source], reports: list[Report]
) -> dict[str, Any]:
    """Make the tokenizer and the dataset in a partial folder, publish it, and return its manifest."""
    good = [index for index, report in enumerate(reports) if report.problem is None]
    shas = tuple(reports[index].sha256 for index in good)
    with partial_folder(output) as folder:
        job = Job([sources[index] for index in good], args.json_key, folder, shas)
        with worker_pool(args.workers, job) as pool:
            if args.tokenizer_model is None:
                task = (settings["vocab_size"], settings["model_type"], settings["train_mib"] << 20)
                list(collect("train tokenizer", submit(pool, train_tokenizer, [task]), [0]))
            else:
                shutil.copyfile(args.tokenizer_model, folder / MODEL)
            tokenizer = _load_tokenizer(folder / MODEL)
            vocabulary = {"size": tokenizer.get_piece_size(), "eod_id": tokenizer.eos_id()}
            counts = dict(zip(good, write_dataset(pool, job, vocabulary["size"]), strict=True))
        inputs = []
        for index, (source, report) in enumerate(zip(sources, reports, strict=True)):
            num_tokens, num_inexact = counts.get(index, (0, 0))
            inputs.append(
                {
                    "name": source.name,
                    "bytes": source.num_bytes,
                    "mtime_ns": source.mtime_ns,
                    "sha256": report.sha256,
                    "documents": report.num_documents,
                    "tokens": num_tokens,
                    "inexact_documents": num_inexact,
                    "skipped": report.problem,
                    "skipped_lines": report.bad_lines,
                }
            )
        manifest = write_manifest(folder, settings, inputs, vocabulary)
        publish(folder, output, overwrite=args.overwrite)
    return manifest


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks. Raises UserError."""
    output = check_request(args)
    settings = make_settings(args)
    sources = list_sources(args.input, tuple(suffix.lower() for suffix in args.suffix))
    remove_stale(output)
    old = read_manifest(output)
    if old is None or args.overwrite:
        reports = scan(sources, args)
        summarize("done", output, build(args, output, settings, sources, reports))
        return
    reason = difference(old, settings, sources) or damage(old, output)
    if not reason and not is_fresh(old, sources, args.skip_bad):
        reports = scan(sources, args)
        pairs = zip(old["inputs"], reports, strict=True)
        reason = next((f"{shown(e['name'])} has other contents now" for e, r in pairs if e["sha256"] != r.sha256), "")
    if reason:
        raise UserError(f"--output {shown(output)} holds another result ({reason}); choose another, or add --overwrite")
    summarize("already done", output, old)


def summarize(outcome: str, output: Path, manifest: dict[str, Any]) -> None:
    """Print what the folder holds and how Megatron must be told to use it."""
    totals, vocabulary = manifest["totals"], manifest["vocabulary"]
    print(
        f"{outcome}: {shown(output)}: {totals['files']} files, {totals['documents']} documents, {totals['tokens']}"
        f" tokens, vocabulary {vocabulary['size']}, end-of-document id {vocabulary['eod_id']}"
    )
    if totals["inexact_documents"]:
        print(f"note: {totals['inexact_documents']} documents do not decode to their exact text with this tokenizer")
    print(
        f"use it with: --tokenizer-type SentencePieceTokenizer --tokenizer-model {shown(output / MODEL)}"
        f" --data-path {shown(output / DATA)}"
    )


def _stop(number: int, _frame: Any) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # the clean-up runs once and to its end
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    args = make_parser().parse_args(argv)
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(args)
    except UserError as exc:
        code, message = 2, f"{exc}"
    except KeyboardInterrupt as exc:
        number = exc.args[0] if exc.args else signal.SIGINT
        code, message = 128 + number, f"stopped by {signal.Signals(number).name}; {args.output} was not written"
    except BrokenProcessPool:
        code, message = 1, f"a worker process died (out of memory?); try --workers below {args.workers}"
    except OSError as exc:
        code, message = 1, f"{exc}; {args.output} was not written"
    else:
        return 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    print(f"preprocess_data.py: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
