#!/usr/bin/env python3
"""Turn the report of ``--overlap-report`` into a timeline for ui.perfetto.dev or chrome://tracing.

The report has one file of JSON lines for each rank (``megatron_scmoe/report/``), and some of its lines hold the spans
of a step. Here each rank becomes a process with two threads, the compute lane and the communication lane. Only the
standard library is needed, so the tool runs where the report was copied to.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # last, so that an installed megatron_scmoe is preferred

import atomic
from command_line import Parser, UserError, exit_code, one_line
from progress import progress

from megatron_scmoe.overlap.plan import ROUTE
from megatron_scmoe.overlap.spans import Lane

EPILOG = """\
where the report comes from:
  torchrun ... pretrain_gpt_scmoe.py ... --overlap-report FOLDER --log-interval 10
  writes a line for each step and rank; every --log-interval steps the line keeps the spans that are drawn here.

how to look at the trace:
  open https://ui.perfetto.dev and drop the file there (it stays on your machine), or load it in chrome://tracing.
  A click on a span shows its step, group, direction, and which dense op it is, or which routed call and chunk. Where
  tokens are routed more than once in a pass, as dgmoe does, the routed calls have their number in their names, too.

what is drawn:
  * One process for each rank with the lanes "compute" and "communication". What a rank waits for is a gap in its
    compute lane; a gap beside a collective is communication that is not hidden.
  * Ranks measure from the begin of their own step, and no clock is shared: the ranks are aligned where the step
    begins. A collective may seem to end at different times on different ranks, by as much as they began apart.
  * Steps follow one another with a short gap; what lies between them in the run is left out.
  * On a GPU a third lane, "nothing enqueued", has the times in which the compute lane may have been empty, since the
    host had not launched what comes next. A span of the compute lane lasts until the next one begins, so that it
    covers them.
  * A collective lasts from its launch to its completion, so that several are under way at once. A lane shows one
    after the other: what completes later starts where the one before it ended. "launched_us" in its arguments is when
    it was launched; "sent_bytes_of_pass" is what this rank sent in the whole forward or backward of the group.
  * The first step of a run has no spans, nor has the last one of a run that was killed.
  * One step of a thousand ranks is more than Perfetto takes: choose some with --steps and --ranks.

Exit codes: 0 done, 1 unexpected failure, 2 bad input or request, 130 / 143 stopped by a signal.
"""

GAP_NS = 1_000_000
"""Between two steps."""

_LINE_BEGINS = '{"iteration"'
_RANK_FILE = re.compile(r"rank\d+\.jsonl")
_LONGEST_S = 1e9  # thirty years: nanoseconds of it are exact in a float
IDLE = "nothing enqueued"
_THREADS = {Lane.COMPUTE.value: 1, Lane.COMMUNICATION.value: 2, IDLE: 3}


class Piece(NamedTuple):
    """One span of a step on one rank.

    Attributes:
        lane: where it ran, or IDLE.
        name: what ran.
        launched_ns: its begin, from the begin of the step.
        end_ns: its end.
        args: what a click on it shows.
    """

    lane: str
    name: str
    launched_ns: int
    end_ns: int
    args: dict[str, Any]


type Report = dict[int, dict[int, list[Piece]]]
"""Pieces by step and rank."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    about = "Draw the steps of an overlap report: computation and communication of every rank, as a Perfetto trace."
    parser = Parser("trace.py", description=about, epilog=EPILOG)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="what --overlap-report was set to; it holds rank00000.jsonl")
    add("--steps", nargs="+", type=int, metavar="N", help="iterations to draw (default: all that have spans)")
    add("--ranks", nargs="+", type=int, metavar="N", help="ranks to draw (default: all)")
    add("--output", metavar="FILE", type=Path, help="the trace to write (default: FOLDER/trace.json)")
    add("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser


# ---- reading --------------------------------------------------------------------------------------------------------


def read_report(folder: Path, steps: Sequence[int] | None = None, ranks: Sequence[int] | None = None) -> Report:
    """Steps with spans. A step that was written twice, by a run that was resumed, counts as written last.

    Args:
        folder: what --overlap-report was set to.
        steps: to keep; None: all.
        ranks: whose files to read; None: all.

    Raises:
        UserError: where there is nothing to draw, a file is no report, or a step or rank that is asked for is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; name the one that --overlap-report was set to")
    files = sorted(file for file in folder.glob("rank*.jsonl") if _RANK_FILE.fullmatch(file.name))
    if not files:
        raise UserError(f"{folder} holds no rank*.jsonl; name the folder that --overlap-report was set to")
    if ranks is not None:
        by_rank = {int(file.stem.removeprefix("rank")): file for file in files}
        if missing := sorted(set(ranks) - set(by_rank)):
            raise UserError(
                f"no report of rank {', '.join(map(str, missing))}: there are those of {described(by_rank)}"
            )
        files = [by_rank[rank] for rank in ranks]
    report: Report = defaultdict(dict)
    drawable: set[int] = set()
    with progress("read", sum(file.stat().st_size for file in files)) as advance:
        for file in files:
            with file.open(encoding="utf-8", errors="replace") as lines:
                for number, text in enumerate(lines, start=1):
                    drawable |= _read_line(text.rstrip("\n"), f"{file} line {number}", report, steps)
                    advance(len(text))
    if not drawable:
        raise UserError(
            f"no line of {folder} has spans: they are kept every --log-interval steps, but not in the first step of a "
            "run, nor in the last one of a run that was killed; train longer or lower --log-interval"
        )
    if unknown := sorted(set(steps or ()) - drawable):
        raise UserError(f"no spans of step {', '.join(map(str, unknown))}: there are those of {described(drawable)}")
    return dict(report)


def _read_line(text: str, where: str, report: Report, steps: Sequence[int] | None) -> set[int]:
    """Add to ``report`` what is to be drawn of a line; returns its step where it has spans.

    What is not drawn is not kept: a report of many ranks is larger than memory.
    """
    try:
        line = json.loads(text)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply: not a report of --overlap-report") from None
    except ValueError:
        if not (text.startswith(_LINE_BEGINS) or _LINE_BEGINS.startswith(text)):
            raise UserError(f"{where} is no JSON: not a report of --overlap-report") from None
        print(
            f"trace.py: warning: {one_line(where)} is torn, the run was killed while writing it: left out",
            file=sys.stderr,
        )
        return set()
    try:
        step, rank, passes = _integer(line["iteration"]), _integer(line["rank"]), line["passes"]
        if not any(one["spans"] for one in passes):
            return set()
        if steps is None or step in steps:
            report[step][rank] = [piece for one in passes for piece in _pieces(one, step)]
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{where} is not as --overlap-report writes it: {problem}") from error
    return {step}


def _pieces(one_pass: dict[str, Any], step: int) -> list[Piece]:
    group, backward = _integer(one_pass["group"]), bool(one_pass["backward"])
    sent_bytes = _integer(one_pass["sent_bytes"])
    spans = one_pass["spans"]
    if any("at" not in span and "chunk" in span for span in spans):
        raise ValueError("an older version wrote it; draw it with the tools/trace.py of that version")
    several_calls = len({span["call"] for span in spans} - {None}) > 1
    where = {"step": step, "group": group, "backward": backward}
    pieces = []
    for span in spans:
        lane, name = Lane(span["lane"]), str(span["name"])
        launched_ns, end_ns = _nanoseconds(name, span["start_s"], span["end_s"])
        args = where | _which(name, span["at"], span["call"])
        if lane is Lane.COMMUNICATION:
            args["sent_bytes_of_pass"] = sent_bytes
        if several_calls and span["call"] is not None:
            name += f" call {span['call']}"
        pieces.append(Piece(lane.value, name, launched_ns, end_ns, args))
    pieces += [
        Piece(IDLE, IDLE, *_nanoseconds(IDLE, start_s, end_s), where) for start_s, end_s in one_pass["idle"] or ()
    ]
    return pieces


def _nanoseconds(name: str, start_s: Any, end_s: Any) -> tuple[int, int]:
    start_s, end_s = float(start_s), float(end_s)
    if not 0 <= start_s <= end_s < _LONGEST_S:
        raise ValueError(f"{name} lasts from {start_s} to {end_s} s")
    return round(start_s * 1e9), round(end_s * 1e9)


def _which(name: str, at: int, call: int | None) -> dict[str, int]:
    """Which dense op, or which routed call and, where it is cut, chunk of it."""
    if call is None:
        return {"dense_op": _integer(at)}
    return {"call": _integer(call)} | ({} if name == ROUTE else {"chunk": _integer(at)})


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


# ---- drawing --------------------------------------------------------------------------------------------------------


def described(steps: Iterable[int]) -> str:
    """Steps in few words: ``2 to 4, 10 to 100 by 10``."""
    rest, parts = sorted(steps), []
    while rest:
        stride = rest[1] - rest[0] if len(rest) > 1 else 0
        row = list(takewhile(lambda pair: pair[0] == pair[1], zip(rest, count(rest[0], stride), strict=False)))
        length = len(row) if len(row) > 2 else 1  # two steps are no row
        by = f" by {stride}" if stride > 1 else ""
        parts.append(str(rest[0]) if length == 1 else f"{rest[0]} to {rest[length - 1]}{by}")
        rest = rest[length:]
    return ", ".join(parts)


def trace_of(report: Report) -> dict[str, Any]:
    """The trace, in the JSON format of trace events: all times in microseconds."""
    ranks = sorted({rank for of_ranks in report.values() for rank in of_ranks})
    drawn = {piece.lane for of_ranks in report.values() for pieces in of_ranks.values() for piece in pieces}
    lanes = [lane for lane in _THREADS if lane in drawn or lane != IDLE]
    events = [event for rank in ranks for event in _names_of(rank, lanes)]
    begin_ns = 0
    for step, of_ranks in sorted(report.items()):
        events.append({"name": f"step {step}", "ph": "i", "s": "g", "pid": ranks[0], "tid": 1, "ts": begin_ns / 1e3})
        for rank, pieces in sorted(of_ranks.items()):
            for lane in lanes:
                events += _lane_events(rank, lane, [piece for piece in pieces if piece.lane == lane], begin_ns)
        begin_ns += max(piece.end_ns for pieces in of_ranks.values() for piece in pieces) + GAP_NS
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names_of(rank: int, lanes: Sequence[str]) -> list[dict[str, Any]]:
    def metadata(what: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": rank, "tid": tid, "args": args}

    return [
        metadata("process_name", 0, name=f"rank {rank}"),
        metadata("process_sort_index", 0, sort_index=rank),
        *(metadata("thread_name", _THREADS[lane], name=lane) for lane in lanes),
        *(metadata("thread_sort_index", _THREADS[lane], sort_index=_THREADS[lane]) for lane in lanes),
    ]


def _lane_events(rank: int, lane: str, pieces: Sequence[Piece], begin_ns: int) -> list[dict[str, Any]]:
    """Complete events of one lane and step, of which no two overlap.

    In the order of their ends each begins where the one before it ended, if it did not begin later. On the compute lane
    that moves no more than the moments between two neighbouring marks.
    """
    events = []
    free_ns = 0
    for piece in sorted(pieces, key=lambda piece: (piece.end_ns, piece.launched_ns)):
        start_ns = max(free_ns, piece.launched_ns)
        free_ns = piece.end_ns
        direction = "backward" if piece.args["backward"] else "forward"
        launched = {"launched_us": (begin_ns + piece.launched_ns) / 1e3} if lane == Lane.COMMUNICATION else {}
        events.append(
            {
                "name": f"{piece.name} backward" if piece.args["backward"] else piece.name,
                "cat": f"{lane},{direction}",
                "ph": "X",
                "pid": rank,
                "tid": _THREADS[lane],
                "ts": (begin_ns + start_ns) / 1e3,
                "dur": (piece.end_ns - start_ns) / 1e3,
                "args": piece.args | launched,
            }
        )
    return events


def run(args: argparse.Namespace) -> None:
    """Do what the command line asks. Raises UserError."""
    target = args.output or args.folder / "trace.json"
    if reason := atomic.obstacle_of_file(target):
        raise UserError(f"--output {target} cannot be a file: {reason}; name one in a folder that exists")
    if _RANK_FILE.fullmatch(target.name) and atomic.is_within(target, args.folder):
        raise UserError(f"--output {target} is a part of the report that is drawn; name another file")
    report = read_report(args.folder, args.steps, args.ranks)
    if target.exists() and not args.overwrite:
        raise UserError(f"--output {target} exists; choose another, or add --overwrite")
    with atomic.written(target) as file:
        json.dump(trace_of(report), file)
    num_ranks = len({rank for of_ranks in report.values() for rank in of_ranks})
    print(f"done: {one_line(target)}: steps {described(report)}, {num_ranks} ranks; open it at https://ui.perfetto.dev")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code("trace.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
