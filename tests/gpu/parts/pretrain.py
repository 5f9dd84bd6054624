"""The whole trainer with CUDA tensors: two gloo ranks that share the GPU, against the same training on the CPU.

The CPU trains six iterations on two ranks (EP 2) and saves the third; the GPU goes on from that checkpoint. Losses and
gradient norms of iterations that both have agree to a thousandth. Batches, DDP, optimizer, checkpoints, and
Core's compiled functions under torch.compile run as in any training, all-to-alls too, through gloo. NCCL is left to
other parts: it takes no two ranks on a device. In a dry run both are the CPU.

Counted: how often Core's compiled functions were compiled anew, as they see another number of rows at each call.

Mutant: the losses of another iteration.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import checks
import torch
import trainings
from training import with_flags
from trainings import FLAGS, Trained, assert_agree

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
LIMIT_S = 60.0 if torch.cuda.is_available() else 180.0
SAVED, ITERATIONS, TOLERANCE = 3, 6, 1e-3
BOTH = (SAVED + 1, SAVED + 3)  # of the second one Megatron logs the mean of the first two

Train = Callable[[list[str], Path, bool], Trained]


def on_ranks(flags: list[str], folder: Path, cuda: bool) -> Trained:
    """On two gloo ranks, each a process."""
    if cuda and not HAS_COMPILER:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    return trainings.train(flags, 2, backend="gloo", folder=folder, limit_s=LIMIT_S, cuda=cuda)


def compare(found: checks.Checks, folder: Path, train: Train) -> None:
    """Train here and there, and compare."""
    flags = with_flags(FLAGS, f"--train-iters {ITERATIONS}", f"--save-interval {SAVED}", f"--save {folder}/checkpoints")
    on_cpu = train(flags, folder, False)
    flags = with_flags(FLAGS, f"--train-iters {ITERATIONS}", f"--load {folder}/checkpoints", f"--ckpt-step {SAVED}")
    on_device = train(with_flags(flags, "--no-load-rng"), folder, True)
    found.holds("both have trained", lambda: agree_on_iterations(on_cpu, on_device))
    found.holds("losses and gradient norms", lambda: assert_agree(on_device, on_cpu, BOTH, TOLERANCE))
    found.must_fail("those of another iteration", lambda: assert_agree(on_device, on_cpu, BOTH[:1], TOLERANCE, shift=2))
    if torch.cuda.is_available() and not HAS_COMPILER:
        found.not_run(
            "torch.compile", "Triton wants a C compiler, and there is none: compiled functions ran as written"
        )
    elif torch.cuda.is_available():
        counts = {name: on_device.recompiled.count(name) for name in sorted(set(on_device.recompiled))}
        found.figure("compiled anew on both ranks together", counts)
        found.figure("functions that gave up being compiled", on_device.gave_up)
    else:
        found.not_run("recompilations", "on the CPU nothing is compiled")


def agree_on_iterations(on_cpu: Trained, on_device: Trained) -> None:
    """Each has the iterations that it was to train, and no others."""
    assert sorted(on_cpu.losses) == list(range(1, ITERATIONS + 1)), on_cpu
    assert sorted(on_device.losses) == list(range(SAVED + 1, ITERATIONS + 1)), on_device


def part(found: checks.Checks) -> None:
    """In a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="gpu-pretrain-") as folder:
        compare(found, Path(folder), on_ranks)


if __name__ == "__main__":
    checks.run_part(part)
