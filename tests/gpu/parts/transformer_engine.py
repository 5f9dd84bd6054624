"""Transformer Engine's spec computes what the local spec computes, from one checkpoint.

One rank trains six iterations in fp32 with the local spec and saves the third; with Transformer Engine's modules it
goes on from there. Losses and gradient norms agree to a hundredth: attention and norms are other kernels.

Mutant: the local spec's losses of another iteration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checks
import trainings
from training import with_flags
from trainings import FLAGS, Trained, assert_agree

LIMIT_S = 90.0
SAVED, ITERATIONS, TOLERANCE = 3, 6, 1e-2
BOTH = (SAVED + 1, SAVED + 3)  # of the second one Megatron logs the mean of the first two

ONE = with_flags(FLAGS, "--expert-model-parallel-size 1", f"--train-iters {ITERATIONS}")


def part(found: checks.Checks) -> None:
    """The local spec, then the other one."""
    with tempfile.TemporaryDirectory(prefix="gpu-te-") as name:
        folder = Path(name)
        saving = with_flags(ONE, f"--save-interval {SAVED}", f"--save {folder}/checkpoints")
        local = trainings.train(saving, 1, backend="nccl", folder=folder, limit_s=LIMIT_S)
        engine: list[Trained] = []

        def compare() -> None:
            flags = with_flags(ONE, "--transformer-impl transformer_engine", f"--load {folder}/checkpoints")
            flags = with_flags(flags, f"--ckpt-step {SAVED}", "--no-load-rng")
            engine.append(trainings.train(flags, 1, backend="nccl", folder=folder, limit_s=LIMIT_S))
            assert_agree(engine[0], local, BOTH, TOLERANCE)

        found.holds("losses and gradient norms", compare)
        found.must_fail(
            "those of another iteration", lambda: assert_agree(engine[0], local, BOTH[:1], TOLERANCE, shift=2)
        )


if __name__ == "__main__":
    checks.run_part(part)
