"""Nodes on one machine, each a torchrun as a user starts it, to be killed, stopped and told to end."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from training import ROOT


def free_port() -> int:
    """Below those that Linux gives to connections: it is used seconds later."""
    while True:
        port = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("localhost", port)):
            return port


class Job:
    """Nodes of one job.

    Args:
        folder: for what each prints.
        flags: of the entry script on each node.
        ranks: on each node.
        torchrun: more words for it.
    """

    def __init__(self, folder: Path, flags: Sequence[list[str]], ranks: int = 1, torchrun: Sequence[str] = ()) -> None:
        port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{node}.log" for node in range(len(flags))]
        self.nodes = []
        for node, log in enumerate(self.logs):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(flags))]
            command += ["--node-rank", str(node), "--nproc-per-node", str(ranks), "--master-addr", "localhost"]
            command += ["--master-port", str(port), *torchrun, "pretrain_gpt_scmoe.py", *flags[node]]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            with log.open("w") as output:
                self.nodes.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment))

    def ranks(self, node: int) -> list[int]:
        """Its processes."""
        children = Path(f"/proc/{self.nodes[node].pid}/task/{self.nodes[node].pid}/children").read_text().split()
        return [int(pid) for pid in children if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def wait_for_step(self, step: int) -> None:
        """Until the job has done that many."""
        self.wait_for(rf"iteration +{step}/")

    def wait_for(self, pattern: str, within_s: float = 300.0) -> None:
        """Until a node has printed it."""
        deadline_s = time.monotonic() + within_s
        while not re.search(pattern, self.printed()):
            assert time.monotonic() < deadline_s, self.printed()[-3000:]
            assert any(node.poll() is None for node in self.nodes), self.printed()[-3000:]
            time.sleep(0.05)

    def exit_codes(self, within_s: float) -> list[int]:
        """Of all launchers, which end in time."""
        deadline_s = time.monotonic() + within_s
        return [node.wait(max(0.0, deadline_s - time.monotonic())) for node in self.nodes]

    def printed(self) -> str:
        """By all nodes."""
        return "".join(log.read_text() for log in self.logs)


@contextlib.contextmanager
def job(folder: Path, flags: Sequence[list[str]], ranks: int = 1, torchrun: Sequence[str] = ()) -> Iterator[Job]:
    """A job, of which nothing is left behind."""
    started = Job(folder, flags, ranks, torchrun)
    try:
        yield started
    finally:
        for node in started.nodes:
            node.kill()  # and its ranks with it
            node.wait()
