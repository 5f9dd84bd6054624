#!/usr/bin/env python3
"""Compare overlap strategies: all of them in one job, by turns, step by step, at the link rates that matter.

Flow: check the request -> start itself again on slow links, unless it runs under torchrun -> for each share find the
link rate -> measure costs, solve, time all arms by turns -> write JSON, CSV and an HTML report, print a table. The
parts are in ablation/.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import atomic
from ablation.arms import MODELS, Arm, all_arms, chosen_arms
from command_line import exit_code, one_line, positive, stoppable, stopped_by
from progress import in_words
from studies.request import Section, StudyParser

ROOT = Path(__file__).resolve().parent.parent

ABOUT = """\
Time training steps and forward-only steps of every overlap strategy (arm) in one job: A B C A B C ..., so that a
machine whose speed drifts drifts for all. Speed-ups are medians of paired ratios against Megatron's own top-2 layer,
with bootstrap intervals; beside each stands the limit that no schedule of the measured ops beats.
"""
EPILOG = """\
examples:
  # two ranks on this machine, at the link rates where the all-to-all takes 15%, 50% and 60% of the MoE layer's
  # time (the papers' 8 x A800 with NVLink, two nodes, 8 x A30 on PCIe); needs root and iproute2
  sudo .venv/bin/python tools/ablate_overlap.py --output results --comm-share 0.15,0.5,0.6

  # a first look: few arms, few repetitions
  sudo .venv/bin/python tools/ablate_overlap.py --output results --comm-share 0.6 --arms pos2 --repetitions 3

  # on a cluster, on the network that the job has
  torchrun --nproc-per-node 8 tools/ablate_overlap.py --output results

  # measure nothing: show what an earlier run found, and write it into a document
  .venv/bin/python tools/ablate_overlap.py --from results --write-results docs/results/links.md

arms:
  Megatron's top-2, top-1 and shared-expert layers as they are, and pipelined in 2 and 4 chunks; shortcut models at
  every position with overlap off, with each fixed slot, with the plan that the solver finds at one chunk (adaptive) and
  at 1, 2 or 4 (adaptive chunks); dgmoe; an MoE in every block; top-2 and pos2 with LSH-MoE, which sends a fifth of the
  rows here (as many hash functions count as do that; what it does to a model is another question), top-2 and pos2
  top-2 with unique tokens, rows of bf16 and of fp8, and unique tokens in fp8; rows are of fp32 without, so that codecs
  save more than of bf16. --list-arms prints them. Routing is forced to balance unless the arm says real routing.

what it does not prove:
  Under torchrun it times this small model (fp32, Megatron's local spec, all ranks one expert-parallel group, so as many
  experts as ranks at least) on the cluster's network: which strategy wins there, not how fast your model trains. On
  slow links of one machine: see tools/slow_link.py --help.

what a step is:
  forward and backward of one micro-batch (training), or forward without gradients (forward). No gradient reduction and
  no optimizer: both are the same in every arm.

exit codes: 0 done; 1 a share could not be reached, or a rank failed (128 + n if signal n killed it); 2 bad request or
something missing; 130 / 143 stopped by ^C / SIGTERM.
"""


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text[:60]!a} is no list of shares between 0 and 1, such as 0.15,0.5,0.6")
    return shares


def make_parser() -> StudyParser:
    """The command line."""
    parser = StudyParser("ablate_overlap.py", None, ABOUT, EPILOG)
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder for result.json, result.csv and report.html; must be new")
    share = (
        "shares of the top-2 baseline's forward MoE time, route to decode, that the all-to-all is to take; the link "
        "rate of each is found by itself (default %(default)s; under torchrun the network stays as it is)"
    )
    add("--comm-share", type=_shares, default=[0.15, 0.5, 0.6], metavar="S,S,...", help=share)
    add("--unlimited", action="store_true", help="measure without any limit, too: nothing to hide")
    add("--arms", default="", metavar="NAME,...", help="arms or models to time beside the baseline (default all)")
    parser.add_shared(section="what reaches its goal, and what misses it,")
    for name, default, what in (
        ("repetitions", 9, "timed steps of each arm"),
        ("ranks", 2, "ranks on slow links"),
        ("threads", 1, "threads of each rank"),
        ("hidden", 512, "width of the model"),
        ("tokens", 512, "tokens of each rank"),
        ("layers", 4, "blocks of the model"),
        ("experts", 8, "of each MoE layer"),
        ("seed", 1234, "of parameters and tokens"),
    ):
        add(f"--{name}", type=positive, default=default, metavar="N", help=f"{what} (default %(default)s)")
    add("--burst", default="16kb", metavar="SIZE", help="what an idle link saves up (default %(default)s)")
    return parser


def check_request(parser: StudyParser, args: argparse.Namespace) -> list[Arm]:
    """Refuse before anything starts; returns the arms."""
    words = [word.strip() for word in args.arms.split(",") if word.strip()]
    try:
        arms = chosen_arms(words)
    except ValueError as error:
        parser.error(f"--arms has {str(error)[:60]!a}, which is no arm and no model; --list-arms prints them")
    parser.check_measuring(
        args, ("jinja2", "matplotlib", "rich"), example="a folder that does not exist yet, such as --output results"
    )
    if os.path.lexists(args.output):
        parser.error(f"--output {str(args.output)!a} exists; choose another folder or remove it")
    if os.environ.get("RANK", "0") == "0" and (reason := atomic.obstacle(args.output)):  # which writes
        parser.error(f"--output {str(args.output)!a} cannot be written: {reason}; choose another folder")
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden} is no multiple of 64, the width of an attention head")
    span = max(2 * MODELS[arm.model].span for arm in arms)
    if args.layers % span:
        parser.error(f"--layers {args.layers} is no multiple of {span}: of the arms, some run that many blocks at once")
    ranks = int(os.environ.get("WORLD_SIZE", args.ranks))
    if ranks < 2 and "RANK" not in os.environ:
        parser.error("--ranks 1 has no link; give 2 or more")
    if args.experts < 2 or args.experts % ranks:
        parser.error(f"--experts {args.experts} cannot be spread over {ranks} ranks; give a multiple, from 2")
    if "RANK" not in os.environ:
        _check_memory(parser, args)
    return arms


def _check_memory(parser: StudyParser, args: argparse.Namespace) -> None:
    """Refuse models whose parameters, gradients and residual stream alone are more than this machine can hold."""
    weights = args.layers * args.hidden**2 * (8 * args.ranks + 4 * args.experts)  # every second block has the experts
    needed = 4 * (2 * weights + args.ranks * args.tokens * args.hidden * args.layers)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        sizes = ", ".join(
            f"--{name} {getattr(args, name)}" for name in ("ranks", "hidden", "layers", "experts", "tokens")
        )
        parser.error(f"{sizes} need {in_words(needed)} at least, and this machine has {in_words(there)}; use less")


def show_again(parser: StudyParser, args: argparse.Namespace) -> None:
    """Print the tables of an earlier run, write its report anew and, if asked for, its section of a document."""
    from ablation import analysis, render, verdicts  # noqa: PLC0415 - draws pictures, for which a refusal need not wait

    if args.output is not None:
        parser.error("--from measures nothing; leave --output out")
    marks = (verdicts.BEGIN, verdicts.END)
    sections = [Section("--write-results", args.write_results, marks, render.markdown)]
    made: dict[str, Any] = {"html": render.html, "table": render.print_tables}
    parser.write_again(args, read=analysis.read, sections=sections, **made)


def start_on_slow_links(args: argparse.Namespace) -> int:
    """Run this very command on ranks that are joined by links whose rate it can set."""
    link = [sys.executable, ROOT / "tools/slow_link.py", "--ranks", args.ranks, "--threads", args.threads]
    link += ["--rate", "unlimited", "--burst", args.burst, "--output", "rank0"]
    # The ranks write into pipes, and would not know how wide the terminal is.
    environment = {"COLUMNS": str(shutil.get_terminal_size((120, 24)).columns)} | os.environ
    command = [*map(str, link), "--", sys.executable, *sys.argv]
    with stoppable():
        process = None
        try:
            process = subprocess.Popen(command, env=environment)
            return process.wait()
        except KeyboardInterrupt as error:
            if process is not None:
                # A ^C may have reached it already. Asked twice it gives its ranks no more time, but still cleans up.
                process.terminate()
                process.wait()
            number = stopped_by(error)
    found = f"{args.output} has what was measured" if args.output.exists() else "nothing was written"
    print(f"ablate_overlap.py: error: stopped by {number.name}; {one_line(found)}", file=sys.stderr)
    return 128 + number


def main() -> int:
    """Run the command line and return the exit code."""
    parser = make_parser()
    args = parser.parse_args()
    if args.list_arms:
        print("\n".join(arm.name for arm in all_arms()))
        return 0
    if args.source is not None:
        return exit_code("ablate_overlap.py", lambda: show_again(parser, args))
    arms = check_request(parser, args)
    if "RANK" not in os.environ:
        return start_on_slow_links(args)
    from ablation.rank import run_rank  # noqa: PLC0415 - imports Megatron, which a refusal need not wait for

    return run_rank(args, arms)


if __name__ == "__main__":
    sys.exit(main())
