#!/usr/bin/env python3
"""Is this machine, this job, this cluster ready? Ten checks, alone or on all ranks, each failure with its fix.

Flow: check the request -> the ranks meet -> each rank looks, rank 0 judges what all have seen, check by check -> a
table, a line for each problem, JSON. The parts are in doctoring/.
"""

from __future__ import annotations

import signal

from megatron_scmoe.job.orphans import die_with_launcher

if __name__ == "__main__":  # before the slow imports
    die_with_launcher()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import os
import sys
from pathlib import Path

import atomic
from command_line import Parser, UserError, exit_code, number, size
from doctoring.catalog import CATALOG, chosen

ABOUT = """\
Say whether a training would start and run as fast as it should, before it costs anything: on the machine at hand, or
on all ranks of a job, with the flags of the training behind --. Each problem is a line that ends with its fix.
"""
EPILOG = """\
examples:
  # this machine, on its own
  tools/doctor.py

  # all ranks of a node, and the flags that they are to train with
  torchrun --nproc-per-node 8 -- tools/doctor.py -- <flags of pretrain_gpt_scmoe.py>

  # a recipe, on all of its nodes, started as the training will be (by hand, or under Slurm)
  DOCTOR=1 DATA=/data/corpus SAVE=/checkpoints/8b sbatch --nodes 8 examples/slurm.sbatch scmoe-8b

  # which link is slow?
  torchrun ... -- tools/doctor.py --only network --network-seconds 60 --json network.json

without a GPU:
  The same checks run on gloo ranks. What there is no GPU for is told as 'not tried', and why; it is never 'ok'.

what a slow link is:
  Each rank exchanges data with each other one, in a tournament. A link is slow that carries less than half of what is
  usual among links of its kind, within a host or between hosts; a rank is slow when most of its links are.

what it does not prove:
  The tiny step and the tiny group are models of Megatron's local spec in fp32, not yours: that ranks compute alike and
  that collectives run beside computation, not how fast your model trains. A dry run says what it would hold.

what it leaves behind:
  Nothing but --json: files with which it tries folders are removed. With --load a torn tracker is mended, as by the
  training.

exit codes: 0 ready, as far as was tried; 1 problems, a rank that failed among them; 2 bad request, and 3 a rank that
ended before all had met (torchrun turns both into 1); 130 / 143 stopped by ^C / SIGTERM.
"""

FLAGS_BEHIND = """\
flags of pretrain_gpt_scmoe.py stand behind --; torchrun takes away the first --, so give it one: \
torchrun ... -- tools/doctor.py -- FLAGS"""


def make_parser() -> Parser:
    """The command line, without what stands behind ``--``."""
    parser = Parser("doctor.py", usage="doctor.py [options] [-- FLAGS]", description=ABOUT, epilog=EPILOG)
    add = parser.add_argument
    add("--only", metavar="CHECK,...", help="run these checks (default all)")
    add("--skip", metavar="CHECK,...", help="leave these checks out")
    add("--list-checks", action="store_true", help="print the checks and what each proves, and end")
    seconds = "how long links and collectives may be timed (default %(default)g)"
    add("--network-seconds", type=number(1, 3600), default=30.0, metavar="S", help=seconds)
    limit = "how long any check may take, the network's time aside (default %(default)g)"
    add("--check-seconds", type=number(5, 3600), default=120.0, metavar="S", help=limit)
    space = "that folders of --save and --data-cache-path should have (default 50GB)"
    add("--free-space", type=size, default=50 * 10**9, metavar="SIZE", help=space)
    add("--json", type=Path, metavar="FILE", help="write all findings, and what ranks saw, there, in the place of it")
    return parser


def check_request(args: argparse.Namespace) -> list[str]:
    """The checks to run. Raises UserError for what cannot be done."""
    names = chosen(args.only, args.skip)
    is_first = os.environ.get("RANK", "0") == "0"
    if args.json is not None and is_first and (reason := atomic.obstacle_of_file(args.json)):
        raise UserError(f"--json {str(args.json)!a} cannot be written: {reason}; choose another")
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise UserError(f"RANK is set and {' and '.join(missing)} not; start it with torchrun, or unset RANK")
    if "RANK" in os.environ:
        place = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        if not all(one.isascii() and one.isdigit() for one in place) or int(place[0]) >= int(place[2]):
            words = "RANK {!a}, LOCAL_RANK {!a} and WORLD_SIZE {!a} are no place in a job".format(*place)
            raise UserError(f"{words}; start it with torchrun, or unset RANK")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise UserError(
            f"srun starts {tasks} tasks (SLURM_STEP_NUM_TASKS), each of which would examine itself alone; start "
            "torchrun on each node, as DOCTOR=1 examples/slurm.sbatch does"
        )
    return names


def run(args: argparse.Namespace, flags: list[str] | None) -> int:
    """Do what the command line asks and return the exit code. Raises UserError."""
    names = check_request(args)
    if args.list_checks:
        print("\n".join(f"{name:12}{CATALOG[name]}" for name in names))
        return 0
    from megatron_scmoe.job import last_words  # noqa: PLC0415 - torch's import, which a refusal need not wait for

    last_words.begin("doctor.py")
    from doctoring import rank  # noqa: PLC0415 - Megatron's

    if "RANK" not in os.environ:
        rank.be_alone()
    return rank.run_rank(args, names, flags)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)[:80]}; {FLAGS_BEHIND}")
    return exit_code("doctor.py", lambda: run(args, argv[cut + 1 :] if cut < len(argv) else None))


if __name__ == "__main__":
    sys.exit(main())
