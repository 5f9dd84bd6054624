"""One rank of the doctor: meets the others, reads the flags, goes through the checks; rank 0 reports."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_scmoe.job import last_words

if torch.cuda.is_available():
    from megatron_scmoe.mcore import wheel

    wheel.mend()
else:
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

import atomic

from doctoring import flags as entry_flags
from doctoring.binding import Binding
from doctoring.check import Check, problem
from doctoring.clocks import Clocks
from doctoring.environment import Environment
from doctoring.examination import Examination, Outcome
from doctoring.flags import FlagsCheck
from doctoring.groups import Groups
from doctoring.job import Job, layout_of
from doctoring.network import Network
from doctoring.overlap import Overlap
from doctoring.report import as_json, is_ready, print_report
from doctoring.step import Step
from doctoring.storage import Storage
from doctoring.versions import Versions
from doctoring.watch import LOOK_S, Watch
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job.beats import Pulse
from megatron_scmoe.job.meeting import Meeting, store_lives

MEETING_S = 600.0
"""How long ranks may take to come: nodes of a large job start minutes apart."""
LINGER_S = 2 * LOOK_S
"""How long a rank stays that has said why it ends: those of its machine that look later see it, and say nothing."""
NOT_OVER = Outcome("start", [problem("the examination did not come to its end", "see what the ranks printed")])

CHECKS: tuple[Check, ...] = (
    *(Versions(), Environment(), FlagsCheck(), Binding(), Storage()),
    *(Clocks(), Groups(), Network(), Step(), Overlap()),
)


def run_rank(args: argparse.Namespace, names: Sequence[str], flags: list[str] | None) -> int:
    """Examine, and return the exit code, which is the same on all ranks.

    Args:
        args: of the command line.
        names: of the checks.
        flags: of the entry script; None where there were none.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit_s = max(MEETING_S, 2 * (args.check_seconds + args.network_seconds))
    place = argparse.Namespace(rank=rank, world_size=world_size, distributed_timeout_minutes=limit_s / 60)
    meeting = Meeting(place, limit=f"{limit_s / 60:g} minutes")

    def write(outcomes: Sequence[Outcome]) -> None:
        if args.json is not None and rank == 0:
            atomic.write_text(args.json, json.dumps(as_json(outcomes, world_size), indent=2, allow_nan=False) + "\n")

    write([NOT_OVER])  # in the place of an earlier one, whatever ends this process
    try:
        with Watch(_not_met, str, rank) as watch, watch.limited(2 * limit_s):  # a frozen store never answers
            take_gpu()
            store: dist.Store = meeting.store.clone()  # type: ignore[attr-defined]  # the main thread may wait in it
            read = entry_flags.agreed(entry_flags.read(flags, meeting), meeting) if flags is not None else None
    except ConfigError as error:  # all ranks hear of it
        last_words.leave(f"{error}", is_refusal=True)
        last_words.say_once(f"problem: start: {error}")
        last_words.all_is_said()
        rule, _, fix = f"{error}".rpartition("; ")
        write([Outcome("start", [problem(rule or fix, fix if rule else NOT_OVER.findings[0].fix)])])
        return 1
    layout = layout_of(read, world_size)
    job = Job(meeting, read, layout, network_s=args.network_seconds, free_bytes=args.free_space)
    examination = Examination(job, [one for one in CHECKS if one.name in names], args.check_seconds)
    return _examined(job, examination, store, write)


def _examined(job: Job, examination: Examination, store: dist.Store, write: Callable[[Sequence[Outcome]], None]) -> int:
    """The exit code, on all ranks, of an examination that rank 0 reports."""
    rank, meeting = job.rank, job.meeting
    stdout = sys.stdout  # which is another one while a check is under way

    def report(outcomes: Sequence[Outcome]) -> None:
        print_report(outcomes, job.world_size, stdout)
        write(outcomes)

    def cut_short(why: str) -> None:
        if rank == 0:
            report(examination.cut_short(why, store))
        else:
            last_words.say_once(f"ended: {examination.place}: {why}")
            time.sleep(LINGER_S)

    def look() -> str:
        pulse.say(0, "examination")
        return examination.lost_hope(store) if rank == 0 else ""

    def told() -> int:
        return meeting.told("exit code", lambda: 0 if is_ready(examination.outcomes) else 1)

    pulse = Pulse(store, rank)
    try:
        with Watch(cut_short, look, rank) as watch:
            examination.run(watch)
            if rank > 0:  # inside, since the first rank may be frozen, and the store with it
                with watch.limited(examination.limit_s):
                    code = told()
        if rank == 0:  # behind the watch: what ends this process from now on takes nothing back
            report(examination.outcomes)
            code = told()
        with store_lives():
            meeting.store.set(_left(rank), "")
            if rank == 0:  # with which the store may end
                meeting.missing(_left, range(job.world_size))
    except SystemExit:  # another rank has ended, as this one has said; a training has a code for it
        time.sleep(LINGER_S)
        return 1
    last_words.all_is_said()
    return code


def _not_met(why: str) -> None:
    last_words.say_once(f"ended: before the first check: {why}")


def _left(rank: int) -> str:
    return f"left/{rank}"


def take_gpu() -> None:
    """Use the GPU of this rank, where there are any. Raises ConfigError where it has none, and says so."""
    if not torch.cuda.is_available():
        return
    local_rank, number = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= number:
        reason = (
            f"a rank needs a GPU of its own: LOCAL_RANK is {local_rank} and {number} GPUs are visible on "
            f"{socket.gethostname()}; start at most {number} ranks there, or set CUDA_VISIBLE_DEVICES"
        )
        print(f"doctor.py: problem: start: {reason}", file=sys.stderr, flush=True)
        raise ConfigError(reason)
    torch.cuda.set_device(local_rank)


def be_alone() -> None:
    """Let this process be the only rank of a job."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": f"{port}",
    }
