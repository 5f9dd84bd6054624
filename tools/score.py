#!/usr/bin/env python3
"""Score text with a checkpoint: the loss of every token, perplexity by file, and logits if asked for.

Flow: check the request -> read all input -> load the model, on as many ranks as torchrun started -> score window by
window -> write into a hidden folder beside --output, which gets its name when it is complete.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that an installed megatron_scmoe is preferred

import atomic
import provenance
import torch
from checkpoints.disk.hf_folder import CONFIG
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import open_any
from checkpoints.mappings.megatron_settings import check_saved
from checkpoints.running.model import load
from checkpoints.running.scores import Model
from checkpoints.settings import SIZE, check, optional
from checkpoints.tensors import Checkpoint, check_plain
from command_line import Parser, one_line, positive, stoppable, stopped_by
from preprocessing.output import partial_folder, publish, remove_stale
from preprocessing.sources import UserError, shown
from scoring import inputs, output
from scoring.inputs import Tokens
from scoring.loop import is_first_rank, score_files

ABOUT = """\
Score token ids or text with a checkpoint: the loss of every token, perplexity by file, and logits if asked for.
Checkpoints of this plugin, of stock Megatron and of Hugging Face go through the same command.
"""
EPILOG = """\
examples:
  # perplexity of two texts under a checkpoint of make pretrain
  score.py --load run/stdlib/checkpoints --input notes.txt more.jsonl --output scores

  # the same on four ranks: any layout that holds the model gives the same losses
  torchrun --nproc-per-node 4 tools/score.py --load run/stdlib/checkpoints --input notes.txt --output scores \\
      --tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1

  # a folder of Hugging Face, in fp32, each token with at least 1536 tokens of context; logits of token ids
  score.py --load folder --input book.txt --output scores --dtype fp32 --seq-length 2048 --stride 512
  score.py --load folder --input tokens.npy --output scores --logits

input:
  .txt   one document.   .jsonl   a document in each line, under --json-key.
  .npy   token ids as whole numbers: [tokens] is one document, [rows, tokens] one in each row.

windows:
  A model reads --seq-length tokens at once. Each window begins --stride tokens behind the one before it and scores the
  tokens that are new, with the others as context: none at its begin with the default stride, the sequence length.
  A text begins behind the token that stood before documents in training, so that its first token is scored: the end of
  document of what Megatron trained, else BOS where the tokenizer has one ("separator" in summary.json). The first of
  token ids as such is not scored, and its loss is NaN.
  Capacity limits and the codec of training are off here: a loss depends on the tokens before it and on nothing else.

output: a new folder with
  summary.json            loss (nats), perplexity and bits per byte of each file and of all; settings, versions, times
  NNN-name.losses.npz     ids, losses (float32), offsets of documents, windows (begin, first scored, end)
  NNN-name.logits.npy     with --logits: float32 [tokens, vocabulary]; row i predicts token i; NaN where nothing does

exit codes: 0 done; 1 failed, or losses are not finite; 2 bad request or input; 130 / 143 stopped
"""
DTYPES = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("score.py", description=ABOUT, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--load", required=True, type=Path, metavar="DIR", help="folder of a Megatron or a Hugging Face checkpoint")
    add("--input", nargs="+", required=True, metavar="FILE", help=f"files, or folders of {', '.join(inputs.SUFFIXES)}")
    add("--output", required=True, type=Path, metavar="DIR", help="new folder for the results")
    add("--seq-length", type=positive, metavar="N", help="tokens of a window (default: that of training, if known)")
    add("--stride", type=positive, metavar="N", help="tokens between windows (default: --seq-length)")
    add("--micro-batch-size", type=positive, default=4, metavar="N", help="windows at once on a rank (default 4)")
    add("--dtype", choices=DTYPES, default="stored", help="of parameters (default: as they are stored)")
    add("--tokenizer", metavar="PATH", help="SentencePiece model or Hugging Face folder (default: the checkpoint's)")
    add("--json-key", default="text", metavar="KEY", help="the key of the text in JSON objects (default text)")
    add("--logits", action="store_true", help="write logits too; their size is printed and checked first")
    trust = (
        "let Python files in a Hugging Face folder run, with your rights; those that this plugin writes need no leave"
    )
    add("--trust-remote-code", action="store_true", help=trust)
    for name in ("tensor", "pipeline", "expert"):
        add(f"--{name}-model-parallel-size", type=positive, default=1, metavar="N", help=f"{name}-parallel ranks")
    add("--expert-tensor-parallel-size", type=positive, metavar="N", help="default: tensor-parallel ranks")
    return parser


def read_input(args: argparse.Namespace, opened: Checkpoint) -> tuple[list[Tokens], inputs.Tokenizer | None]:
    """The files, and the tokenizer if there is text; nothing large is loaded yet. Raises CheckpointError, UserError."""
    saved = None
    if isinstance(opened, MegatronCheckpoint):
        check_saved(opened)
        saved = opened.args
        if args.trust_remote_code:
            raise UserError("a Megatron checkpoint has no code to trust: drop --trust-remote-code")
    else:
        check(str(args.load / CONFIG), opened.settings, {"vocab_size": optional(SIZE)})
    check_plain(opened, by_transformers=saved is None)
    return inputs.read(
        args.input,
        json_key=args.json_key,
        tokenizer=lambda: inputs.find_tokenizer(args.tokenizer, args.load, saved),
        vocab_size=opened.vocab_size,
        shows=is_first_rank(),
    )


def windows_of(args: argparse.Namespace, model: Model) -> tuple[int, int]:
    """Length of a window, and tokens between two of them. Raises UserError."""
    length = args.seq_length or model.usual_length // model.length_multiple * model.length_multiple
    stride = args.stride or length
    if length > model.max_length:
        raise UserError(f"--seq-length {length}: the model has {model.max_length} positions; use that or less")
    if length % model.length_multiple:
        raise UserError(
            f"tensor-parallel ranks hold equal parts of a window: --seq-length is {length}; "
            f"use a multiple of {model.length_multiple}"
        )
    if stride > length:
        raise UserError(f"--stride {stride} would leave tokens out: --seq-length is {length}; use that or less")
    return length, stride


def check_output(folder: Path, *sources: Path) -> None:
    """Raise UserError where ``folder`` cannot be made, or would be a part of ``sources``."""
    if os.path.lexists(folder):
        raise UserError(f"--output {shown(folder)} exists; name a new folder")
    for source in sources:
        if atomic.is_within(folder, source):
            raise UserError(f"--output {shown(folder)} lies in {shown(source)}, which is read; name a folder outside")
    if reason := atomic.obstacle(folder):
        raise UserError(f"--output {shown(folder)} cannot be made: {shown(reason)}; name another folder")


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit code. Raises CheckpointError, UserError."""
    begun_s = time.monotonic()
    check_output(args.output, args.load, *map(Path, args.input))
    opened = open_any(args.load)
    files, tokenizer = read_input(args, opened)
    columns = opened.vocab_size if args.logits else 0
    if columns:
        num_bytes = output.check_room(args.output, files, columns)
        say(f"logits will take {num_bytes / 1e9:.3f} GB")
    say(f"loading {shown(args.load)}")
    origin = provenance.provenance(torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    model = load_model(args)
    length, stride = windows_of(args, model)
    settings = {"seq_length": length, "stride": stride, "micro_batch_size": args.micro_batch_size, "dtype": args.dtype}
    with contextlib.ExitStack() as stack:
        folder = None
        if is_first_rank():
            remove_stale(args.output)
            folder = stack.enter_context(partial_folder(args.output))
        shared = Path(model.shared(None if folder is None else str(folder)))
        size = args.micro_batch_size
        losses = score_files(model, files, shared, length=length, stride=stride, size=size, columns=columns)
        summary = {
            "load": str(args.load),
            "iteration": getattr(opened, "iteration", None),
            "settings": {**settings, "layout": dict(model.layout)},
            "tokenizer": tokenizer and tokenizer.path,
            "separator": tokenizer and tokenizer.separator,
            **output.results(files, losses),
            "seconds": round(time.monotonic() - begun_s, 3),
            **origin,
        }
        if folder is not None:
            output.write_summary(folder, summary)
            publish(folder, args.output, overwrite=False)
            print_summary(args.output, summary)
    total = summary["total"]
    if not total["not_finite"]:
        return 0
    say(
        f"error: {total['not_finite']} of {total['scored_tokens']} losses are not finite; "
        f"look with tools/inspect_checkpoint.py {shown(args.load)} --scan, or use --dtype fp32"
    )
    return 1


def load_model(args: argparse.Namespace) -> Model:
    """This rank's part of the model. Raises CheckpointError."""
    return load(
        args.load,
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
        dtype=DTYPES[args.dtype],
        trust_remote_code=args.trust_remote_code,
    )


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Print a line for each file and one for all."""

    def shown_figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    print(f"{'tokens':>12} {'loss':>10} {'perplexity':>14} {'bits/byte':>10}  file")
    for entry in [*summary["files"], {"name": "all", **summary["total"]}]:
        loss, perplexity, bits = (shown_figure(entry[name]) for name in ("loss", "perplexity", "bits_per_byte"))
        print(f"{entry['scored_tokens']:>12} {loss:>10} {perplexity:>14} {bits:>10}  {shown(entry['name'])}")
    print(f"done: {shown(folder)}")


def say(text: str) -> None:
    """Print a line, once for all ranks."""
    if is_first_rank():
        print(f"score.py: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    args = make_parser().parse_args(argv)
    with stoppable():
        try:
            return run(args)
        except UserError as error:
            code, message = 2, str(error)
        except KeyboardInterrupt as error:
            number = stopped_by(error)
            code, message = 128 + number, f"stopped by {number.name}; {shown(args.output)} was not written"
        except OSError as error:
            code, message = 1, f"{error}; {shown(args.output)} was not written"
    if not is_first_rank():
        # torchrun ends all processes as soon as one has failed: let the first rank speak, unless it is not affected.
        time.sleep(3)
    print(f"score.py: error: {one_line(message)}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
