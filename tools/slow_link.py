#!/usr/bin/env python3
"""Run a command on N ranks that are joined by slow links: one network namespace each, rates set by `tc htb`.

Flow: check the request -> remove what killed labs have left -> build the network -> run the ranks -> report -> remove.
The parts are in slow_network/, which other tools use: `SlowNetwork` to own such a network, `Control` to change its rate
from a rank that runs in it.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import atomic
from command_line import Parser, UserError, exit_code, whole
from slow_network.job import OUTPUTS, Job, Outcome
from slow_network.network import MAX_RANKS, SlowNetwork

ABOUT = """\
Run a command on N ranks joined by slow links, to measure on one machine without a GPU how much communication hides
behind computation. Each rank has a network namespace and a core of its own; between them is a bridge, and every link
lets through --rate in each direction and no more, by the token buckets of `tc htb`.
"""
EPILOG = """\
examples:
  # two ranks, 50 Mbit/s
  sudo .venv/bin/python tools/slow_link.py --ranks 2 --rate 50mbit -- .venv/bin/python train.py --steps 20

  # the same job over links that cost nothing: the difference is what communication costs
  sudo .venv/bin/python tools/slow_link.py --ranks 2 --rate unlimited -- .venv/bin/python train.py --steps 20

  # two nodes of two ranks each: fast links inside a node, one slow link for each
  sudo .venv/bin/python tools/slow_link.py --ranks 4 --ranks-per-node 2 -- .venv/bin/python train.py --steps 20

  # a look at what a rank sees
  sudo .venv/bin/python tools/slow_link.py --ranks 1 --output prefix -- sh -c 'ip address; tc qdisc; env | grep RANK'

what a rank gets:
  RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and OMP_NUM_THREADS: do
  not add torchrun. It reaches the other ranks (10.77.0.1 is rank 0) and nothing else, no internet; files are shared;
  standard input is empty. Torch's warning that a hostname cannot be retrieved is harmless. SLOW_LINK_CONTROL is the
  path of a unix socket that takes lines:
    rate 100mbit   change all links, now      ->  {"rate": "100mbit"}
    rate 10mbit 2  change that of rank 2      ->  {"rate": "100mbit,100mbit,10mbit,100mbit"}
    bytes          bytes sent by each rank    ->  {"bytes_sent": [1048576, 930]}
  With --ranks-per-node the ranks of a node share a namespace, its address and its link: rates and bytes are those of
  nodes, LOCAL_RANK counts within one, and NCCL_HOSTID says which it is.
  In Python, with tools/ on sys.path: Control.from_environment() of slow_network.control, None outside of slow_link.

how it ends:
  When a rank fails the others get SIGTERM, after --grace seconds SIGKILL. Exit codes: that of the rank that failed
  first (128 + n if signal n killed it), 2 bad request or something missing (root, ip, tc, htb), 1 unexpected failure,
  130 / 143 stopped by ^C / SIGTERM. Whatever the ranks started is killed, and the network removed. What a lab leaves
  that was itself killed by SIGKILL, the next start removes.

what it does not prove:
  - How fast anything is on GPUs: there NCCL moves the data, and computing and sending share memory and SMs.
  - Latency effects: packets wait in queues, but no distance is added, and no packet is lost.
  - Small messages: what TCP hands down in one piece (up to 64 KiB) after a pause passes at full speed; what follows
    waits for it. An idle link saves up no more than --burst bytes.
  - Large bandwidths: the kernel's timers cost some; of 4 MiB, 95% of --rate was seen at 100mbit and 300mbit, 94% at
    1gbit, 83% at 3gbit on the machine where this was written.
  - Full overlap: TCP takes CPU time from the computation, 12% to 18% of a core at 100mbit and 300mbit there; far
    more where ranks share cores. The tool says when there are fewer cores than ranks. Two labs at once share them.
  - Seconds: on a shared machine they drift. Alternate the variants inside one job and compare ratios.
"""


def _seconds(text: str) -> float:
    try:
        if text.isascii() and 0 <= float(text) <= 3600:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a number of seconds from 0 to 3600")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line, without the command behind `--`."""
    parser = Parser("slow_link.py", "slow_link.py [options] -- COMMAND [ARGUMENT ...]", ABOUT, EPILOG)
    add = parser.add_argument
    add("--ranks", type=whole(1, MAX_RANKS), default=2, metavar="N", help="how many ranks (default %(default)s)")
    nodes = "how many ranks share a link, as a node; default: each rank has its own, and all are one machine"
    add("--ranks-per-node", type=whole(1, MAX_RANKS), metavar="N", help=nodes)
    rate = "of every link, each direction: a number and kbit, mbit or gbit; or 'unlimited' (default %(default)s)"
    add("--rate", default="50mbit", metavar="R", help=rate)
    add("--burst", default="16kb", metavar="SIZE", help="what an idle link saves up (default %(default)s)")
    threads = "OMP_NUM_THREADS, and how many cores each rank is pinned to (default %(default)s)"
    add("--threads", type=whole(1, MAX_RANKS), default=1, metavar="N", help=threads)
    output = (
        "all: every rank's output, as it comes, as torchrun does (default; Megatron logs on the last rank); prefix: the"
        " same with [rank N] before each line; rank0: the others' only if the job fails"
    )
    add("--output", choices=OUTPUTS, default="all", help=output)
    grace = "how long ranks have to end after SIGTERM (default %(default)s)"
    add("--grace", type=_seconds, default=5.0, metavar="SECONDS", help=grace)
    add("--json", type=Path, metavar="FILE", help="write the report there, too, in the place of what it held")
    return parser


def check_request(args: argparse.Namespace, command: list[str]) -> None:
    """Raise UserError if the job could not start, or its report could not be written."""
    if not command:
        raise UserError("there is no command; write it behind --, as in: slow_link.py --ranks 2 -- python train.py")
    if shutil.which(command[0]) is None:
        raise UserError(f"the command {command[0][:200]!a} is not there or not executable; check its path")
    if shutil.which("setpriv") is None:
        raise UserError("the program setpriv is missing from PATH; install it: apt-get install util-linux")
    if args.json is not None and (reason := atomic.obstacle_of_file(args.json)):
        raise UserError(f"--json {str(args.json)!a} cannot be written: {reason}; choose another")


def make_report(args: argparse.Namespace, command: list[str], outcome: Outcome) -> dict[str, Any]:
    """Return what --json holds. Bytes of a node are in the row of its first rank; other rows of it have none."""
    sent: list[int | None] = [None] * args.ranks
    sent[:: args.ranks_per_node or 1] = outcome.bytes_sent
    ranks = zip(sent, outcome.rank_exit_codes, strict=True)
    return {
        "command": command,
        "rate": args.rate,
        "burst": args.burst,
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 3),
        "ranks": [{"rank": rank, "bytes_sent": count, "exit_code": code} for rank, (count, code) in enumerate(ranks)],
    }


def print_report(report: dict[str, Any]) -> None:
    """Print a small table on stderr."""
    lines = [
        f"slow_link: {report['seconds']:.1f} s, started at {report['rate']}",
        "  rank     bytes sent  mean Mbit/s  exit",
    ]
    for row in report["ranks"]:
        code = "?" if row["exit_code"] is None else row["exit_code"]
        sent, mean = "of its node", ""
        if row["bytes_sent"] is not None:
            sent, mean = f"{row['bytes_sent']:,}", f"{row['bytes_sent'] * 8e-6 / max(report['seconds'], 1e-3):.2f}"
        lines.append(f"  {row['rank']:>4} {sent:>14} {mean:>12} {code:>5}")
    print("\n".join(lines), file=sys.stderr, flush=True)


async def run(args: argparse.Namespace, command: list[str]) -> int:
    """Do what the command line asks and return the exit code. Raises UserError, NetworkError."""
    check_request(args, command)
    options = {"num_threads": args.threads, "ranks_per_node": args.ranks_per_node}
    network = SlowNetwork(args.ranks, args.rate, burst=args.burst, **options)
    num_wanted, num_cores = args.ranks * args.threads, len(os.sched_getaffinity(0))
    if num_wanted > num_cores:
        words = f"{args.ranks} ranks of {args.threads} threads share {num_cores} cores"
        print(f"slow_link: {words}; computation will wait for cores, too", file=sys.stderr, flush=True)
    job = Job(network, command, output=args.output, grace_s=args.grace)
    job.catch_signals()
    with network:
        outcome = await job.run()
    report = make_report(args, command, outcome)
    print_report(report)
    if args.json is not None:
        atomic.write_text(args.json, json.dumps(report, indent=2) + "\n")
    return outcome.exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown and not unknown[0].startswith("-"):
        parser.error(f"{unknown[0][:200]!a} is no option; the command goes behind --, as in: -- python train.py")
    if unknown:
        parser.error(f"unknown option {unknown[0][:200]!a}")
    return exit_code("slow_link.py", lambda: asyncio.run(run(args, argv[cut + 1 :])))


if __name__ == "__main__":
    sys.exit(main())
