"""One checkpoint, many layouts: losses and gradient norms of the next steps agree, and the next save loads anywhere.

Every layout loads the checkpoint of a single rank and runs three steps on the same global batches.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ranks
import training
from training import SCMOE, with_flags

TOLERANCE = 1e-4
STEPS = 3
NAMES = ("lm loss", "grad-norm")

FULL = "--recompute-granularity full --recompute-method"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
LAYOUTS: dict[str, tuple[int, str]] = {
    # name -> ranks, flags
    "ep2": (2, "--expert-model-parallel-size 2"),
    "ep4": (4, "--expert-model-parallel-size 4"),
    "tp2 sp": (2, f"{TP2} --expert-tensor-parallel-size 1"),
    "tp2 ep2": (4, f"{TP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
    "expert tp2": (2, f"{TP2} --expert-tensor-parallel-size 2"),
    "pp2": (2, PP2),
    "pp2 interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 2"),
    "pp2 ep2": (4, f"{PP2} --expert-model-parallel-size 2"),
    "dp2": (2, ""),
    "dp2 overlapped reduce": (2, "--overlap-grad-reduce"),
    "dp2 overlapped gather": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "recompute full uniform": (1, f"{FULL} uniform --recompute-num-layers 1"),
    "recompute full block": (1, f"{FULL} block --recompute-num-layers 3"),
    "recompute core_attn": (1, "--recompute-granularity selective --recompute-modules core_attn"),
    "recompute mlp": (1, "--recompute-granularity selective --recompute-modules mlp shared_experts"),
    "tp2 pp2 ep2": (8, f"{TP2} {PP2} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"),
}

COMMON = ["--num-layers 8", "--moe-aux-loss-coeff 0", "--use-distributed-optimizer"]
COMMON += ["--dist-ckpt-optim-fully-reshardable", "--hidden-dropout 0", "--attention-dropout 0"]
COMMON += ["--override-opt-param-scheduler", "--make-vocab-size-divisible-by 8"]
ARCHITECTURES = {"scmoe": with_flags(SCMOE, *COMMON)}


def train(flags: list[str]) -> str:
    # Megatron's rule for tensor parallelism on GPUs older than Blackwell, and on none.
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return training.train(flags)


def run(num_ranks: int, flags: list[str]) -> None:
    printed = ranks.run(train, num_ranks, flags, timeout_s=60)
    assert "exit code" not in printed[0], printed[0][-3000:]


def changes(flags: str) -> list[str]:
    return ["--" + change for change in flags.removeprefix("--").split(" --")] if flags else []


def continued(folder: Path, architecture: str, layout: str, num_ranks: int, load: Path) -> dict[str, dict[int, float]]:
    """Scalars of the steps after the checkpoint in ``load``."""
    log = folder / layout.replace(" ", "-")
    flags = with_flags(ARCHITECTURES[architecture], *changes(LAYOUTS[layout][1]) if layout != "one" else [])
    run(
        num_ranks,
        with_flags(
            flags, f"--load {load}", "--no-load-optim", f"--train-iters {1 + STEPS}", f"--tensorboard-dir {log}"
        ),
    )
    return training.scalars(log, *NAMES)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def start(request, tmp_path_factory) -> tuple[str, Path, dict[str, dict[int, float]]]:
    """A checkpoint of one step on one rank, and what one rank makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = with_flags(ARCHITECTURES[request.param], "--train-iters 1", f"--save {folder}/start", "--save-interval 1")
    run(1, flags)
    return request.param, folder, continued(folder, request.param, "one", 1, folder / "start")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_one_rank(start, layout):
    architecture, folder, expected = start
    found = continued(folder, architecture, layout, LAYOUTS[layout][0], folder / "start")
    for name in NAMES:
        assert sorted(found[name]) == sorted(expected[name]) == [2, 3, 4]
        for step, value in expected[name].items():
            assert found[name][step] == pytest.approx(value, rel=TOLERANCE), (name, step)


def test_another_step_would_be_noticed(start):
    """Negative control: consecutive steps differ by far more than the tolerance."""
    _, _, expected = start
    for name in NAMES:
        assert expected[name][3] != pytest.approx(expected[name][2], rel=10 * TOLERANCE)
