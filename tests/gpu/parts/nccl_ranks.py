"""Real NCCL ranks, a GPU each: the same losses and gradient norms with overlap on and off, and in layouts that fit.

Two ranks (EP 2) train six iterations and save the third; every layout goes on from there, and its losses and gradient
norms agree to a thousandth. Overlap on and off in the same layout agree in all digits that the log has. Layouts in
which experts are split like the dense layers are left out: Core loads no moments of the others there.

Mutant: the losses of another iteration.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import checks
import torch
import trainings
from training import with_flags
from trainings import FLAGS, Trained, assert_agree

LIMIT_S = 90.0
SAVED, ITERATIONS, TOLERANCE = 3, 6, 1e-3
BOTH = (SAVED + 1, SAVED + 3)  # of the second one Megatron logs the mean of the first two

TWO = with_flags(FLAGS, "--expert-model-parallel-size 2", "--use-distributed-optimizer")
TWO += ["--dist-ckpt-optim-fully-reshardable", "--override-opt-param-scheduler", "--make-vocab-size-divisible-by", "8"]
SPLIT = ("--tensor-model-parallel-size 2", "--sequence-parallel", "--expert-tensor-parallel-size 1")
TP2 = (*SPLIT, "--expert-model-parallel-size 1")
EP2 = ("--expert-model-parallel-size 2",)
PP2 = ("--pipeline-model-parallel-size 2",)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    # name -> GPUs, flags
    "EP 2": (2, EP2),
    "EP 2, no overlap": (2, (*EP2, "--overlap off")),
    "EP 2, --overlap-grad-reduce": (2, (*EP2, "--overlap-grad-reduce")),
    "EP 2, two chunks": (2, (*EP2, "--overlap-chunks 2")),
    "EP 2, ep at high priority": (2, (*EP2, "--high-priority-stream-groups ep")),
    "TP 2": (2, TP2),
    "EP 4": (4, ("--expert-model-parallel-size 4",)),
    "TP 2, EP 2": (4, (*SPLIT, *EP2)),
    "PP 2, EP 2": (4, (*PP2, *EP2)),
    "TP 2, PP 2, EP 2": (8, (*SPLIT, *PP2, *EP2)),
}


def part(found: checks.Checks) -> None:
    """Two ranks, then every layout that this machine has the GPUs for."""
    with tempfile.TemporaryDirectory(prefix="gpu-nccl-") as name:
        folder = Path(name)
        length = f"--train-iters {ITERATIONS}"
        saving = with_flags(TWO, length, f"--save-interval {SAVED}", f"--save {folder}/checkpoints")
        one = trainings.train(saving, 2, backend="nccl", folder=folder, limit_s=LIMIT_S)
        loading = with_flags(TWO, length, f"--load {folder}/checkpoints", f"--ckpt-step {SAVED}", "--no-load-rng")
        trained: dict[str, Trained] = {}

        def compare(layout: str) -> None:
            gpus, flags = LAYOUTS[layout]
            flags = with_flags(loading, *flags)
            trained[layout] = trainings.train(flags, gpus, backend="nccl", folder=folder, limit_s=LIMIT_S)
            assert_agree(trained[layout], one, BOTH, TOLERANCE)

        for layout, (gpus, _) in LAYOUTS.items():
            if gpus <= torch.cuda.device_count():
                found.holds(layout, lambda layout=layout: compare(layout))
            else:
                found.not_run(layout, f"needs {gpus} GPUs")
        found.holds("overlap changes no digit", lambda: same(trained["EP 2"], trained["EP 2, no overlap"]))
        found.must_fail(
            "those of another iteration", lambda: assert_agree(trained["EP 2"], one, BOTH[:1], TOLERANCE, shift=2)
        )


def same(one: Trained, other: Trained) -> None:
    """The same losses and gradient norms, as printed."""
    assert one.losses and (one.losses, one.grad_norms) == (other.losses, other.grad_norms), f"{one} and {other}"


if __name__ == "__main__":
    checks.run_part(part)
