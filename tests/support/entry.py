"""The entry script in processes of its own, to their ends; forked from a rank, which has imported what is slow.

No process meets another rank: where the script would compare itself with them, it ends with exit code 1 and says so. So
each process may be any rank of a world of any size.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import ranks
import torch.distributed as dist
from training import ROOT

from megatron_scmoe.job import roll_call, sameness

SCRIPT = "pretrain_gpt_scmoe.py"
STARTED = "other ranks were asked"


class Command(NamedTuple):
    """Flags, and what is set and called in the process before the script."""

    flags: list[str]
    environment: dict[str, str] | None = None
    before: Callable[[], None] | None = None


class Ended(NamedTuple):
    """What a process left behind."""

    exit_code: int
    stdout: str
    stderr: str

    def refuses(self, words: Iterable[str] = ()) -> bool:
        """With exit code 2 and one line on stderr that holds ``words``."""
        line = self.stderr.removesuffix("\n")
        is_a_refusal = line.startswith(f"{SCRIPT}: refused: ") and "\n" not in line
        return self.exit_code == 2 and is_a_refusal and all(word in line for word in words)

    def refuses_silently(self) -> bool:
        """As all ranks of a machine do but the first."""
        return (self.exit_code, self.stderr) == (2, "")

    def accepts(self) -> bool:
        """It went as far as its meeting with other ranks, and refused nothing."""
        return self.exit_code == 1 and self.stderr.endswith(f"{STARTED}\n") and "refused" not in self.stderr


def world(size: int, rank: int = 0) -> dict[str, str]:
    """The environment of one rank under torchrun, on a single machine."""
    return {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}


def ends(commands: Sequence[Command]) -> list[Ended]:
    """Run the script with each of ``commands``."""
    (found,) = ranks.run(_all_ends, 1, commands, timeout_s=60.0 + 10 * len(commands))
    return found


def assert_refused(
    refusals: Iterable[tuple[list[str], list[str]]],
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> None:
    """Flags, and the words of the line that refuses them."""
    flags, words = zip(*refusals, strict=True)
    found = ends([Command(one, environment, before) for one in flags])
    for one, expected, ended in zip(flags, words, found, strict=True):
        assert ended.refuses(expected), (expected, ended.exit_code, ended.stderr, one)


def assert_all_ranks_refuse(
    flags: list[str],
    words: list[str],
    num_ranks: int,
    environment: dict[str, str] | None = None,
) -> None:
    """On one machine, of which one rank says why."""
    first, *others = ends([Command(flags, world(num_ranks, rank) | (environment or {})) for rank in range(num_ranks)])
    assert first.refuses(words), (words, first.exit_code, first.stderr, flags)
    assert all(other.refuses_silently() for other in others), others


def assert_accepted(commands: Iterable[list[str]], environment: dict[str, str] | None = None) -> None:
    """Negative control: what works is not refused."""
    commands = [Command(flags, environment) for flags in commands]
    for command, ended in zip(commands, ends(commands), strict=True):
        assert ended.accepts(), (ended.exit_code, ended.stderr, command.flags)


def _all_ends(commands: Sequence[Command]) -> list[Ended]:
    dist.destroy_process_group()  # the rank's own
    with tempfile.TemporaryDirectory() as name:
        runs = [(command, Path(name, str(number))) for number, command in enumerate(commands)]
        side_by_side = itertools.batched(runs, len(os.sched_getaffinity(0)))
        return [ended for some in side_by_side for ended in _ends(some)]


def _ends(runs: Sequence[tuple[Command, Path]]) -> list[Ended]:
    """Each of ``runs`` has a path for what it prints."""
    processes = [multiprocessing.get_context("fork").Process(target=_script, args=run) for run in runs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [
        Ended(process.exitcode or 0, *(output.with_suffix(suffix).read_text() for suffix in (".out", ".err")))
        for process, (_, output) in zip(processes, runs, strict=True)
    ]


def _script(command: Command, output: Path) -> None:
    """The process."""
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"} | (command.environment or {}))
    os.chdir(ROOT)
    store = dist.FileStore(str(output.parent / "store"), -1)  # in which rank 0 says what it has decided
    dist.rendezvous = lambda *_args, **_kwargs: iter([(store, 0, 0)])
    roll_call.answered = lambda *_args: "attempt"
    sameness.check = _forbidden
    if command.before is not None:
        command.before()
    sys.argv[:] = [SCRIPT, *command.flags]
    runpy.run_path(SCRIPT, run_name="__main__")


def _forbidden(*_args: object, **_kwargs: object) -> NoReturn:
    raise SystemExit(STARTED)
