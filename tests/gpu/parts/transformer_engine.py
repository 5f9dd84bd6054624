"""Transformer Engine's spec computes what the local spec computes, from the same weights.

One rank trains with the local spec and saves; `tools/convert_checkpoint.py` gives norms the names that they have in the
other spec. Both specs then train on from these weights, in fp32 and with new moments. Losses and gradient norms agree
to a hundredth: attention and norms are other kernels.

Mutant: the local spec's losses of another iteration.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import checks
import trainings
from training import ROOT, with_flags
from trainings import FLAGS, Trained, assert_agree

LIMIT_S = 60.0
BEFORE, ITERATIONS, TOLERANCE = 3, 3, 1e-2
BOTH = (1, 3)  # of the second one Megatron logs the mean of the first two

ONE = with_flags(FLAGS, "--expert-model-parallel-size 1")


def converted(checkpoints: Path, to: Path) -> None:
    """A checkpoint of the local spec for Transformer Engine's."""
    words = ["--from", "megatron", "--to", "megatron", "--transformer-impl", "transformer_engine"]
    command = [sys.executable, str(ROOT / "tools/convert_checkpoint.py"), *words, "--load", checkpoints, "--save", to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def trained_on(weights: Path, folder: Path, spec: str, *, backend: str = "nccl") -> Trained:
    """A few iterations from ``weights``, which are of ``spec``."""
    flags = with_flags(ONE, f"--transformer-impl {spec}", f"--train-iters {ITERATIONS}", f"--load {weights}")
    flags = with_flags(flags, "--finetune", "--no-load-optim", "--no-load-rng")
    return trainings.train(flags, 1, backend=backend, folder=folder, limit_s=LIMIT_S)


def part(found: checks.Checks) -> None:
    """The local spec, then the other one."""
    with tempfile.TemporaryDirectory(prefix="gpu-te-") as name:
        folder = Path(name)
        saving = with_flags(ONE, f"--train-iters {BEFORE}", f"--save-interval {BEFORE}", f"--save {folder}/local")
        trainings.train(saving, 1, backend="nccl", folder=folder, limit_s=LIMIT_S)
        converted(folder / "local", folder / "engine")
        local = trained_on(folder / "local", folder, "local")
        engine: list[Trained] = []

        def compare() -> None:
            engine.append(trained_on(folder / "engine", folder, "transformer_engine"))
            assert_agree(engine[0], local, BOTH, TOLERANCE)

        found.holds("losses and gradient norms", compare)
        found.must_fail(
            "those of another iteration", lambda: assert_agree(engine[0], local, BOTH[:1], TOLERANCE, shift=2)
        )


if __name__ == "__main__":
    checks.run_part(part)
