"""Megatron's hybrid container: the same group code, so the same numbers as in blocks, bit for bit."""

from __future__ import annotations

import hybrids
import models
import pytest
import ranks
import torch
from models import Case

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2)}

CASES = [
    Case(position=("pos1",), combine="add", topk=2),
    Case(position=("pos2",)),
    Case(position=("pos3",), combine="cg2", chunks=2),
    Case(position=("pos1",), moe_every=1),
    Case(shortcut="dgmoe"),
    Case(shortcut="dgmoe", num_groups=4, share_groups=2),
    Case(router="longcat", zero_experts=2, topk=3, combine="add"),
    Case(codec="lsh", hashes=2),
    Case(position=("pos1", "pos3")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shortcut}-{case.position[0]}-{case.combine}")
def test_hybrid_model_equals_blocks(case):
    for hybrid, blocks in zip(
        ranks.run(hybrids.losses_and_gradients, 2, case, layout=EP[2]),
        ranks.run(models.losses_and_gradients, 2, case, layout=EP[2]),
        strict=True,
    ):
        assert torch.equal(hybrid[0], blocks[0])
        assert hybrid[1].keys() == blocks[1].keys()
        for name, gradient in blocks[1].items():
            assert torch.equal(hybrid[1][name], gradient), name


def test_another_position_is_noticed():
    """Negative control: what the hybrid model computes depends on its position."""
    ((one, _),) = ranks.run(hybrids.losses_and_gradients, 1, Case(position=("pos1",)), layout=EP[1])
    ((other, _),) = ranks.run(hybrids.losses_and_gradients, 1, Case(position=("pos2",)), layout=EP[1])
    assert (one - other).abs().max() > 1e-3
