#!/usr/bin/env python3
"""Convert checkpoints: Hugging Face <-> this plugin, one spec or layout to the other, dense models to ScMoE.

Flow: open the source -> decide what becomes of every tensor -> account for all of them -> write part by part -> compare
both sides if asked to -> rename. Nothing is written before the account is balanced. The result grows in a hidden folder
beside --save and gets its name by one rename; the same call continues a killed one. Torch is imported late: --help and
refused options take a tenth of a second.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import atomic
from command_line import Parser, number, one_line, positive, size, stoppable, stopped_by, whole

if TYPE_CHECKING:
    from checkpoints.engine import Job

MOST_EXPERTS = 1 << 14  # sixteen times the largest model known; a plan has a line for each
SOURCES = ("megatron", "hf-longcat", "hf-scmoe", "hf-dense")
TARGETS = ("megatron", "hf-longcat", "hf-scmoe")
SPECS = ("local", "transformer_engine")
CONTAINERS = ("gpt", "hybrid")

EPILOG = """\
formats:
  megatron    a folder that --save of pretrain_gpt_scmoe.py or of Megatron has made (torch_dist); when
              written a release, but with --with-optimizer what a run goes on from
  hf-longcat  a LongcatFlash folder of Hugging Face
  hf-scmoe    a Hugging Face folder with any model of this plugin and the code that runs it (trust_remote_code)
  hf-dense    a Hugging Face folder with a dense Llama (2 to 3.1, 3.3), Mistral without a window, Qwen2, Qwen2.5 or
              Qwen3; only to upcycle from

examples:
  # LongCat-Flash to train on, and back for everybody else; compare logits on the way
  convert_checkpoint.py --from hf-longcat --to megatron --load LongCat-Flash-Chat --save longcat
  convert_checkpoint.py --from megatron --to hf-longcat --load longcat-tuned --save LongCat-Flash-Mine --verify

  # any checkpoint of this plugin for AutoModelForCausalLM, and back
  convert_checkpoint.py --from megatron --to hf-scmoe --load run/checkpoints --save my-scmoe --verify
  convert_checkpoint.py --from hf-scmoe --to megatron --load my-scmoe --save again

  # a checkpoint of the local spec for Transformer Engine's
  convert_checkpoint.py --from megatron --to megatron --load ckpt --save ckpt-te --transformer-impl transformer_engine

  # a checkpoint of Megatron's GPT model for its hybrid one (--hybrid-layer-pattern), and back
  convert_checkpoint.py --from megatron --to megatron --load ckpt --save ckpt-hybrid --container hybrid --verify

  # a run of one optimizer goes on with two, as with --expert-model-parallel-size above 1, moments and all; or back
  convert_checkpoint.py --from megatron --to megatron --load run --save run-ep --with-optimizer --verify

  # a dense model as the begin of an ScMoE with 8 experts, half of each drawn anew
  convert_checkpoint.py --from hf-dense --to megatron --load Llama-3.1-8B --save upcycled --experts 8 --drop-ratio 0.5

  # what would happen, and nothing else
  convert_checkpoint.py --from hf-longcat --to megatron --load LongCat-Flash-Chat --save longcat --dry-run

then train with:
  pretrain_gpt_scmoe.py --load SAVED --use-checkpoint-args ... (weights only, from iteration 0)
  with the tokenizer that came along, in SAVED/tokenizer; the notes say by which flags
or, after --with-optimizer, go on with the run's own flags and --load SAVED: from its iteration, with its moments

which container a megatron checkpoint is of:
  gpt     Megatron's GPT model, a row of blocks of attention and MLP or MoE
  hybrid  its hybrid model, a row of layers, each one symbol of --hybrid-layer-pattern: a block is two of them
  Without --container the result is of that of --load. Hybrid checkpoints go wherever those of the GPT model with the
  same layers go; with Mamba layers, or groups of several sizes, to megatron and hf-scmoe.

how many optimizers a run has:
  one  where experts are split like the dense layers: --expert-model-parallel-size 1, and --expert-tensor-parallel-size
       as large as --tensor-model-parallel-size
  two  where they are not: experts have one of their own
  Core loads moments at any layout with as many. What it saves without --dist-ckpt-optim-fully-reshardable, where
  --use-distributed-optimizer is set, is not rewritten: load that where it was saved, and save it with this flag.

The receipt, conversion.json in the new folder, says what became of every tensor, with hashes and versions. Exit codes:
0 done, 1 failure, or --verify found a difference, 2 bad request or source, 130 / 143 stopped by a signal.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Convert checkpoints: Hugging Face <-> this plugin, one spec or layout to the other, dense models to ScMoE."
    parser = Parser("convert_checkpoint.py", description=about, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=SOURCES, help="format of --load")
    add("--to", dest="target", required=True, choices=TARGETS, help="format of --save")
    add("--load", required=True, type=Path, metavar="DIR", help="the checkpoint; for megatron also one iteration of it")
    add("--save", required=True, type=Path, metavar="DIR", help="new folder; nothing is overwritten")
    add("--shard-size", type=size, default=size("5GB"), metavar="SIZE", help="of a file at most (default 5GB)")
    add("--transformer-impl", choices=SPECS, help="megatron to megatron: the spec that is to load the result")
    holds = "to megatron: Megatron's model that is to load the result (default: that of --load, or gpt)"
    add("--container", choices=CONTAINERS, help=holds)
    moments = "megatron to megatron: all that a run goes on from, for layouts with another number of optimizers (below)"
    add("--with-optimizer", action="store_true", help=moments)
    optimizers = "with --with-optimizer: refuse to make another number (default: the one that --load does not have)"
    add("--optimizers", choices=("one", "two"), help=optimizers)
    verify = "compare both sides before the result gets its name: logits in fp32, or, with --with-optimizer, all bits"
    add("--verify", action="store_true", help=verify)
    tolerance = "largest difference of two logits that passes (default %(default)s)"
    add("--verify-tolerance", type=number(0, 1e9), default=1e-4, metavar="D", help=tolerance)
    trust = "with --verify: run Python code that --load brings, if it is not this tool's own"
    add("--trust-remote-code", action="store_true", help=trust)
    add("--dry-run", action="store_true", help="account for every tensor and write nothing")
    words = "a dense model, or one of Megatron's MoE, becomes ScMoE; any of these asks for it"
    group = parser.add_argument_group("upcycling", words)
    add = group.add_argument
    add("--position", choices=("pos1", "pos2", "pos3"), help="what the routed experts read (default pos2)")
    add("--shortcut-combine", dest="combine", choices=("add", "cg1", "cg2"), help="of both outputs (default cg1)")
    add("--moe-every", type=positive, metavar="N", help="blocks in a group, whose last one gets the MoE (default 2)")
    add("--experts", type=whole(1, MOST_EXPERTS), metavar="N", help="of each MoE, copies of its dense MLP (default 8)")
    add("--topk", type=positive, metavar="K", help="experts of a token (default 1)")
    noise = "add noise to each expert, with this part of its weights' deviation (default 0)"
    add("--expert-noise", dest="noise", type=number(0, 10), metavar="S", help=noise)
    drop = "draw this part of each expert's inner dimension anew (drop-upcycling; default 0)"
    add("--drop-ratio", type=number(0, 1), metavar="R", help=drop)
    add("--seed", type=positive, metavar="N", help="of everything drawn (default 1234)")
    skip = "do not measure how far the function moves, for which both models have to fit into memory in fp32"
    add("--skip-change", action="store_true", help=skip)
    return parser


UPCYCLING = {
    **{"position": "--position", "combine": "--shortcut-combine", "moe_every": "--moe-every", "experts": "--experts"},
    **{"topk": "--topk", "noise": "--expert-noise", "drop_ratio": "--drop-ratio", "seed": "--seed"},
}
"""Options by the names of their values."""


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks; MismatchError where --verify finds a difference."""
    from checkpoints import engine, formats
    from checkpoints.journal import check_target
    from checkpoints.tensors import CheckpointError

    optimizers = (args.optimizers or "other") if args.with_optimizer else None
    if args.optimizers and not optimizers:
        raise CheckpointError(f"--optimizers is {args.optimizers}, and no optimizer goes along; add --with-optimizer")
    given = {name: getattr(args, name) for name in UPCYCLING if getattr(args, name) is not None}
    upcycling = None
    if given:
        from checkpoints.mappings.upcycle import Upcycling

        upcycling = Upcycling(**given)
    if not args.save.name:
        raise CheckpointError(f"--save {str(args.save)!a} has no name for a new folder; give one")
    if upcycling and args.verify:
        raise CheckpointError(
            "an upcycled model computes something else: --verify is set; drop it, the change is measured"
        )
    words = " ".join(f"{UPCYCLING[name]} {value}" for name, value in given.items())
    impl, container = args.transformer_impl, args.container
    formats.check_format(args.source, args.load)
    change = {"transformer_impl": impl, "number": optimizers, "container": container}
    formats.check_pair(args.source, args.target, **change, upcycling=words)
    check_target(args.save)
    if atomic.is_within(args.save, args.load):
        raise CheckpointError(f"--save {str(args.save)!a} lies in --load {str(args.load)!a}; name a folder outside it")
    source = formats.opened_run(args.load) if optimizers else formats.opened(args.source, args.load)
    target = formats.mapped(args.source, args.target, source, **change, upcycling=upcycling)
    options = {"from": args.source, "to": args.target, "transformer_impl": impl, "optimizers": optimizers}
    options["container"] = container
    options["upcycling"] = dataclasses.asdict(upcycling) if upcycling else None
    job = engine.Job(
        source=source,
        conversion=target.conversion,
        writer=formats.writer(args.target, target),
        target=args.save,
        shard_bytes=args.shard_size,
        options=options,
        verify=partial(read_back, args, source, target) if optimizers else partial(compared, args, upcycling),
    )
    if args.dry_run:
        show_dry_run(job)
    else:
        show(engine.run(job), args.save)


def compared(args: argparse.Namespace, upcycling: Any, folder: Path) -> Mapping[str, Any] | None:
    """What is computed before and after, as far as it was asked for: figures for the receipt.

    Raises MismatchError where it should be the same and is not, or where a side does not run.
    """
    if args.skip_change if upcycling else not args.verify:
        return None
    from checkpoints.engine import MismatchError
    from checkpoints.journal import beside
    from checkpoints.running import verify
    from checkpoints.tensors import CheckpointError

    what, where, without = "verify", "", "without --verify"
    if upcycling:
        what, where, without = "upcycled", ", at every position", "with --skip-change"
    print(f"{what}: both sides compute logits in fp32{where}", file=sys.stderr, flush=True)
    kept = f"what was written stays in {beside(args.save)}; the same call {without} gives it its name"
    trust = {"trust_remote_code": args.trust_remote_code}
    try:
        if upcycling:
            return verify.function_change(args.load, args.source, folder, moe_every=upcycling.moe_every, **trust)
        tolerance = args.verify_tolerance
        figures = verify.verify(args.load, args.source, folder, args.target, tolerance=tolerance, **trust)
    except CheckpointError as error:
        raise MismatchError(f"{error}; {kept}") from None
    if not figures["passed"]:
        raise MismatchError(
            f"logits differ by {figures['largest_difference']}, --verify-tolerance is {tolerance}; {kept}"
        )
    return figures


def read_back(args: argparse.Namespace, source: Any, target: Any, folder: Path) -> Mapping[str, Any] | None:
    """What --verify says of a conversion that changes no tensor; MismatchError where one differs."""
    if not args.verify:
        return None
    from checkpoints import read_back
    from checkpoints.journal import beside

    print("verify: every tensor is read again", file=sys.stderr, flush=True)
    kept = f"what was written stays in {beside(args.save)}"
    return read_back.verify(target.conversion, source, folder, kept=kept)


def show_dry_run(job: Job) -> None:
    """Print the account, and every name that keeps it from being balanced; raises CheckpointError if it is not."""
    from checkpoints import engine
    from checkpoints.plan import account
    from provenance import provenance

    found = account(job.conversion, job.source.infos)
    for fault, names in found.faults.items():
        print("\n".join(f"{fault}: {name}" for name in names))
    job.account()
    print("\n".join(table(engine.make_receipt(job, found, provenance()))))
    print(f"dry run: {len(job.parts())} files would be written to {one_line(job.target)}")


def show(receipt: Mapping[str, Any], save: Path) -> None:
    """Print what was done."""
    print("\n".join(table(receipt)))
    if counts := receipt["not_finite"]:
        name, count = next(iter(counts.items()))
        total = sum(counts.values())
        print(f"note: {total} numbers in {len(counts)} tensors are not finite: {count} in {name}, ...")
    figures = receipt["verified"] or {}
    if "largest_difference" in figures:
        print(f"verified: logits differ by {figures['largest_difference']} at most in fp32")
    if "differing" in figures:
        print(f"verified: {figures['tensors']} tensors are the same bit for bit")
    for position, change in figures.get("function_change_at_step_0", {}).items():
        moved, same = change["relative_difference"], change["same_first_choice"]
        print(f"at step 0 with {position}: logits move by {moved:.3f} of their norm, {same:.0%} of first choices stay")
    written = sum(entry["bytes"] for entry in receipt["files"])
    what = f"{len(receipt['files'])} files, {written} bytes, {receipt['seconds']} s"
    print(f"done: {one_line(save)}: {what}; see conversion.json")


def table(receipt: Mapping[str, Any]) -> list[str]:
    """Both sides in numbers, and the notes."""
    rows = [
        ("converted", receipt["converted"], ""),
        *(("dropped", dropped, dropped["reason"]) for dropped in receipt["dropped"]),
        ("missing", {"tensors": 0, "parameters": 0}, ""),
        ("written", receipt["target"], f"{receipt['target']['bytes']} bytes"),
    ]
    lines = [
        f"{what:<10}{counted['tensors']:>10,}{counted['parameters']:>20,}  {words}".rstrip()
        for what, counted, words in rows
    ]
    return [f"{'tensors':>20}{'parameters':>20}", *lines, *(f"note: {one_line(note)}" for note in receipt["notes"])]


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    args = make_parser().parse_args(argv)
    with stoppable():
        try:
            from checkpoints.engine import MismatchError
            from checkpoints.tensors import CheckpointError

            run(args)
            return 0
        except KeyboardInterrupt as error:  # the first: the others are known when they have been imported
            number = stopped_by(error)
            code, message = 128 + number, f"stopped by {number.name}; {_what_now(args.save)}"
        except CheckpointError as error:
            code, message = 2, str(error)
        except MismatchError as error:
            code, message = 1, str(error)
        except OSError as error:
            code, message = 1, f"{error}; {_what_now(args.save)}"
        print(f"convert_checkpoint.py: error: {one_line(message)}", file=sys.stderr)
    return code


def _what_now(save: Path) -> str:
    journal = sys.modules.get("checkpoints.journal")  # imported late: without it nothing has begun
    if journal and journal.has_begun(save):
        return "the same call continues"
    return f"{save} is there" if save.exists() else "nothing was written"


if __name__ == "__main__":
    sys.exit(main())
