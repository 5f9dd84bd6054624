"""Megatron's hybrid container: the same group code, so the same numbers as in blocks, bit for bit."""

from __future__ import annotations

import hybrids
import models
import pytest
import ranks
import torch
from models import Case

MAMBA_PATTERN = "M*-EME-"
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
    Case(topk=2, unique="rank", chunks=2),
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


def mamba_model(position: str):
    """A group of Mamba, attention and MLP, one of Mamba alone, and layers behind the last MoE that no group runs."""
    torch.manual_seed(3)
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2}
    return hybrids.new(Case(position=(position, "pos1"), combine="add"), MAMBA_PATTERN, **sizes)


def moe_by_hand(layer, source, current):
    """The shared expert on ``current`` plus the chosen expert on ``source``, token by token."""
    probs, routing_map = layer.mlp.router(source)
    tokens = source.reshape(-1, source.shape[-1])
    routed = []
    for number, token in enumerate(tokens):
        (expert,) = routing_map[number].nonzero().flatten().tolist()
        output, _ = layer.mlp.experts.local_experts[expert](token.view(1, 1, -1))
        routed.append(probs[number, expert] * output.view(-1))
    return layer.mlp.shared_experts(current) + torch.stack(routed).view_as(source)


def by_hand(model, tokens, positions, source_of_first: str):
    """The output of the model's last layer, from its modules and the formula, with no group code."""
    mamba, attention, mlp, moe, second_mamba, second_moe, last = model.decoder.layers
    rotary = model.rotary_pos_emb(models.SEQ_LENGTH)
    entering = model.embedding(tokens, positions)
    behind_mamba = entering + mamba.mixer(mamba.norm(entering))[0]
    attended = attention.self_attention(attention.input_layernorm(behind_mamba), None, rotary_pos_emb=rotary)[0]
    behind_attention = behind_mamba + attended
    behind_mlp = behind_attention + mlp.mlp(mlp.pre_mlp_layernorm(behind_attention))[0]
    sources = {
        "pos1": mlp.pre_mlp_layernorm(behind_attention),
        "pos2": attention.input_layernorm(behind_mamba),
        "pos3": mamba.norm(entering),
    }
    first = behind_mlp + moe_by_hand(moe, sources[source_of_first], moe.pre_mlp_layernorm(behind_mlp))
    read = second_mamba.norm(first)
    second = first + second_mamba.mixer(read)[0]
    second = second + moe_by_hand(second_moe, read, second_moe.pre_mlp_layernorm(second))
    return second + last.mlp(last.pre_mlp_layernorm(second))[0]


def differences(position: str, source: str) -> float:
    """Largest difference of the last hidden state and of all gradients, relative to the largest value of each."""
    model = mamba_model(position)
    tokens, _ = models.batch()
    positions = torch.arange(models.SEQ_LENGTH).expand_as(tokens)
    rotary = model.rotary_pos_emb(models.SEQ_LENGTH)
    layers = model.decoder.layers
    results = []
    for hand in (False, True):
        model.zero_grad()
        if hand:
            output = by_hand(model, tokens, positions, source)
        else:
            output = model.embedding(tokens, positions)
            for layer in layers:
                output = layer(output, rotary_pos_emb=rotary)
                output = output[0] if isinstance(output, tuple) else output
        output.square().sum().backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in model.parameters()]
        results.append([output.detach(), *gradients])
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_groups_with_mamba_layers_equal_the_formula(position):
    (difference,) = ranks.run(differences, 1, position, position, layout=EP[1])
    assert difference < 1e-5


def test_a_mamba_group_that_reads_elsewhere_is_noticed():
    """Negative control."""
    (difference,) = ranks.run(differences, 1, "pos2", "pos3", layout=EP[1])
    assert difference > 1e-3


def test_another_position_is_noticed():
    """Negative control: what the hybrid model computes depends on its position."""
    ((one, _),) = ranks.run(hybrids.losses_and_gradients, 1, Case(position=("pos1",)), layout=EP[1])
    ((other, _),) = ranks.run(hybrids.losses_and_gradients, 1, Case(position=("pos2",)), layout=EP[1])
    assert (one - other).abs().max() > 1e-3
