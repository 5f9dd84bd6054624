"""How many calls of a training step the CPU backend answers: a few dozen, which grow with MoE layers and micro-batches.

The figures are those of the docstring of ``megatron_scmoe/cpu/backend.py``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import ranks
import training
from test_arguments import DGMOE
from training import SCMOE, STOCK, with_flags


class Calls(NamedTuple):
    """Of one step, with and without a line in the log, and of each micro-batch beyond the first."""

    step: int
    logged_step: int
    micro_batch: int


def two_blocks(flags: list[str], *more: str) -> list[str]:
    """One of two blocks has an MoE, whose experts are on two ranks."""
    return with_flags(flags, "--num-layers 2", "--expert-model-parallel-size 2", *more)


LARGER = ("--hidden-size 64", "--ffn-hidden-size 96", "--seq-length 64", "--max-position-embeddings 64")
TOP_2 = with_flags(STOCK, "--moe-layer-freq [0,1]", "--moe-router-topk 2")
LONGCAT = ("--router longcat", "--zero-experts 2", "--moe-router-topk 3", "--shortcut-combine add")
LONGCAT += ("--moe-router-load-balancing-type none", "--moe-aux-loss-coeff 0")
MODELS = {
    "stock": (two_blocks(TOP_2), Calls(49, 53, 32)),
    "scmoe": (two_blocks(SCMOE), Calls(49, 53, 32)),
    "dgmoe": (two_blocks(DGMOE), Calls(67, 71, 50)),
    "scmoe in chunks": (two_blocks(SCMOE, "--overlap-chunks 2"), Calls(61, 65, 44)),
    "stock in chunks": (two_blocks(TOP_2, "--overlap-chunks 2"), Calls(61, 65, 44)),
    "scmoe pos1": (two_blocks(SCMOE, "--shortcut-position pos1"), Calls(49, 53, 32)),
    "scmoe pos3": (two_blocks(SCMOE, "--shortcut-position pos3", "--shortcut-combine cg2"), Calls(49, 53, 32)),
    "scmoe top-2, larger": (two_blocks(SCMOE, "--moe-router-topk 2", *LARGER), Calls(49, 53, 32)),
    "scmoe, longcat router": (two_blocks(SCMOE, *LONGCAT), Calls(49, 52, 32)),  # has no balance loss to log
    "scmoe, lsh": (two_blocks(SCMOE, "--a2a-codec lsh"), Calls(49, 53, 32)),
    "dgmoe, two groups share": (two_blocks(DGMOE, "--num-layers 4", "--moe-share-groups 2"), Calls(113, 117, 96)),
}
QUICK = ("stock", "scmoe", "dgmoe")


def steps(flags: list[str]) -> list[int]:
    """Intercepted calls from the start of each step to that of the next."""
    from megatron.training import training as trainer

    from megatron_scmoe.cpu import backend

    before: list[int] = []
    train_step = trainer.train_step

    def counted(*args, **kwargs):
        before.append(sum(backend.intercepted_calls().values()))
        return train_step(*args, **kwargs)

    trainer.train_step = counted
    printed = training.train(flags)
    assert len(before) == 4, printed[-3000:]
    return [after - start for start, after in pairwise(before)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in MODELS])
def test_calls_of_a_step(name):
    flags, expected = MODELS[name]
    found = {}
    for num_micro_batches in (1, 2, 4):
        batch = f"--global-batch-size {2 * 2 * num_micro_batches}"
        numbers = ranks.run(steps, 2, with_flags(flags, batch, "--train-iters 4", "--log-interval 3"))
        assert numbers[0] == numbers[1]  # every rank
        found[num_micro_batches] = numbers[0][1:]  # the first step sets up
    assert Calls(*found[1], found[2][0] - found[1][0]) == expected
    assert found[4] == [calls + 3 * expected.micro_batch for calls in found[1]]
