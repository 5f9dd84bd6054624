"""Two nodes on one machine, each a torchrun as a user starts it: what differs, stops or dies ends the job."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import ROOT, SCMOE, with_flags

pytestmark = [pytest.mark.full, pytest.mark.alone]


class Job:
    """Two nodes of one rank each."""

    def __init__(self, folder: Path, *flags_of_node_1: str) -> None:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        flags = with_flags(SCMOE, "--train-iters 1000000", "--expert-model-parallel-size 2")
        flags = with_flags(flags, f"--save {folder}", "--save-interval 1000000")
        self.logs = [folder / f"{node}.log" for node in (0, 1)]
        self.nodes = []
        for node, log in enumerate(self.logs):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            command += ["--nproc-per-node", "1", "--master-addr", "localhost", "--master-port", str(port)]
            command += ["pretrain_gpt_scmoe.py", *with_flags(flags, *(flags_of_node_1 if node else ()))]
            with log.open("w") as output:
                self.nodes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        stdout=output,
                        stderr=output,
                        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                    )
                )

    def rank(self, node: int) -> int:
        """Its process."""
        children = Path(f"/proc/{self.nodes[node].pid}/task/{self.nodes[node].pid}/children").read_text().split()
        (found,) = [int(pid) for pid in children if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return found

    def wait_for_step(self, step: int) -> None:
        """Until the job has done that many."""
        deadline_s = time.monotonic() + 120
        while not re.search(rf"iteration +{step}/", self.logs[1].read_text()):
            assert time.monotonic() < deadline_s, self.printed()[-3000:]
            time.sleep(0.2)

    def exit_codes(self, within_s: float) -> list[int]:
        """Of both launchers, which end in time."""
        deadline_s = time.monotonic() + within_s
        return [node.wait(max(0.0, deadline_s - time.monotonic())) for node in self.nodes]

    def printed(self) -> str:
        """By both nodes."""
        return "".join(log.read_text() for log in self.logs)


@contextlib.contextmanager
def job(folder: Path, *flags_of_node_1: str) -> Iterator[Job]:
    """A job, of which nothing is left behind."""
    started = Job(folder, *flags_of_node_1)
    try:
        yield started
    finally:
        for node in started.nodes:
            node.kill()  # and its rank with it
            node.wait()


@pytest.mark.parametrize("flag", ["--lr 2e-2", "--shortcut-position pos1", "--overlap-chunks 2"])
def test_nodes_that_mean_different_things_end_before_the_first_step(flag, tmp_path):
    with job(tmp_path, flag) as started:
        assert started.exit_codes(within_s=60) == [1, 1]  # with imports and launchers
        printed = started.printed()
        name, value = flag.split()
        assert printed.count("refused: all ranks must mean the same: ") == 2
        assert re.search(
            rf"{name} is \S+ on rank 0 and \S*{float(value) if name == '--lr' else value}\S* on rank 1", printed
        )
        assert not re.search(r"iteration +1/", printed) and "building GPT" not in printed


def test_a_stopped_rank_ends_the_job_and_is_named(tmp_path):
    with job(tmp_path) as started:
        started.wait_for_step(20)
        os.kill(started.rank(1), signal.SIGSTOP)
        assert all(started.exit_codes(within_s=60))
        assert re.search(r"hang: rank 1: silent for \d+ s, last heard of in step \d+;", started.printed())
        (stack,) = tmp_path.glob("hangs/*/rank00000.txt")
        assert "train_step" in stack.read_text()


def test_a_killed_launcher_takes_its_rank_with_it_and_ends_the_job(tmp_path):
    with job(tmp_path) as started:
        started.wait_for_step(5)
        rank = started.rank(1)
        started.nodes[1].kill()
        assert all(started.exit_codes(within_s=60))
        assert not Path(f"/proc/{rank}").exists()
