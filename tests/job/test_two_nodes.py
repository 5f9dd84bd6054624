"""Two nodes on one machine: what differs, stops, dies or refuses ends the job."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import nodes
import pytest
from nodes import Job
from training import SCMOE, with_flags

pytestmark = [pytest.mark.full, pytest.mark.alone]


@contextlib.contextmanager
def job(folder: Path, *flags_of_node_1: str) -> Iterator[Job]:
    """Two nodes of one rank each."""
    flags = with_flags(SCMOE, "--train-iters 1000000", "--expert-model-parallel-size 2")
    flags = with_flags(flags, f"--save {folder}", "--save-interval 1000000")
    with nodes.job(folder, [flags, with_flags(flags, *flags_of_node_1)]) as started:
        yield started


@pytest.mark.parametrize("flag", ["--lr 2e-2", "--shortcut-position pos1", "--overlap-chunks 2"])
def test_nodes_that_mean_different_things_end_before_the_first_step(flag, tmp_path):
    with job(tmp_path, flag) as started:
        assert started.exit_codes(within_s=120) == [1, 1]  # with imports and launchers
        printed = started.printed()
        name, value = flag.split()
        assert printed.count("refused: all ranks must mean the same: ") == 2
        assert re.search(
            rf"{name} is \S+ on rank 0 and \S*{float(value) if name == '--lr' else value}\S* on rank 1", printed
        )
        assert not re.search(r"iteration +1/", printed)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--full-validation", "refused: rank 1 refuses: Core 0.19.2 ends at its first full validation"),
        ("--no-such-flag", "ended: rank 1 has ended: see what it printed"),
    ],
)
def test_a_node_that_ends_alone_before_all_have_met_ends_the_job(flag, line, tmp_path):
    with job(tmp_path, flag) as started:
        assert started.exit_codes(within_s=180) == [1, 1]
        assert f"pretrain_gpt_scmoe.py: {line}" in started.logs[0].read_text()


def test_a_rank_that_is_killed_before_all_have_met_ends_the_job(tmp_path):
    with job(tmp_path) as started:
        while (
            not (rank := next(iter(started.ranks(1)), 0)) or not Path(f"/proc/{rank}/task/{rank}/children").read_text()
        ):
            time.sleep(0.05)  # its witness is there before the first of its imports, which take seconds
        os.kill(rank, signal.SIGKILL)
        assert started.exit_codes(within_s=120) == [1, 1]  # with imports of the other node, which nothing interrupts
        assert "pretrain_gpt_scmoe.py: ended: rank 1 has ended: a signal has ended it" in started.logs[0].read_text()


def test_a_stopped_rank_ends_the_job_and_is_named(tmp_path):
    with job(tmp_path) as started:
        started.wait_for_step(20)
        os.kill(started.ranks(1)[0], signal.SIGSTOP)
        assert all(started.exit_codes(within_s=90))
        assert re.search(r"hang: rank 1: silent for \d+ s, last heard of in step \d+;", started.printed())
        (stack,) = tmp_path.glob("hangs/*/rank00000.txt")
        assert "train_step" in stack.read_text()


def test_a_rank_that_is_stopped_before_its_first_step_ends_the_job_and_is_named(tmp_path):
    with job(tmp_path) as started:
        started.wait_for("model-and-optimizer-setup|pin_memory")  # Megatron's timers are logged behind it; torch warns
        os.kill(started.ranks(1)[0], signal.SIGSTOP)
        assert all(started.exit_codes(within_s=60))
        assert re.search(r"hang: rank 1: silent for \d+ s, last heard of (setup|data), step 1;", started.printed())


def test_a_killed_launcher_takes_its_rank_with_it_and_ends_the_job(tmp_path):
    with job(tmp_path) as started:
        started.wait_for_step(5)
        (rank,) = started.ranks(1)
        started.nodes[1].kill()
        assert all(started.exit_codes(within_s=90))
        assert not Path(f"/proc/{rank}").exists()
