"""What is killed and started again, or told to end and called again, goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import nodes
import pytest
import training
from training import SCMOE, with_flags

pytestmark = [pytest.mark.full, pytest.mark.alone]

NAMES = ("lm loss", "grad-norm")
LAST = 30


def flags_of(folder: Path, *more: str) -> list[str]:
    """A job that saves after steps 8, 16 and 24, and goes on from there."""
    flags = with_flags(SCMOE, f"--train-iters {LAST}", "--expert-model-parallel-size 2", "--exit-signal-handler")
    of_folder = [f"--save {folder}/save", f"--load {folder}/save", f"--tensorboard-dir {folder}/tensorboard"]
    return with_flags(flags, *of_folder, "--save-interval 8", *more)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """Of each step, bit for bit."""
    return training.scalars(folder / "tensorboard", *NAMES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, dict[int, float]]:
    """What is logged where nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with nodes.job(folder, [flags_of(folder)], ranks=2) as started:
        assert started.exit_codes(within_s=400) == [0]
    found = logged(folder)
    assert sorted(found["lm loss"]) == list(range(1, LAST + 1)) and found["lm loss"][29] != found["lm loss"][30]
    return found


def loaded(printed: str) -> list[str]:
    """Steps that were gone on from."""
    return re.findall(r"successfully loaded checkpoint from .* at iteration (\d+)", printed)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_killed_rank_is_started_again_and_nothing_is_lost(num_nodes, tmp_path, undisturbed):
    flags = [flags_of(tmp_path)] * num_nodes
    with nodes.job(tmp_path, flags, ranks=2 // num_nodes, torchrun=["--max-restarts", "2"]) as started:
        started.wait_for_step(19)
        killed = started.ranks(num_nodes - 1)[-1]
        os.kill(killed, signal.SIGKILL)
        assert started.exit_codes(within_s=400) == [0] * num_nodes
        assert loaded(started.printed()) == ["16"]
    assert logged(tmp_path) == undisturbed
    assert session(killed).count("\n") <= 1  # the headings


def session(rank: int) -> str:
    """What runs in the session that torchrun has given a rank."""
    return subprocess.run(["ps", "-s", str(rank), "-o", "pid,args"], capture_output=True, text=True).stdout


def test_sigterm_saves_the_step_and_the_next_call_goes_on_from_it(tmp_path, undisturbed):
    with nodes.job(tmp_path / "first", [flags_of(tmp_path)], ranks=2) as started:
        started.wait_for_step(11)
        started.nodes[0].terminate()
        assert started.exit_codes(within_s=60) == [1]
        assert "exiting program after receiving SIGTERM" in started.printed(), started.printed()[-3000:]
    step = (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text()
    assert int(step) > 11 and int(step) % 8
    with nodes.job(tmp_path / "second", [flags_of(tmp_path)], ranks=2) as started:
        assert started.exit_codes(within_s=400) == [0]
        assert loaded(started.printed()) == [step]
    assert logged(tmp_path) == undisturbed


def test_what_does_not_end_in_time_is_killed_and_the_older_checkpoint_used(tmp_path, undisturbed):
    with nodes.job(tmp_path / "first", [flags_of(tmp_path)], ranks=2, torchrun=["--shutdown-timeout", "5"]) as started:
        started.wait_for_step(19)
        os.kill(started.ranks(0)[1], signal.SIGSTOP)
        started.nodes[0].terminate()
        assert started.exit_codes(within_s=20) == [1]
    with nodes.job(tmp_path / "second", [flags_of(tmp_path)], ranks=2) as started:
        assert started.exit_codes(within_s=400) == [0]
        assert loaded(started.printed()) == ["16"]
    assert logged(tmp_path) == undisturbed


def test_what_is_refused_is_not_started_again(tmp_path):
    with nodes.job(
        tmp_path, [flags_of(tmp_path, "--full-validation")], ranks=2, torchrun=["--max-restarts", "9"]
    ) as job:
        assert job.exit_codes(within_s=120) == [1]
        assert job.printed().count("refused: Core 0.19.2 ends") == 1
