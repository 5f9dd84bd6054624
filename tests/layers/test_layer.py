"""The group against the reference: outputs, loss and every gradient; and overlap on against off, bit for bit."""

from __future__ import annotations

import itertools

import models
import pytest
import ranks
import reference
import torch
from models import Case

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2, 4)}
NUM_SLOTS = {"pos1": 3, "pos2": 4, "pos3": 5}


def run(case: Case, ep: int = 1, **kwargs):
    """Loss per token of the whole batch and every gradient, from ``ep`` expert-parallel ranks."""
    results = ranks.run(models.losses_and_gradients, ep, case, layout=EP[ep], **kwargs)
    loss = torch.cat([result[0] for result in results])
    gradients = {name: gradient for result in results for name, gradient in result[1].items()}
    return loss, gradients


def run_reference(config: reference.ReferenceConfig):
    return reference.loss_and_gradients(models.reference_parameters(config), *models.batch(), config)


def largest_difference(one, other) -> float:
    """Over the loss and all gradients, relative to the largest value of each tensor."""
    assert one[1].keys() == other[1].keys()
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


ARCHITECTURES = [
    Case(position=(position,), combine=combine, topk=topk, moe_every=moe_every, num_groups=1 if moe_every == 4 else 2)
    for position, combine, topk, moe_every in itertools.product(
        ("pos1", "pos2", "pos3"), ("add", "cg1", "cg2"), (1, 2), (1, 2, 4)
    )
    if moe_every > 1 or position == "pos1"
] + [
    Case(shortcut="dgmoe", position=(position,), moe_every=moe_every, num_groups=1 if moe_every == 4 else 2)
    for position, moe_every in (("pos1", 1), ("pos1", 2), ("pos2", 2), ("pos3", 2), ("pos2", 4))
]


@pytest.mark.parametrize(
    "case", ARCHITECTURES, ids=lambda c: f"{c.shortcut}-{c.position[0]}-{c.combine}-top{c.topk}-every{c.moe_every}"
)
def test_group_equals_reference(case):
    assert largest_difference(run(case), run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("ep", [1, 2])
def test_shared_moe_equals_reference(ep):
    """DGMoE-Share: each pair of groups has one MoE, whose gradients are those of both."""
    case = Case(shortcut="dgmoe", num_groups=4, share_groups=2)
    assert largest_difference(run(case, ep), run_reference(case.reference_config())) < 1e-5


def test_position_per_group_equals_reference():
    case = Case(position=("pos1", "pos2", "pos3"), num_groups=3)
    assert largest_difference(run(case, 2), run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("change", [{"position": ("pos1",)}, {"position": ("pos3",)}, {"combine": "add"}])
def test_another_wiring_is_noticed(change):
    """Negative control: the reference of another position, or without the gate, is far away."""
    case = Case()
    changed = models.reference_parameters(case.replace(**change).reference_config())
    loss, _ = reference.loss_and_gradients(changed, *models.batch(), case.replace(**change).reference_config())
    assert (run(case)[0] - loss).abs().max() > 1e-3


@pytest.mark.parametrize("ep", [2, 4])
def test_expert_parallel_ranks_agree_with_one(ep):
    case = Case(topk=2)
    assert largest_difference(run(case, ep), run(case)) < 1e-5
