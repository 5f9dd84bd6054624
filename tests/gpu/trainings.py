"""Trainings by the entry script, each rank a process: on the CPU, on one GPU that gloo ranks share, or by NCCL."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training import MODEL, ROOT, TRAINING, with_flags

# As `PLAIN` of tests/support/training.py, but with the fusions that are compiled functions.
LOCAL = """--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
 --no-rope-fusion --attention-dropout 0 --hidden-dropout 0"""
FLAGS = with_flags(f"{LOCAL} {MODEL} {TRAINING}".split(), "--shortcut scmoe", "--moe-aux-loss-coeff 0")
FLAGS = with_flags(FLAGS, "--expert-model-parallel-size 2")
ITERATION = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+).*?grad norm: (\S+)")
RECOMPILED = re.compile(r"\[__recompiles\] Recompiling function (\w+)")
GAVE_UP = re.compile(r"hit config\.(?:recompile|cache_size)_limit")


@dataclass(frozen=True)
class Trained:
    """What a training printed.

    Attributes:
        losses, grad_norms: by iteration.
        recompiled: names of compiled functions, once for each time that one was compiled again, on any rank.
        gave_up: how often a function was compiled so often that it now runs as written.
    """

    losses: dict[int, float]
    grad_norms: dict[int, float]
    recompiled: tuple[str, ...] = ()
    gave_up: int = 0


def train(
    flags: list[str], num_ranks: int, *, backend: str, folder: Path, limit_s: float, cuda: bool = True
) -> Trained:
    """Train, and return what was printed.

    Args:
        flags: of the entry script, without the backend.
        num_ranks: ranks of this machine.
        backend: "gloo", whose ranks share the first GPU where there is one, or "nccl", which wants a GPU for each.
        folder: for the ranks' logs.
        limit_s: after which the ranks are killed, and TimeoutError is raised.
        cuda: whether the ranks see a GPU at all.

    Raises:
        RuntimeError: if a rank fails; with the end of its log.
    """
    common = {"WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
    common |= {"TORCH_LOGS": "recompiles", "CUDA_DEVICE_MAX_CONNECTIONS": 1}
    common |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # cuBLAS computes the same twice
    common |= {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
    script = Path(__file__).parent / "rank.py"
    ranks = []
    try:
        for rank, path in enumerate(logs):
            own = {"RANK": rank, "LOCAL_RANK": 0 if backend == "gloo" else rank}
            with path.open("w") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-P", str(script), *flags, "--distributed-backend", backend],
                        env=os.environ | {name: str(value) for name, value in (common | own).items()},
                        cwd=ROOT,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        wait(ranks, logs, limit_s)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return parsed([path.read_text(errors="replace") for path in logs])


def wait(ranks: list[subprocess.Popen], logs: list[Path], limit_s: float) -> None:
    """Until every rank has ended well; the first that does not ends the training."""
    end = time.monotonic() + limit_s
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > end:
            late = next(number for number, process in enumerate(ranks) if process.poll() is None)
            raise TimeoutError(f"rank {late} did not end within {limit_s:g} s: {tail(logs[late])}")
        if any(process.poll() for process in ranks):
            break
        time.sleep(0.1)
    if failed := [number for number, process in enumerate(ranks) if process.poll()]:
        raise RuntimeError(f"rank {failed[0]} ended with {ranks[failed[0]].poll()}: {tail(logs[failed[0]])}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parsed(texts: list[str]) -> Trained:
    """Losses of the rank that logs them, and recompilations of all."""
    found = [match for text in texts for match in ITERATION.findall(text)]
    return Trained(
        {int(iteration): float(loss) for iteration, loss, _ in found},
        {int(iteration): float(norm) for iteration, _, norm in found},
        tuple(name for text in texts for name in RECOMPILED.findall(text)),
        sum(len(GAVE_UP.findall(text)) for text in texts),
    )


def assert_agree(one: Trained, other: Trained, iterations: Sequence[int], tolerance: float, *, shift: int = 0) -> None:
    """Losses and gradient norms of the same iterations; with a ``shift``, a negative control, of others."""
    for iteration in iterations:
        for name in ("losses", "grad_norms"):
            mine, its = getattr(one, name)[iteration], getattr(other, name)[iteration + shift]
            difference = abs(mine - its) / abs(its)
            assert difference < tolerance, f"{name} of iteration {iteration}: {mine} and {its}"
