"""No token of DGMoE uses one expert twice, whatever the scores are."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import ranks
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

SCORES = {
    "ties": st.sampled_from((-1.0, 0.0, 1.0)),
    "extremes": st.sampled_from((-3e38, -1e30, -100.0, -1e-30, 0.0, 1e-30, 100.0, 1e30, 3e38)),
    "any": st.floats(-50, 50, width=32),
}
many = settings(
    max_examples=200,
    deadline=None,
    database=None,  # a rank leaves nothing behind
    suppress_health_check=[HealthCheck.too_slow],  # the first example imports
)


class Case(NamedTuple):
    """A router's settings, by the names of Core's configuration, and both gates' scores of n tokens, [n, e]."""

    config: dict[str, object]
    bias: list[float] | None
    preceding: Tensor
    current: Tensor
    training: bool


@st.composite
def configs(draw, num_experts: int) -> dict[str, object]:
    function = draw(st.sampled_from(("softmax", "sigmoid", "sqrtsoftplus")))
    balance = draw(st.sampled_from(("none", "aux_loss", "seq_aux_loss")))
    config = {
        "moe_router_score_function": function,
        "moe_router_pre_softmax": function == "softmax",
        "moe_router_enable_expert_bias": function == "sigmoid" and draw(st.booleans()),
        "moe_router_force_load_balancing": draw(st.sampled_from((False, False, False, True))),
        "moe_router_load_balancing_type": balance,
        "moe_aux_loss_coeff": 0.0 if balance == "none" else 0.01,
    }
    num_groups = draw(st.sampled_from([None, *(n for n in range(1, num_experts + 1) if num_experts % n == 0)]))
    if num_groups is not None:
        config |= {"moe_router_num_groups": num_groups, "moe_router_group_topk": 1}
    if draw(st.booleans()):
        config["moe_expert_capacity_factor"] = draw(st.sampled_from((0.25, 1.0, 2.0)))
        config["moe_token_drop_policy"] = draw(st.sampled_from(("probs", "position")))
        config["moe_pad_expert_input_to_capacity"] = draw(st.booleans())
    return config


@st.composite
def cases(draw) -> Case:
    num_experts, num_tokens = draw(st.integers(2, 8)), draw(st.integers(1, 6))
    config = draw(configs(num_experts))
    bias = None
    if config["moe_router_enable_expert_bias"]:
        bias = draw(st.lists(st.floats(-2, 2, width=32), min_size=num_experts, max_size=num_experts))
    row = st.lists(SCORES[draw(st.sampled_from(sorted(SCORES)))], min_size=num_experts, max_size=num_experts)
    scores = st.lists(row, min_size=num_tokens, max_size=num_tokens)
    preceding = draw(scores)
    current = draw(st.one_of(st.just(preceding), scores))  # gates that agree, and any
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    preceding, current = (torch.tensor(rows, dtype=dtype) for rows in (preceding, current))
    return Case(config, bias, preceding, current, draw(st.booleans()))


def router_of(case: Case):
    """A router whose scores are what it reads: its weight is the identity."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_scmoe.layers.router import DualGateRouter

    num_experts = case.preceding.shape[1]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_experts,
        num_attention_heads=1,
        num_moe_experts=num_experts,
        moe_router_topk=1,
        add_bias_linear=False,
        **case.config,
    )
    router = DualGateRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
        if case.bias is not None:
            router.expert_bias.copy_(torch.tensor(case.bias))
    return router.train(case.training)


def check(case: Case) -> None:
    router = router_of(case)
    one, two = case.preceding.unsqueeze(1), case.current.unsqueeze(1)  # [s, b = 1, h = e]
    preceding = router(one)
    current = router(two, preceding=preceding)
    if not case.config["moe_router_force_load_balancing"]:
        assert torch.equal(preceding.logits, case.preceding) and torch.equal(current.logits, case.current)
    for gate in (preceding, current):
        assert (gate.chosen.sum(dim=1) == 1).all()
    used = preceding.chosen.int() + current.chosen.int()
    assert used.max() == 1, "a token chose one expert twice"
    assert (used.sum(dim=1) == 2).all()
    assert not ((preceding.probs != 0) & (current.probs != 0)).any(), "an expert weighs in a token twice"
    if "moe_expert_capacity_factor" not in case.config:
        assert torch.equal(preceding.routing_map, preceding.chosen)
        assert torch.equal(current.routing_map, current.chosen)
    elif not case.config["moe_pad_expert_input_to_capacity"]:  # padding brings experts tokens of weight 0
        routed = preceding.routing_map.int() + current.routing_map.int()
        assert routed.max() <= 1, "a token travels to one expert twice"
        assert (routed.sum(dim=1) <= 2).all()


def no_expert_twice() -> None:
    many(given(cases())(check))()


def without_the_mask() -> None:
    from megatron_scmoe.layers import router

    router._without = lambda taken, scores: scores
    no_expert_twice()


def test_no_token_uses_one_expert_twice():
    ranks.run(no_expert_twice, 1, layout={})


def test_without_the_mask_it_would():
    """Negative control."""
    with pytest.raises(ranks.RankError, match="a token chose one expert twice"):
        ranks.run(without_the_mask, 1, layout={})
