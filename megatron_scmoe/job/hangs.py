"""A job in which a rank hangs ends, and says which rank and where: a thread on every rank watches.

Each rank says in the job's store every few seconds that it lives and where it is (``beats.py``), and listens to the
next rank, of the job and of its machine. Where one falls silent, or this rank's own step takes too long and all ranks
stand still, every rank writes its stacks and the job ends. Ranks that compute, such as in a compilation, stand still
nowhere. Where a rank has ended and said why (``last_words.py``), the others end as well.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scmoe.job import last_words
from megatron_scmoe.job.beats import (
    ASKED_AGAIN_S,
    BEAT_S,
    SILENT_S,
    Beat,
    Ear,
    Finding,
    Pulse,
    diagnosis,
    heard,
    this_machine,
)
from megatron_scmoe.job.roll_call import in_words
from megatron_scmoe.mcore import save_helpers

ENDS_WITHIN_S = 10.0
"""How long a main thread may take to notice by itself that another rank has ended."""
FLOOR_S = 30.0
TIMES_THE_SLOWEST = 10.0
REMEMBERED_STEPS = 20
JUDGES = 3  # ranks that ask all others when a step takes too long: rank 0, and two should it hang itself
_SCRIPT = "pretrain_gpt_scmoe.py"
_VERDICT = "hang"


class StepLimit:
    """How long a step may take.

    Args:
        fixed_s: set by the user; negative to follow what was measured.
    """

    def __init__(self, fixed_s: float) -> None:
        self._fixed_s = fixed_s
        self._slowest_s: dict[int, float] = {}  # by training step, so that evaluation's many do not crowd it out

    def add(self, step: int, seconds: float) -> None:
        """Remember a step that has ended."""
        self._slowest_s[step] = max(seconds, self._slowest_s.get(step, 0.0))
        if len(self._slowest_s) > REMEMBERED_STEPS:
            del self._slowest_s[min(self._slowest_s)]

    @property
    def seconds(self) -> float:
        """The limit as it is now."""
        if self._fixed_s >= 0:
            return self._fixed_s
        return max(FLOOR_S, TIMES_THE_SLOWEST * max(self._slowest_s.values(), default=0.0))


@dataclass(frozen=True)
class _Asked:
    """Signs of life of all ranks, at a time, in a step that takes too long."""

    began_s: float
    at_s: float
    beats: dict[int, Beat]


class HangWatch:
    """Watches this rank and the next one; Megatron tells it of sections (``mcore/fault_hooks.py``).

    Args:
        args: Megatron's namespace.
        store: of the job; the watch gets a connection of its own, since another thread may wait in this one.
        limit: of a step.
    """

    def __init__(self, args: Namespace, store: dist.Store, limit: StepLimit) -> None:
        self._args = args
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._limit = limit
        self._section = "setup"
        self._asked: _Asked | None = None
        self._misses_writer = False
        self._began_s = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Say that this rank has ended, and watch no more."""
        self._section = "ended"
        self._stopped.set()
        self._thread.join(timeout=2 * BEAT_S)

    def start_section(self, name: str) -> None:
        """Called by Megatron."""
        self._began_s = time.monotonic()
        self._section = name

    def end_section(self, name: str) -> None:
        """Called by Megatron."""
        if name == "step":
            self._limit.add(self._step, time.monotonic() - self._began_s)
        self._section = "setup" if name == "data" else "between"

    def shutdown_workload_monitoring(self) -> None:
        """Called by Megatron."""
        self.stop()

    @property
    def _step(self) -> int:
        return getattr(self._args, "curr_iteration", 0) + 1

    @property
    def _where(self) -> str:
        return f"in step {self._step}" if self._section == "step" else f"in section '{self._section}'"

    def _watch(self) -> None:
        """The thread."""
        try:
            pulse = Pulse(self._store, self._args.rank)
            ears = [Ear(self._store, rank) for rank in _next_to(self._args.rank, self._args.world_size)]
            pulse.say(self._step, self._section)  # at once: who was never heard is not missed
            while not self._stopped.wait(BEAT_S):
                pulse.say(self._step, self._section)
                self._obey()
                self._heed()
                self._mind_writer()
                for ear in ears:
                    if found := ear.silence():
                        self._end(found)
                self._judge()
            pulse.say(self._step, "ended")
        except dist.DistError as error:
            # With the first node the store is gone, and with it whoever this rank waits for.
            why = f"the job's store is gone, with the first node: {str(error).splitlines()[0]}"
            self._leave_with(why, within_s=SILENT_S["step"])  # at the end of a job it goes while others tidy up

    def _heed(self) -> None:
        """Where a rank has ended, so does this one: some collectives wait for ever for one that is gone."""
        if (said := last_words.heard(self._store)) is not None:
            self._leave_with(said.in_words(), within_s=ENDS_WITHIN_S)

    def _mind_writer(self) -> None:
        """Where the process that writes this rank's saves has died, this rank would wait for it for ever."""
        misses_writer = save_helpers.has_lost_writer()
        if misses_writer and self._misses_writer:  # at two looks: at its end a training ends it
            why = "the process that writes for --async-save has died: see what it printed, and whether the disk is full"
            last_words.leave(why)
            self._leave_with(why, within_s=ENDS_WITHIN_S)
        self._misses_writer = misses_writer

    def _leave_with(self, why: str, within_s: float) -> None:
        """End this process, unless its main thread notices and ends by itself, with more to say."""
        if self._stopped.wait(within_s):
            return
        last_words.say_once(f"ended: {why}; this is rank {self._args.rank}, {self._where}")
        os._exit(last_words.EXIT_ENDED)

    def _judge(self) -> None:
        """Where this rank's step takes too long, ask all ranks twice: is one of them to blame, or does one compute?"""
        turn, began_s, now_s = self._args.rank, self._began_s, time.monotonic()
        limit_s = self._limit.seconds
        if turn >= JUDGES or self._section != "step" or now_s - began_s < limit_s + turn * 2 * BEAT_S:
            self._asked = None
        elif self._asked is None or self._asked.began_s != began_s:
            self._asked = _Asked(began_s, now_s, self._everyone())
        elif now_s - self._asked.at_s >= ASKED_AGAIN_S:
            if found := diagnosis(self._asked.beats, self._everyone(), limit_s):
                self._end(found)
            self._asked = None

    def _everyone(self) -> dict[int, Beat]:
        beats = {rank: heard(self._store, rank) for rank in range(self._args.world_size)}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _end(self, found: Finding) -> None:
        """End the job: the first rank that finds a reason says it."""
        folder = Path(self._args.save or ".", "hangs", time.strftime("%Y-%m-%d_%H-%M-%S"))
        silent = found.ranks if found.are_silent else []
        verdict = json.dumps({"silent": silent, "folder": str(folder.absolute()), "by": self._args.rank})
        if self._store.compare_set(_VERDICT, "", verdict).decode() == verdict:
            line = f"{in_words(found.ranks)}: {found.words}; this is rank {self._args.rank}, {self._where}; "
            line += f"stacks of the ranks that can write are in {folder}"
            print(f"{_SCRIPT}: hang: {line}", file=sys.stderr, flush=True)
        self._obey()

    def _obey(self) -> None:
        """Where a rank has ended the job: write stacks, kill the silent ranks of this machine, and go."""
        if not self._store.check([_VERDICT]):
            return
        verdict = json.loads(self._store.get(_VERDICT))
        with contextlib.suppress(OSError):  # a full disk must not keep the job alive
            write_stacks(Path(verdict["folder"]), self._args.rank)
        time.sleep(2 * BEAT_S)  # the launcher ends all ranks as soon as one has, before they could write
        for rank in verdict["silent"]:
            self._kill(rank)
        os._exit(last_words.EXIT_ENDED)

    def _kill(self, rank: int) -> None:
        """A stopped process ends by SIGKILL alone, for which launchers wait half a minute."""
        beat = heard(self._store, rank)
        if beat is not None and beat.machine == this_machine() and rank != self._args.rank:
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)


def _next_to(rank: int, world_size: int) -> set[int]:
    """Whom a rank listens to: the next of the job, and of its machine, whose process it can see."""
    place, ranks_here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {(rank + 1) % world_size, rank - place + (place + 1) % ranks_here} - {rank}


def write_stacks(folder: Path, rank: int) -> None:
    """The stacks of all threads of this process, and what NCCL's flight recorder has."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank{rank:05d}.txt").open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    if dist.is_initialized() and dist.get_backend() == "nccl":
        trace: bytes = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
        (folder / f"rank{rank:05d}.nccl").write_bytes(trace)
