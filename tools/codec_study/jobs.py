"""Many trainings on the cores of one machine: each a child process, a core for each rank, which leaves a folder behind.

A run is done when its folder has result.json, which is written last and whole; a folder without it is begun anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import atomic

from codec_study.arms import Run, Settings, run_flags
from codec_study.folder import RESULT
from codec_study.record import LOG, read_run, steps_done

ROOT = Path(__file__).resolve().parent.parent.parent
POLL_S, SAY_EVERY_S, GRACE_S = 0.5, 30.0, 10.0
LAST_LINES = 12

type Command = Callable[[Run, Path], Sequence[str]]


def training_command(settings: Settings, data: Path) -> Command:
    """The command that trains a run into a folder."""

    def command(run: Run, folder: Path) -> Sequence[str]:
        training = ["codec_study.train", *run_flags(run, settings, folder, data)]
        if run.arm.ranks > 1:
            launcher = ["codec_study.ranks", "--standalone", "--local-addr", "127.0.0.1"]
            training = [*launcher, "--nproc-per-node", str(run.arm.ranks), "-m", *training]
        return [sys.executable, "-m", *training]

    return command


@dataclass(slots=True)
class _Child:
    run: Run
    folder: Path
    cores: list[int]
    process: subprocess.Popen[bytes]
    began_s: float


class Jobs:
    """Trains runs, a few at a time.

    Args:
        folder: of all runs.
        settings: that they share.
        command: that trains one.
        origin: what their results say of the code and the machine that train them.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        command: Command,
        *,
        origin: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._settings, self._command = folder, settings, command
        self._origin, self._say = origin, say
        self._children: list[_Child] = []
        self._began_s = self._said_s = time.monotonic()
        self._done_here = 0.0

    def result(self, run: Run) -> dict[str, Any] | None:
        """What a run left; None where it is not done."""
        path = self._folder / run.name / RESULT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def train(self, runs: Sequence[Run], at_once: int) -> list[Run]:
        """Train what is not done yet, ``at_once`` ranks at a time; returns those that failed.

        KeyboardInterrupt ends the children and is raised again.
        """
        waiting = [run for run in runs if self.result(run) is None]
        num_done, failed = len(runs) - len(waiting), list[Run]()
        if num_done:
            self._say(f"{num_done} of {len(runs)} runs were done before")
        cores = sorted(os.sched_getaffinity(0))
        try:
            while waiting or self._children:
                while waiting and self._has_room(waiting[0], at_once):
                    # The cores with the fewest ranks, the first ones of those.
                    run, busy = waiting.pop(0), [core for child in self._children for core in child.cores]
                    self._start(run, sorted(cores, key=busy.count)[: run.arm.ranks])
                for child in [child for child in self._children if child.process.poll() is not None]:
                    self._children.remove(child)
                    num_done += self._finish(child, failed)
                    self._say_progress(num_done, len(runs), waiting)
                if time.monotonic() - self._said_s > SAY_EVERY_S:
                    self._say_progress(num_done, len(runs), waiting)
                time.sleep(POLL_S)
        finally:
            self._end_children()
        return failed

    def _has_room(self, run: Run, at_once: int) -> bool:
        """Whether a run can start: one of more ranks than may run waits until nothing else does."""
        ranks = sum(child.run.arm.ranks for child in self._children)
        return not self._children or ranks + run.arm.ranks <= at_once

    def _start(self, run: Run, cores: list[int]) -> None:
        folder = self._folder / run.name
        shutil.rmtree(folder, ignore_errors=True)  # what a run that was killed has left
        folder.mkdir(parents=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "CUDA_VISIBLE_DEVICES": "",  # the same arithmetic wherever it runs
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            # One rank listens and nobody has to find it: port 0 is any that is free by then, seconds from now.
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        }
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                self._command(run, folder),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a ^C of the terminal reaches this process alone, which ends its children
            )
        self._children.append(_Child(run, folder, cores, process, time.monotonic()))
        with suppress(ProcessLookupError):  # it ended at once
            os.sched_setaffinity(process.pid, cores)

    def _finish(self, child: _Child, failed: list[Run]) -> bool:
        """Write the result of a child that ended, or say why there is none."""
        log = (child.folder / LOG).read_text(encoding="utf-8", errors="replace")
        problem = f"exit code {child.process.returncode}" if child.process.returncode else ""
        if not problem:
            try:
                wall_s = time.monotonic() - child.began_s
                result = {**read_run(child.run, self._settings, child.folder), **self._origin, "wall_s": wall_s}
                atomic.write_text(child.folder / RESULT, json.dumps(result) + "\n")
            except (OSError, ValueError, KeyError) as error:
                problem = f"it ended well, but what it recorded cannot be read: {error!r}"
        if problem:
            failed.append(child.run)
            last = "\n".join(f"  | {line}" for line in log.splitlines()[-LAST_LINES:])
            self._say(f"{child.run.name} failed ({problem}); the end of {child.folder / LOG}:\n{last}")
            return False
        self._done_here += self._sequences(child.run)
        return True

    def _sequences(self, run: Run) -> int:
        """That a run trains on, as often as it has ranks, which take as many cores."""
        return run.arm.ranks * self._settings.batch(run.model) * self._settings.of(run.arm).iterations

    def _say_progress(self, num_done: int, total: int, waiting: Sequence[Run]) -> None:
        """How far it is, and how long the rest will take: by what this call has done, in sequences."""
        self._said_s = time.monotonic()
        running, words = 0.0, []
        for child in self._children:
            step = steps_done(child.folder)
            running += child.run.arm.ranks * self._settings.batch(child.run.model) * step
            words.append(f"{child.run.name} at step {step}")
        done = self._done_here + running
        left = sum(self._sequences(run) for run in [*waiting, *(child.run for child in self._children)]) - running
        line = f"{num_done} of {total} runs done"
        if words:
            line += f", {len(words)} running ({', '.join(words)})"
        if done and left:
            line += f", about {timedelta(seconds=round((self._said_s - self._began_s) / done * left))} left"
        self._say(line)

    def _end_children(self) -> None:
        for child in self._children:
            child.process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                for child in self._children:
                    child.process.wait(GRACE_S)
        finally:  # after a second ^C, too
            for child in self._children:
                child.process.kill()
                child.process.wait()
            self._children.clear()
