"""Hybrid models against a slow one that is written from the formulas: loss and every gradient, on one rank and two."""

from __future__ import annotations

import dataclasses
import itertools

import hybrids
import models
import pytest
import ranks
import reference_pattern
import torch
import torch.distributed as dist
from cases import cases
from models import Case
from reference_pattern import PatternConfig
from torch import Tensor

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2)}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 6, "mamba_num_groups": 2}
CASES = {
    # two groups each, of one to three ops before the MoE; layers behind the last one belong to none
    "M*-EME-": Case(position=("pos1",), combine="add", topk=2),
    "-M*E*ME": Case(position=("pos2",)),
    "*M-EM*-EM*": Case(position=("pos3",), combine="cg2", chunks=2),
    "M-*E-ME": Case(shortcut="dgmoe"),
    "*-*E-*E": Case(position=("pos2",), topk=2),
    "MEME": Case(position=("pos1",)),
}
type Results = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def trained(case: Case, pattern: str) -> Results:
    """On a rank: its losses, gradients of the mean loss over the whole batch, and parameters, by global names."""
    model = hybrids.new(case, pattern, **MAMBA)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(models.parameter(models.global_name(name), tuple(value.shape)))
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels)
    (loss.sum() / (models.BATCH_SIZE * models.SEQ_LENGTH)).backward()
    gradients, parameters = {}, {}
    for name, value in model.named_parameters():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        if "local_experts" not in name:
            dist.all_reduce(gradient)
        gradients[models.global_name(name)] = gradient
        parameters[models.global_name(name)] = value.detach()
    return loss.detach(), gradients, parameters


def of_ranks(case: Case, pattern: str, size: int) -> Results:
    results = ranks.run(trained, size, case, pattern, layout=EP[size])
    losses, gradients, parameters = zip(*results, strict=True)
    merged = [{name: tensor for part in parts for name, tensor in part.items()} for parts in (gradients, parameters)]
    return torch.cat(losses), *merged


def expected(case: Case, pattern: str, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    sizes = case.reference_config()
    fields = {field.name: getattr(sizes, field.name) for field in dataclasses.fields(sizes)}
    cfg = PatternConfig(
        **fields,
        pattern=pattern,
        mamba_heads=MAMBA["mamba_num_heads"],
        mamba_groups=MAMBA["mamba_num_groups"],
        mamba_state=MAMBA["mamba_state_dim"],
    )
    return reference_pattern.loss_and_gradients(parameters, *models.batch(), cfg)


def largest_difference(found: Results, loss: Tensor, gradients: dict[str, Tensor]) -> float:
    """Relative to the largest value of each tensor."""
    assert found[1].keys() == gradients.keys()
    pairs = [(found[0], loss), *((found[1][name], gradients[name]) for name in gradients)]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


QUICK = {("M*-EME-", 2), ("M-*E-ME", 1)}


@pytest.mark.parametrize(("pattern", "size"), cases(itertools.product(CASES, EP), QUICK))
def test_hybrid_model_equals_reference(pattern, size):
    found = of_ranks(CASES[pattern], pattern, size)
    loss, gradients = expected(CASES[pattern], pattern, found[2])
    assert largest_difference(found, loss, gradients) < 1e-5
    unused = {name for name, gradient in gradients.items() if not gradient.any()}
    assert all("local_experts" in name for name in unused), unused


@pytest.mark.parametrize("position", cases(("pos2", "pos3"), {"pos2"}))
def test_another_position_is_noticed(position):
    """Negative control: the first group has three ops."""
    pattern = "M*-E*-ME"
    found = of_ranks(Case(position=("pos1",)), pattern, 1)
    loss, _ = expected(Case(position=(position, "pos1")), pattern, found[2])
    assert (found[0] - loss).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", cases(("A_log", "D", "dt_bias", "conv1d_weight", "conv1d_bias", "norm.weight"), {"A_log"})
)
def test_another_mamba_layer_is_noticed(name):
    """Negative control: every parameter of the mixer has a part in the loss."""
    pattern = "-M*E*ME"
    found = of_ranks(CASES[pattern], pattern, 1)
    changed = {key: value + 0.3 * key.endswith(f"mixer.{name}") for key, value in found[2].items()}
    loss, _ = expected(CASES[pattern], pattern, changed)
    assert (found[0] - loss).abs().max() > 1e-4
