#!/usr/bin/env python3
"""What a training needs and how long its steps take, before there is a cluster: memory, bytes on the wire, time.

Flow: flags, by hand or of a recipe -> dry run by the entry script's own code -> what a step computes -> model of time
-> tables, JSON, HTML. Or: search the best settings; measure this machine; check the model of time against what is
published. The parts are in planning/.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that an installed megatron_scmoe is preferred

import atomic
from command_line import Parser, UserError, exit_code, number, positive
from planning import recipe, request
from planning.hardware import HARDWARE, NETWORKS, Machine, machine
from planning.settings import KEEPABLE, split_values
from progress import progress

if TYPE_CHECKING:
    from planning.dry import DryRun

ABOUT = """\
Tell what a training needs and how long a step takes, on any machine, without data and without the cluster: parameters
and memory (the dry run's), bytes on the wire, time by part, communication that nothing hides, and what other settings
would give. Flags are those of pretrain_gpt_scmoe.py, and are refused as it refuses them.
"""
EPILOG = """\
examples:
  # a recipe of examples/recipes on the GPUs that it is for; flags behind -- come behind its own
  tools/plan.py --recipe scmoe-8b --gpu H100
  tools/plan.py --recipe scmoe-8b --gpu H100 --network 100 --html plan.html -- --shortcut-position pos1

  # flags of your own
  tools/plan.py --gpus 64 --gpu GB200 --json plan.json -- --num-layers 24 --hidden-size 2048 ...

  # the three fastest settings of its layout and shortcut, and the first as a recipe that examples/launch.sh takes
  tools/plan.py --recipe longcat-flash --gpus 1024 --gpu H100 --search --top 3 --write-recipe mine.sh

  # a machine that no table has: measure it, on one rank or under torchrun on all of them, then plan with it
  torchrun --nproc-per-node 8 tools/plan.py --calibrate machine.json
  tools/plan.py --recipe scmoe-8b --machine machine.json

what is predicted:
  Ops are priced by kernels, not by FLOPs alone: narrow grouped products, launches, bytes. Collectives fly beside dense
  ops as the project's own solver plans them, in forward and backward; links inside a node and between nodes differ.
  Experts get even shares of tokens. What of the flags has no price is named. docs/planner.md compares the model with
  published steps.

what a search chooses:
  tensor, pipeline, virtual, expert and expert-tensor parallel sizes, micro-batch, where stages are cut, and what is
  computed again, all or modules; and of a shortcut position, span, overlap and chunks. --keep keeps some of them as the
  flags have them: position and span are other models. Every layout is held against the GPU's memory first. What is
  reported has passed the entry script's own dry run; what it refuses is counted, by reason. It says what it leaves out.

exit codes: 0 done; 1 failed, or --check found an error above its bound; 2 bad request; 130 / 143 stopped
"""
TOP = 3
RESERVED = 0.1
"""Part of a GPU's memory that the dry run does not count (docs/cluster.md)."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "plan.py", description=ABOUT, epilog=EPILOG, usage="plan.py [options] [-- flags of the entry script]"
    )
    what = parser.add_argument_group("what to plan")
    what.add_argument("--recipe", metavar="NAME", help="a recipe of examples/recipes, or the path of a file like those")
    what.add_argument("--gpus", type=positive, metavar="N", help="GPUs of the job (default: the recipe's)")
    what.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of pretrain_gpt_scmoe.py")
    on = parser.add_argument_group("on what")
    gpu = f"one of {', '.join(HARDWARE)}; with --calibrate whose peaks count, or 'measured' (default: the device's own)"
    on.add_argument("--gpu", metavar="NAME", help=gpu)
    on.add_argument(
        "--network", choices=NETWORKS, help="Gb/s of each GPU's port between nodes (default: the standard machine's)"
    )
    on.add_argument(
        "--release", metavar="NAME", help="software release whose constants count (default: the newest fitted)"
    )
    on.add_argument(
        "--machine", type=Path, metavar="FILE", help="a machine that --calibrate measured, in place of --gpu"
    )
    memory = f"memory of a GPU that may be used (default: all but {RESERVED:.0%}%, which the dry run does not count)"
    on.add_argument("--memory", type=number(0.01, 1e5), metavar="GIB", help=memory)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--search", action="store_true", help="find the fastest settings that fit, in place of the flags'"
    )
    search.add_argument("--top", type=positive, metavar="N", help=f"how many to report (default {TOP})")
    keep = f"what stays as the flags have it, of {', '.join(KEEPABLE)}, with commas between"
    search.add_argument("--keep", type=_names, default=[], metavar="NAME,...", help=keep)
    search.add_argument("--write-recipe", type=Path, metavar="FILE", help="write the fastest settings as a recipe")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    output.add_argument("--html", type=Path, metavar="FILE", help="write a report with pictures: one page, no network")
    other = parser.add_argument_group("other work")
    other.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine into FILE, and end")
    other.add_argument(
        "--check", action="store_true", help="hold the model against published steps; writes docs/planner.md"
    )
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in KEEPABLE]:
        raise argparse.ArgumentTypeError(f"{unknown[0][:40]!a} is none of {', '.join(KEEPABLE)}")
    return names


def machine_of(args: argparse.Namespace) -> Machine:
    """What the plan is for. Raises UserError where nobody knows it."""
    found = _named(args)
    if args.memory and args.memory * 2**30 > found.hardware.memory:
        raise UserError(
            f"--memory is {args.memory:g} GiB and {found.hardware.name} has {found.hardware.memory / 2**30:.1f} GiB: "
            "give less"
        )
    return found


def _named(args: argparse.Namespace) -> Machine:
    if args.machine is None:
        try:
            return machine(args.gpu, network=NETWORKS.get(args.network), release=args.release)
        except ValueError as error:
            raise UserError(str(error)) from error
    try:
        return Machine.from_json(json.loads(args.machine.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"--machine {args.machine} cannot be read: {error}; write one with --calibrate") from error


def plan(args: argparse.Namespace) -> int:
    """Print and write a plan of the command line; returns the exit code."""
    if not args.write_recipe:  # which is written last, and whose loss is said
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what reads us may end first: head, less
    its = machine_of(args)
    gpus, flags = args.gpus, args.flags
    if args.recipe:
        of_recipe, flags = recipe.flags_of(args.recipe, args.flags)
        gpus = gpus or of_recipe
    asked = {"gpus": gpus, "gpu": its.hardware.name, "constants": its.source}
    asked |= {"recipe": args.recipe} if args.recipe else {}
    if args.search:
        return search(args, its, gpus, flags, asked)
    from planning.dry import dry_run  # noqa: PLC0415 - Megatron takes seconds to import

    try:
        dry = dry_run(flags, gpus)
    except UserError as error:
        raise UserError(f"{error}{request.gpus_instead(str(error), flags, gpus)}") from error
    show(args, its, dry, {**asked, "flags": " ".join(flags)})
    return 0


def show(args: argparse.Namespace, its: Machine, dry: DryRun, asked: dict[str, Any], **more: Any) -> None:
    """Print the dry run and what it takes, and write both to the files that are asked for."""
    from planning import chosen, report, running, whatif  # noqa: PLC0415 - see above
    from planning.step import predict  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    from megatron_scmoe.training.arguments import scmoe_config_from_args  # noqa: PLC0415

    run = whatif.Run(dry.args, scmoe_config_from_args(dry.args), [stage.blocks for stage in dry.stages])
    running.check_precision(dry.args, its.hardware)
    with priced():
        given = predict(run.workload, its)
        overlaps, what_if = (
            [(one, predict(one.workload, its)) for one in variants(run)]
            for variants in (whatif.overlaps, whatif.what_if)
        )
    memory = usable(args, its)
    found = report.result(asked, dry, its, usable=memory, prediction=given, overlaps=overlaps, what_if=what_if) | more
    if args.json:  # before anything is printed: who reads it may have enough after a few lines
        atomic.write_text(args.json, json.dumps(found, indent=1) + "\n")
    if args.html:
        atomic.write_text(args.html, report.html(found, dry.report) + "\n")
    if "search" in more:
        chosen.print_choices(more["search"])
    print(dry.report, end="\n\n")
    if misfit := report.misfit(found):
        print(misfit, end="\n\n")
    report.print_tables(found, Console(highlight=False))


def usable(args: argparse.Namespace, its: Machine) -> float:
    """Bytes of a GPU's memory that a rank may use."""
    return args.memory * 2**30 if args.memory else its.hardware.memory * (1 - RESERVED)


@contextmanager
def priced() -> Iterator[None]:
    """Inside, what the model of time has no words for is a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"the model of time cannot price this: {error}") from error


def search(args: argparse.Namespace, its: Machine, gpus: int, flags: Sequence[str], asked: dict[str, Any]) -> int:
    """Find the fastest settings, print them, and show the first as a plan."""
    from planning import chosen  # noqa: PLC0415 - see above
    from planning.choosing import Chooser  # noqa: PLC0415

    memory, begin = usable(args, its), time.monotonic()
    with priced():
        choices = Chooser(flags, gpus, its, memory, args.keep).choose(args.top or TOP)
    found = chosen.as_json(choices, memory, time.monotonic() - begin)
    if not choices.best:
        chosen.print_choices(found)
        raise UserError(chosen.none_passes(choices))
    best = choices.best[0]
    show(args, its, best.dry, {**asked, "flags": " ".join(best.flags)}, search=found)
    if args.write_recipe:
        chosen.write_recipe(args.write_recipe, args.recipe, args.flags, choice=best, gpus=gpus, request=asked)
    return 0


def check() -> int:
    """Hold the model of time against what is published, and say what it misses; returns the exit code."""
    from planning import check as judge  # noqa: PLC0415 - reads tables

    with progress("fit", judge.iterations(), in_bytes=False) as advance:
        missed = judge.run(advance=advance).missed
    print(f"wrote {judge.PAGE} and {judge.CONSTANTS_FILE}")
    for goal in missed:
        print(f"missed: {goal}")
    return 1 if missed else 0


def main() -> int:
    """Run the command line and return the exit code."""
    parser = make_parser()
    args = parser.parse_args()
    args.flags = split_values(args.flags)

    def work() -> int:
        request.check(args)
        if args.calibrate:
            from planning import calibrate  # noqa: PLC0415 - imports torch

            return calibrate.run(args.calibrate, args.gpu)
        return check() if args.check else plan(args)

    return exit_code("plan.py", work)


if __name__ == "__main__":
    sys.exit(main())
