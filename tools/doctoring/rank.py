"""One rank of the doctor: meets the others, reads the flags, goes through the checks; rank 0 reports."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_scmoe.job import last_words

if torch.cuda.is_available():
    from megatron_scmoe.mcore import wheel

    wheel.mend()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
else:
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

import atomic

from doctoring import flags as entry_flags
from doctoring.binding import Binding
from doctoring.check import Check
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
from doctoring.watch import Watch
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job.beats import Pulse
from megatron_scmoe.job.meeting import Meeting

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
    minutes = max(args.check_seconds, 2 * args.network_seconds) / 60
    place = argparse.Namespace(rank=rank, world_size=world_size, distributed_timeout_minutes=minutes)
    meeting = Meeting(place)
    try:
        store: dist.Store = meeting.store.clone()  # type: ignore[attr-defined]  # the main thread may wait in the other
        read = entry_flags.agreed(entry_flags.read(flags, meeting), meeting) if flags is not None else None
    except ConfigError as error:  # all ranks hear of it
        last_words.say_once(f"problem: start: {error}")
        last_words.all_is_said()
        return 1
    layout = layout_of(read, world_size)
    job = Job(meeting, read, layout, network_s=args.network_seconds, free_bytes=args.free_space)
    examination = Examination(job, [one for one in CHECKS if one.name in names], args.check_seconds)

    stdout = sys.stdout  # which is another one while a check is under way

    def report(outcomes: Sequence[Outcome]) -> None:
        print_report(outcomes, world_size, stdout)
        if args.json is not None:
            atomic.write_text(args.json, json.dumps(as_json(outcomes, world_size), indent=2) + "\n")

    def cut_short(why: str) -> None:
        if rank == 0:
            report(examination.cut_short(why, store))

    def look() -> str:
        pulse.say(0, "examination")
        return examination.lost_hope(store) if rank == 0 else ""

    pulse = Pulse(store, rank)
    with Watch(cut_short, look, rank) as watch:
        examination.run(watch)
        if rank == 0:
            report(examination.outcomes)
        code = meeting.told("exit code", lambda: 0 if is_ready(examination.outcomes) else 1)
        meeting.store.set(_left(rank), "")
        if rank == 0:  # with which the store may end
            meeting.missing(_left, range(world_size))
    last_words.all_is_said()
    return code


def _left(rank: int) -> str:
    return f"left/{rank}"


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
