#!/usr/bin/env python3
"""Turn text or JSONL files into a SentencePiece tokenizer and a Megatron-Core indexed dataset.

Flow: list the input files -> scan (hash and check every byte) -> train or copy the tokenizer -> encode -> rename.
Nothing is written before the scan has passed. All output goes to a hidden folder beside --output and appears under
its own name by one rename, so a killed run leaves nothing that looks finished. Only the standard library is imported
at the top, here and in preprocessing/: --help and refusals stay fast, and the spawned workers never load torch.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import importlib.util
import os
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import atomic
from command_line import Parser, UserError, one_line, stoppable, stopped_by, whole
from preprocessing import encoding, output, sources, workers
from preprocessing.output import DATA, MANIFEST, MODEL
from preprocessing.sources import SUFFIXES, Reading, Source, shown

EPILOG = """\
examples:
  # the Python standard library of this machine: 11 MB of text, half a minute
  preprocess_data.py --input stdlib --output data/stdlib

  # a folder of notes and two JSONL files, 8 processes, a vocabulary of 8192
  preprocess_data.py --input notes a.jsonl b.jsonl --output data/mine --vocab-size 8192 --workers 8

  # more text for a model that exists: its tokenizer, another JSON key, bad files named and left out
  preprocess_data.py --input new.jsonl --output data/new --tokenizer-model data/mine/tokenizer.model \\
      --json-key content --skip-bad

  # one large file: Megatron sets whole documents aside for validation, so it needs many
  preprocess_data.py --input book.txt --output data/book --document-kib 64

then train with:
  --tokenizer-type SentencePieceTokenizer --tokenizer-model data/mine/tokenizer.model \\
  --data-path data/mine/text_document --split 99,1,0

Exit codes: 0 done (or done before), 1 unexpected failure, 2 bad input or request, 130 / 143 stopped by a signal.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    about = "Turn text or JSONL files into a SentencePiece tokenizer and a Megatron-Core indexed dataset."
    parser = Parser("preprocess_data.py", description=about, epilog=EPILOG)
    add = parser.add_argument
    words = (
        "text files (one document each), .jsonl, .ndjson, .jsonlines or .json files (one object per line), folders "
        "(searched; hidden folders and links to folders are not), or the word 'stdlib': the Python standard library's "
        "source without its tests"
    )
    add("--input", nargs="+", required=True, metavar="PATH", help=words)
    add("--output", required=True, metavar="DIR", help=f"new folder for {MODEL}, {DATA}.bin and .idx, {MANIFEST}")
    add("--tokenizer-model", metavar="FILE", help="use this SentencePiece model instead of training one")
    add("--vocab-size", type=whole(300, 1_000_000), metavar="N", help="vocabulary to train (default 4096)")
    add("--model-type", choices=("bpe", "unigram"), help="kind of model to train (default bpe; unigram is 20x slower)")
    share = "train on about this much text, from the head of each file by its size (default 16, unigram 4)"
    add("--train-mib", type=whole(1, 10_000), metavar="N", help=share)
    add("--json-key", default="text", metavar="KEY", help="the key of the text in JSON objects (default text)")
    size = "cut text files at line ends into documents of about this size; JSONL is never cut (default 0: no cuts)"
    add("--document-kib", type=whole(0, 1 << 20), default=0, metavar="N", help=size)
    endings = f"which files of a folder are read, in any case (default {' '.join(SUFFIXES)})"
    add("--suffix", nargs="+", default=list(SUFFIXES), metavar=".S", help=endings)
    skip = "leave out bad files and JSONL lines; each is named, also in the manifest (default: refuse, write nothing)"
    add("--skip-bad", action="store_true", help=skip)
    cpus = len(os.sched_getaffinity(0))
    processes = "processes; each file is read by one (default: %(default)s, the CPUs); the output does not depend on it"
    add("--workers", type=whole(1, 1024), default=cpus, metavar="N", help=processes)
    add("--overwrite", action="store_true", help="replace a folder that an earlier run made")
    return parser


def make_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Check the tokenizer options and return the settings that decide the result. Raises UserError."""
    options = {"vocab_size": args.vocab_size, "model_type": args.model_type, "train_mib": args.train_mib}
    reading = {"json_key": args.json_key, "document_kib": args.document_kib}
    if args.tokenizer_model is None:
        defaults = {"vocab_size": 4096, "model_type": "bpe", "train_mib": 4 if args.model_type == "unigram" else 16}
        return {key: options[key] or defaults[key] for key in options} | reading
    for key, value in options.items():
        if value is not None:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {value} only matters for training; drop it or drop --tokenizer-model")
    name = shown(args.tokenizer_model)
    try:
        sha256 = output.file_sha256(Path(args.tokenizer_model))
        eos_id = encoding.load_tokenizer(Path(args.tokenizer_model)).eos_id()
    except OSError as exc:
        raise UserError(f"--tokenizer-model {name}: cannot be read ({exc.strerror}); check the path") from exc
    except RuntimeError as exc:
        raise UserError(f"--tokenizer-model {name}: not a SentencePiece model; give a .model file") from exc
    if eos_id < 0:
        raise UserError(f"--tokenizer-model {name}: it has no end-of-sentence id to end documents; train with eos_id")
    return {"tokenizer_sha256": sha256} | reading


def check_request(args: argparse.Namespace) -> Path:
    """Return the real path of --output, or raise UserError if work could not succeed."""
    target = Path(os.path.realpath(args.output))
    if reason := atomic.obstacle_of_folder(target):
        raise UserError(f"--output {shown(args.output)} cannot be made: {shown(reason)}; name a new folder")
    for word in args.input:
        path = Path(os.path.realpath(word))
        if word != "stdlib" and (path.is_relative_to(target) or target.is_relative_to(path)):
            raise UserError(f"--output {shown(args.output)} and --input {shown(word)} contain each other; part them")
    for suffix in args.suffix:
        if not suffix.startswith(".") or len(suffix) < 2:
            raise UserError(f"--suffix {shown(suffix)} does not start with a dot; write .{shown(suffix).lstrip('.')}")
    for module, package in {
        "sentencepiece": "sentencepiece",
        "megatron": "megatron-core",
        "google": "protobuf",
    }.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the Python package {package} is missing; pip install {package}")
    return target


def scan(inputs: list[Source], args: argparse.Namespace) -> list[Source]:
    """Scan everything and name each bad file on stderr. Raises UserError unless what is left may be used."""
    tasks = [(part, Reading(args.json_key, args.document_kib)) for part in workers.plan_tasks(inputs)]
    with workers.working("scan", sources.scan_files, tasks, args.workers) as results:
        scanned = [source for part in results for source in part]
    num_bad = 0
    for source in scanned:
        problem = source.problem or sources.describe_lines(source.bad_lines)
        if problem:
            num_bad += 1
            print(f"{'skipped' if args.skip_bad else 'bad'}: {shown(source.name)}: {problem}", file=sys.stderr)
    if all(source.problem for source in scanned):
        raise UserError(f"all {len(inputs)} input files are bad, so there is nothing to write; mend them")
    if num_bad and not args.skip_bad:
        raise UserError(f"{num_bad} of {len(inputs)} input files are bad; mend them or add --skip-bad")
    return scanned


def build(inputs: list[Source], args: argparse.Namespace, settings: dict[str, Any], target: Path) -> dict[str, Any]:
    """Make the tokenizer and the dataset in a partial folder, publish it as `target`, and return its manifest."""
    reading = Reading(args.json_key, args.document_kib)
    with output.partial_folder(target) as folder:
        model = folder / MODEL
        if args.tokenizer_model is None:
            task = ([source for source in inputs if not source.problem], reading, model, settings)
            with workers.working("train tokenizer", encoding.train_tokenizer, [task], 1) as results:
                list(results)
        else:
            shutil.copyfile(args.tokenizer_model, model)
        tokenizer = encoding.load_tokenizer(model)
        vocabulary = {"size": tokenizer.get_piece_size(), "eod_id": tokenizer.eos_id()}
        parts = enumerate(workers.plan_tasks(inputs))
        tasks = [(part, reading, model, folder / f"shard-{number}.ids") for number, part in parts]
        with workers.working("encode", encoding.encode_files, tasks, args.workers) as results:
            encoded = output.write_dataset(folder, vocabulary["size"], results)
        manifest = output.write_manifest(folder, settings, encoded, vocabulary)
        output.publish(folder, target, overwrite=args.overwrite)
    return manifest


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks. Raises UserError."""
    target = check_request(args)
    settings = make_settings(args)
    inputs = sources.list_sources(args.input, tuple(suffix.lower() for suffix in args.suffix))
    output.remove_stale(target)
    old = output.read_manifest(target)
    if old is None or args.overwrite:
        summarize("done", target, build(scan(inputs, args), args, settings, target))
        return
    reason = output.difference(old, settings, inputs) or output.damage(old, target)
    if not reason and not output.is_fresh(old, inputs, args.skip_bad):
        reason = output.difference(old, settings, scan(inputs, args))
    if reason:
        raise UserError(f"--output {shown(target)} holds another result ({reason}); choose another, or add --overwrite")
    summarize("already done", target, old)


def summarize(outcome: str, target: Path, manifest: dict[str, Any]) -> None:
    """Print what the folder holds and how Megatron must be told to use it."""
    totals, vocabulary = manifest["totals"], manifest["vocabulary"]
    print(
        f"{outcome}: {shown(target)}: {totals['files']} files, {totals['documents']} documents, {totals['tokens']}"
        f" tokens, vocabulary {vocabulary['size']}, end-of-document id {vocabulary['eod_id']}"
    )
    if totals["inexact_documents"]:
        print(f"note: {totals['inexact_documents']} documents do not decode to their exact text with this tokenizer")
    print(
        f"use it with: --tokenizer-type SentencePieceTokenizer --tokenizer-model {shown(target / MODEL)}"
        f" --data-path {shown(target / DATA)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    args = make_parser().parse_args(argv)
    with stoppable():
        try:
            run(args)
        except UserError as exc:
            code, message = 2, f"{exc}"
        except KeyboardInterrupt as exc:
            number = stopped_by(exc)
            code, message = 128 + number, f"stopped by {number.name}; {args.output} was not written"
        except BrokenProcessPool:
            code, message = 1, f"a worker process died (out of memory?); try --workers below {args.workers}"
        except OSError as exc:
            code, message = 1, f"{exc}; {args.output} was not written"
        else:
            return 0
    print(f"preprocess_data.py: error: {one_line(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
