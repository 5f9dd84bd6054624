"""Overlap changes nothing but time: bit-equal results, the plan's order, and hidden communication."""

from __future__ import annotations

import time

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from models import Case

from megatron_scmoe.plan import (
    CURRENT,
    EXPERTS,
    FINISH_COMBINE,
    FINISH_DISPATCH,
    START_COMBINE,
    START_DISPATCH,
    Plan,
    backward_order,
    forward_order,
)

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2, 4)}
NUM_SLOTS = {"pos1": 3, "pos2": 4, "pos3": 5}
POSITION_AND_SLOT = [
    (shortcut, position, slot)
    for shortcut in ("scmoe", "dgmoe")
    for position, slots in NUM_SLOTS.items()
    for slot in range(1, slots + 1 - (shortcut == "dgmoe"))
]


def assert_bit_equal(one, other) -> None:
    for (loss, gradients), (other_loss, other_gradients) in zip(one, other, strict=True):
        assert torch.equal(loss, other_loss)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, other_gradients[name]), name
    assert all(gradient.abs().sum() > 0 for gradient in one[0][1].values())


def run(case: Case, ep: int, **kwargs):
    return ranks.run(models.losses_and_gradients, ep, case, layout=EP[ep], **kwargs)


@pytest.mark.parametrize(("shortcut", "position", "slot"), POSITION_AND_SLOT)
def test_every_slot_equals_off(shortcut, position, slot):
    case = Case(shortcut=shortcut, position=(position,), expert_slot=(slot,))
    assert_bit_equal(run(case, 2), run(case.replace(overlap="off", expert_slot=()), 2))


@pytest.mark.parametrize(
    "case",
    [
        Case(combine="add", topk=2, expert_slot=(3,)),
        Case(combine="cg2", topk=2, expert_slot=(3,)),
        Case(shortcut="dgmoe", expert_slot=(3,)),
        Case(shortcut="dgmoe", share_groups=2, expert_slot=(3,)),
    ],
    ids=("add", "cg2", "dgmoe", "dgmoe-share"),
)
def test_four_ranks_equal_off(case):
    assert_bit_equal(run(case, 4), run(case.replace(overlap="off", expert_slot=()), 4))


@pytest.mark.parametrize(
    ("shortcut", "recompute"),
    [
        *[("scmoe", recompute) for recompute in ("full", "core_attn", "mlp", "shared_experts")],
        *[("dgmoe", recompute) for recompute in ("full", "core_attn", "mlp")],
    ],
)
def test_recompute_equals_off_without_recompute(shortcut, recompute):
    case = Case(shortcut=shortcut, recompute=recompute)
    assert_bit_equal(run(case, 2), run(Case(shortcut=shortcut, overlap="off"), 2))


@pytest.mark.parametrize("shortcut", ["scmoe", "dgmoe"])
def test_several_micro_batches_in_flight_equal_off(shortcut):
    case = Case(shortcut=shortcut, expert_slot=(3,))
    off = case.replace(overlap="off", expert_slot=())
    assert_bit_equal(run(case, 2, num_micro_batches=2), run(off, 2, num_micro_batches=2))


def test_bf16_equals_off():
    case = Case(dtype=torch.bfloat16, moe_every=2)
    assert_bit_equal(run(case, 2), run(case.replace(overlap="off"), 2))


def forward_only(case: Case, frozen: bool) -> torch.Tensor:
    """Without gradients, or with a frozen input and its gradients only in the later layers."""
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    if not frozen:
        with torch.no_grad():
            return model(tokens, positions, None, labels=labels)
    model.embedding.requires_grad_(False)
    model.decoder.layers[0].requires_grad_(False)
    loss = model(tokens, positions, None, labels=labels)
    loss.sum().backward()
    return model.decoder.layers[1].mlp.router.weight.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_without_gradients_and_with_frozen_input_equals_off(frozen):
    case = Case(num_groups=1)
    results = [ranks.run(forward_only, 2, c, frozen, layout=EP[2]) for c in (case, case.replace(overlap="off"))]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.abs().sum() > 0


def all_to_one_rank(case: Case) -> tuple[list[int], torch.Tensor]:
    """A router with equal logits, whose top-1 is the same expert for every token: the other rank's experts get none."""
    model = models.build(case)
    with torch.no_grad():
        for layer in model.decoder.layers[1::2]:
            layer.mlp.router.weight.zero_()
    received = []
    for layer in model.decoder.layers[1::2]:
        layer.mlp.experts.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0].shape[0]))
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels)
    loss.sum().backward()
    return received, model.decoder.layers[0].self_attention.linear_qkv.weight.grad


def test_a_rank_without_tokens():
    case = Case()
    results = ranks.run(all_to_one_rank, 2, case, layout=EP[2])
    all_tokens = models.BATCH_SIZE * models.SEQ_LENGTH
    assert sorted(received for received, _ in results) == [[0, 0], [all_tokens, all_tokens]]
    off = ranks.run(all_to_one_rank, 2, case.replace(overlap="off"), layout=EP[2])
    for (_, gradient), (_, gradient_off) in zip(results, off, strict=True):
        assert torch.equal(gradient, gradient_off) and gradient.abs().sum() > 0


# --- the recorded order ------------------------------------------------------------------------------------------


def mark_dense_backward(group) -> None:
    """Mark the backward of every dense op of ``group`` when the gradient of its output is there."""
    from megatron_scmoe import observe

    for op in group._dense_ops:
        module = {
            "attention": lambda block: block.self_attention,
            "MLP": lambda block: block.mlp,
            "shared expert": lambda block: block.mlp.shared_experts,
        }[op.name](op.norm.args[0])
        module.register_full_backward_pre_hook(lambda *_, name=op.name: observe.mark(name, backward=True))
    # DGMoE calls the experts twice; backward meets the calls in reverse order.
    calls: list[str] = ["", CURRENT] if len(group._dense_ops) % 2 else [""]
    group.mlp.experts.register_full_backward_pre_hook(lambda *_: observe.mark(calls.pop() + EXPERTS, backward=True))


def recorded_order(case: Case) -> tuple[list[str], list[str], list[str], int]:
    from megatron_scmoe import observe

    model = models.build(case)
    group = model.decoder.layers[case.moe_every - 1]
    mark_dense_backward(group)
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as marks:
        model(tokens, positions, None, labels=labels).sum().backward()
    forward = [mark.name for mark in marks if not mark.backward]
    backward = [mark.name for mark in marks if mark.backward]
    assert observe._listeners == []
    return forward, backward, group.dense_op_names, group.tap


@pytest.mark.parametrize(("shortcut", "position", "slot"), POSITION_AND_SLOT)
@pytest.mark.parametrize("ep", [2, 4])
def test_recorded_order_is_the_plans(shortcut, position, slot, ep):
    case = Case(shortcut=shortcut, position=(position,), num_groups=1, expert_slot=(slot,))
    for forward, backward, names, tap in ranks.run(recorded_order, ep, case, layout=EP[ep]):
        plan = Plan(slot=slot, blocking=False)
        assert forward == forward_order(names, tap, plan, second_gate=shortcut == "dgmoe")
        assert backward == backward_order(names, tap, plan, second_gate=shortcut == "dgmoe")


def test_order_of_pos2_by_hand():
    """What design and picture say of the default plan, spelled out once."""
    names = ["attention", "MLP", "attention", "shared expert"]
    assert forward_order(names, 1, Plan(slot=2, blocking=False)) == [
        "attention",
        START_DISPATCH,
        "MLP",
        FINISH_DISPATCH,
        EXPERTS,
        START_COMBINE,
        "attention",
        "shared expert",
        FINISH_COMBINE,
    ]
    assert backward_order(names, 1, Plan(slot=4, blocking=False)) == [
        START_COMBINE,
        FINISH_COMBINE,
        EXPERTS,
        START_DISPATCH,
        "shared expert",
        "attention",
        "MLP",
        FINISH_DISPATCH,
        "attention",
    ]


# --- communication is hidden -------------------------------------------------------------------------------------

COLLECTIVE_S = 0.15
DENSE_OP_S = 0.08


class SlowWork:
    """A collective that is done ``COLLECTIVE_S`` after its launch, whoever waits and when."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._done_at = time.perf_counter() + COLLECTIVE_S

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._done_at - time.perf_counter()))


def slow_step(case: Case) -> dict[str, object]:
    """One step in which every all-to-all and every dense op takes a known time, forward and backward."""
    from megatron_scmoe import observe

    model = models.build(case)
    group = model.decoder.layers[-1]
    sleep = lambda *_: time.sleep(DENSE_OP_S)  # noqa: E731
    for module in (group.self_attention, model.decoder.layers[0].mlp, group.mlp.shared_experts):
        module.register_forward_pre_hook(sleep)
        module.register_full_backward_pre_hook(sleep)
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: SlowWork(original(*args, **kwargs))
    ((tokens, labels, positions),) = models.my_batch()
    mark_dense_backward(group)
    try:
        with observe.recording() as marks:
            dist.barrier()
            begin = time.perf_counter()
            loss = model(tokens, positions, None, labels=labels).sum()
            forward_s = time.perf_counter() - begin
            dist.barrier()
            begin = time.perf_counter()
            loss.backward()
            backward_s = time.perf_counter() - begin
    finally:
        dist.all_to_all_single = original
    return {
        "forward_s": forward_s,
        "backward_s": backward_s,
        "forward": [mark.name for mark in marks if not mark.backward],
        "backward": [mark.name for mark in marks if mark.backward],
    }


def between(order: list[str], first: str, last: str) -> list[str]:
    return order[order.index(first) + 1 : order.index(last)]


def hidden_well(elapsed_s: float) -> bool:
    """Whether the time of one direction is clearly below the sum of two collectives and three dense ops."""
    in_sequence = 2 * COLLECTIVE_S + 3 * DENSE_OP_S
    return elapsed_s < in_sequence - 0.8 * 2 * DENSE_OP_S


def test_communication_is_hidden():
    """pos2 at slot 3: two dense ops lie in the dispatch, one in the combine; in backward the same, mirrored."""
    case = Case(num_groups=1, expert_slot=(3,))
    for step in ranks.run(slow_step, 2, case, layout=EP[2]):
        assert hidden_well(step["forward_s"]) and hidden_well(step["backward_s"])
        assert between(step["forward"], START_DISPATCH, FINISH_DISPATCH) == ["MLP", "attention"]
        assert between(step["forward"], START_COMBINE, FINISH_COMBINE) == ["shared expert"]
        assert between(step["backward"], START_COMBINE, FINISH_COMBINE) == ["shared expert"]
        assert between(step["backward"], START_DISPATCH, FINISH_DISPATCH) == ["attention", "MLP"]


def test_off_hides_nothing():
    """Negative control of the test above."""
    case = Case(num_groups=1, overlap="off")
    for step in ranks.run(slow_step, 2, case, layout=EP[2]):
        assert not hidden_well(step["forward_s"]) and not hidden_well(step["backward_s"])
        assert between(step["forward"], START_DISPATCH, FINISH_DISPATCH) == []
