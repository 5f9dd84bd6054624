"""Micro-batches of evaluation have a size of their own, on every tensor-parallel rank."""

from __future__ import annotations

import os

import pytest
import ranks
import training
from training import SCMOE, with_flags

TP2 = ("--tensor-model-parallel-size 2", "--sequence-parallel", "--expert-tensor-parallel-size 1")


def test_tensor_parallel_ranks_evaluate_the_micro_batches_of_the_first():
    """Ranks but the first received what was sent into tensors of the size of training."""
    flags = with_flags(SCMOE, *TP2, "--train-iters 1", "--eval-iters 2", "--lr 0")
    losses = []
    for size in (2, 4):
        printed = ranks.run(train, 2, with_flags(flags, f"--eval-micro-batch-size {size}"), timeout_s=60)
        assert "exit code" not in printed[0], printed[0][-2000:]
        losses.append([float(line.split("lm loss value:")[1].split()[0]) for line in validation(printed)])
    assert len(losses[0]) >= 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def train(flags: list[str]) -> str:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it under tensor parallelism
    return training.train(flags)


def validation(printed: list[str]) -> list[str]:
    return [line for text in printed for line in text.splitlines() if "lm loss value:" in line]
