"""Overlap changes nothing but time: bit-equal results, the plan's order, and hidden communication."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import cases
from models import Case

from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.plan import (
    ADD,
    ATTENTION,
    CORE_ATTENTION,
    DECODE,
    ENCODE,
    EXPERTS,
    FINISH_COMBINE,
    FINISH_DISPATCH,
    MLP,
    ROUTE,
    SHARED_EXPERT,
    START_COMBINE,
    START_DISPATCH,
    WAIT,
    Step,
    backward_order,
    even_plan,
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


@functools.lru_cache(maxsize=32)
def run(case: Case, ep: int, **kwargs):
    """By rank: losses and gradients of one step. Many tests compare with the same one, and none changes it."""
    return ranks.run(models.losses_and_gradients, ep, case, layout=EP[ep], **kwargs)


SLOTS_OF_POS2 = [(shortcut, "pos2", slot) for shortcut, position, slot in POSITION_AND_SLOT if position == "pos2"]
QUICK_SLOTS = [*SLOTS_OF_POS2, ("scmoe", "pos1", 1), ("scmoe", "pos3", 5), ("dgmoe", "pos1", 2), ("dgmoe", "pos3", 1)]


@pytest.mark.parametrize(("shortcut", "position", "slot"), cases(POSITION_AND_SLOT, QUICK_SLOTS))
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


@pytest.mark.parametrize(
    "changes",
    [
        {"topk": 2, "chunks": 2},
        {"dtype": torch.bfloat16},
        {"shortcut": "dgmoe"},
        {"capacity": 0.5, "topk": 2},
        {"router": "longcat", "zero_experts": 3, "topk": 3, "combine": "add"},
        {"recompute": "full"},
    ],
    ids=("chunks", "bf16", "dgmoe", "capacity", "zero experts", "recompute"),
)
def test_weights_apart_equal_weights_beside_their_tokens(changes):
    """With capacity and zero experts ranks send unlike numbers of rows, and agree on the form all the same."""
    assert_bit_equal(run(Case(**changes, weights_apart_above=0.0), 2), run(Case(**changes), 2))


def forms(case: Case) -> list[int]:
    """Tensors of each all-to-all of a forward, by width: one of tokens, one of both, or one of weights."""
    model = models.build(case)
    widths = []
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda output, sent, *args, **kwargs: (
        widths.append(sent[:1].nbytes) or original(output, sent, *args, **kwargs)
    )
    ((tokens, labels, positions),) = models.my_batch()
    try:
        model(tokens, positions, None, labels=labels)
    finally:
        dist.all_to_all_single = original
    return widths


def test_a_size_decides_whether_weights_travel_apart():
    """12 tokens of a rank, two experts each, 16 numbers of 4 bytes: in two chunks 768 bytes."""
    beside, apart = [64 + 16, 64 + 16, 64, 64], [64, 4, 64, 4, 64, 64]
    for limit, widths in ((768, beside), (767, apart), (0, apart), (float("inf"), beside)):
        case = Case(num_groups=1, topk=2, chunks=2, weights_apart_above=limit / 2**20)
        assert ranks.run(forms, 2, case, layout=EP[2]) == [widths] * 2


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


OPS = {
    "scmoe": [ATTENTION, MLP, ATTENTION, SHARED_EXPERT, ADD],
    "dgmoe": [ATTENTION, MLP, ATTENTION, ADD],
}
TAP = {"pos1": 2, "pos2": 1, "pos3": 0}
SPANS = {
    # two groups of two blocks, pos2: shortcut and landing -> shape
    ("scmoe", 1): SpanShape(10, (RoutedCall(1, landing=6, late=True), RoutedCall(6, landing=9, group=1))),
    ("dgmoe", 2): SpanShape(
        8,
        (
            RoutedCall(1, landing=6, late=True),
            RoutedCall(3, landing=6, late=True),
            RoutedCall(5, landing=7, group=1),
            RoutedCall(7, landing=7, group=1),
        ),
    ),
}
CHUNKED = [
    ("scmoe", "pos1", "1,3"),
    ("scmoe", "pos2", "1,1"),
    ("scmoe", "pos2", "1,2,4,4"),
    ("scmoe", "pos3", "2,5"),
    ("dgmoe", "pos2", "1,3"),
]


def shape_of(shortcut: str, position: str) -> SpanShape:
    """Of one group of two blocks: dgmoe's second gate reads at its end."""
    end = len(OPS[shortcut]) - 1
    taps = (TAP[position], end) if shortcut == "dgmoe" else (TAP[position],)
    calls = tuple(RoutedCall(tap, landing=end) for tap in taps)
    attentions = frozenset(place for place, name in enumerate(OPS[shortcut]) if name == ATTENTION)
    return SpanShape(end + 1, calls, attentions=attentions)


def plan_of(shortcut: str, *slots: int) -> Plan:
    """These slots, and the only ones that dgmoe's second gate has."""
    return Plan((slots, (1,) * len(slots)) if shortcut == "dgmoe" else (slots,))


def order_of(marks, *, backward: bool) -> list[Step]:
    """The steps of one pass of the only span, as they were recorded between its begin and its end."""
    from megatron_scmoe.overlap.observe import BEGIN, END

    first, *steps, last = (mark for mark in marks if mark.backward is backward)
    assert (first.name, last.name) == (BEGIN, END)
    return [Step(mark.name, mark.index, mark.call) for mark in steps]


def recorded_order(case: Case, launch: Launch = Launch.BEFORE) -> tuple[list[Step], list[Step]]:
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    models.launch_at(model, launch)
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as recorded:
        model(tokens, positions, None, labels=labels).sum().backward()
    forward, backward = (order_of(recorded.marks, backward=direction) for direction in (False, True))
    assert observe._listeners == []
    return forward, backward


@pytest.mark.parametrize(("shortcut", "position", "slot"), POSITION_AND_SLOT)
@pytest.mark.parametrize("ep", cases([2, 4], [2]))
def test_recorded_order_is_the_plans(shortcut, position, slot, ep):
    case = Case(shortcut=shortcut, position=(position,), num_groups=1, expert_slot=(slot,))
    of_plan = OPS[shortcut], shape_of(shortcut, position), plan_of(shortcut, slot)
    for forward, backward in ranks.run(recorded_order, ep, case, layout=EP[ep]):
        assert forward == forward_order(*of_plan)
        assert backward == backward_order(*of_plan)


@pytest.mark.parametrize(("shortcut", "position", "slots"), CHUNKED)
def test_recorded_order_of_chunks_is_the_plans(shortcut, position, slots):
    case = Case(
        shortcut=shortcut, position=(position,), num_groups=1, expert_slot=(slots,), chunks=slots.count(",") + 1
    )
    of_plan = OPS[shortcut], shape_of(shortcut, position), plan_of(shortcut, *map(int, slots.split(",")))
    for forward, backward in ranks.run(recorded_order, 2, case, layout=EP[2]):
        assert forward == forward_order(*of_plan)
        assert backward == backward_order(*of_plan)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("shortcut", "landing"), SPANS)
def test_recorded_order_of_a_span_is_the_plans(shortcut, landing, chunks):
    case = Case(shortcut=shortcut, span=2, landing=landing, chunks=chunks)
    shape = SPANS[shortcut, landing]
    of_plan = OPS[shortcut] * 2, shape, even_plan(shape, chunks)
    for forward, backward in ranks.run(recorded_order, 2, case, layout=EP[2]):
        assert forward == forward_order(*of_plan)
        assert backward == backward_order(*of_plan)


def test_order_of_pos2_by_hand():
    """What design and picture say of the default plan, spelled out once."""
    shape = SpanShape(5, (RoutedCall(tap=1, landing=4),))
    assert [step.name for step in forward_order(OPS["scmoe"], shape, Plan(((2,),)))] == [
        "attention",
        ROUTE,
        ENCODE,
        WAIT,
        START_DISPATCH,
        "MLP",
        FINISH_DISPATCH,
        EXPERTS,
        START_COMBINE,
        "attention",
        "shared expert",
        FINISH_COMBINE,
        DECODE,
        "add",
    ]
    assert [step.name for step in backward_order(OPS["scmoe"], shape, Plan(((4,),)))] == [
        "add",
        DECODE,
        START_COMBINE,
        FINISH_COMBINE,
        EXPERTS,
        START_DISPATCH,
        "shared expert",
        "attention",
        "MLP",
        FINISH_DISPATCH,
        ENCODE,
        ROUTE,
        "attention",
    ]


def test_order_of_two_chunks_by_hand():
    """Both chunks take off at the tap; each has a slot of its own, and the last to take off is the first to return."""
    shape = SpanShape(3, (RoutedCall(tap=0, landing=2),))
    assert forward_order(["MLP", "shared expert", "add"], shape, Plan(((1, 3),))) == [
        (ROUTE, 0, 0),
        (ENCODE, 0, 0),
        (WAIT, 0, 0),
        (START_DISPATCH, 0, 0),
        (ENCODE, 1, 0),
        (START_DISPATCH, 1, 0),
        (FINISH_DISPATCH, 0, 0),
        (EXPERTS, 0, 0),
        (START_COMBINE, 0, 0),
        ("MLP", 0, None),
        ("shared expert", 1, None),
        (FINISH_DISPATCH, 1, 0),
        (EXPERTS, 1, 0),
        (START_COMBINE, 1, 0),
        (FINISH_COMBINE, 0, 0),
        (DECODE, 0, 0),
        (FINISH_COMBINE, 1, 0),
        (DECODE, 1, 0),
        ("add", 2, None),
    ]
    backward = backward_order(["MLP", "add"], SpanShape(2, (RoutedCall(tap=0, landing=1),)), Plan(((1, 2),)))
    assert backward[:5] == [
        ("add", 1, None),
        (DECODE, 1, 0),
        (START_COMBINE, 1, 0),
        (DECODE, 0, 0),
        (START_COMBINE, 0, 0),
    ]


CALLS = SpanShape(4, (RoutedCall(0, landing=2, late=True), RoutedCall(1, landing=1), RoutedCall(2, landing=3)))


def test_order_of_several_calls_by_hand():
    """At one place: what lands late, what takes off, the experts by the number of their call, what lands in the op."""
    names = ["attention", "add", "attention", "add"]
    assert forward_order(names, CALLS, Plan(((3,), (1,), (1,)))) == [
        (ROUTE, 0, 0),
        (ENCODE, 0, 0),
        (WAIT, 0, 0),
        (START_DISPATCH, 0, 0),
        ("attention", 0, None),
        (ROUTE, 0, 1),
        (ENCODE, 0, 1),
        (WAIT, 0, 1),
        (START_DISPATCH, 0, 1),
        (FINISH_DISPATCH, 0, 1),
        (EXPERTS, 0, 1),
        (START_COMBINE, 0, 1),
        (FINISH_COMBINE, 0, 1),
        (DECODE, 0, 1),
        ("add", 1, None),
        (FINISH_DISPATCH, 0, 0),
        (EXPERTS, 0, 0),
        (START_COMBINE, 0, 0),
        (FINISH_COMBINE, 0, 0),
        (DECODE, 0, 0),
        (ROUTE, 0, 2),
        (ENCODE, 0, 2),
        (WAIT, 0, 2),
        (START_DISPATCH, 0, 2),
        (FINISH_DISPATCH, 0, 2),
        (EXPERTS, 0, 2),
        (START_COMBINE, 0, 2),
        ("attention", 2, None),
        (FINISH_COMBINE, 0, 2),
        (DECODE, 0, 2),
        ("add", 3, None),
    ]
    at_once = [step for step in forward_order(names, CALLS, Plan(((2,), (1,), (2,)))) if step.name == EXPERTS]
    assert at_once == [(EXPERTS, 0, 0), (EXPERTS, 0, 1), (EXPERTS, 0, 2)]


@pytest.mark.parametrize("slots", [(), (0,), (2, 1)])
def test_plan_refuses_slots_that_no_call_has(slots):
    with pytest.raises(ValueError, match="slots from 1 that never decrease"):
        Plan(((1,) * len(slots), slots))


@pytest.mark.parametrize("slots", [(), ((1,), (1, 1))])
def test_plan_refuses_calls_that_do_not_go_together(slots):
    with pytest.raises(ValueError, match="calls with the same number of chunks"):
        Plan(slots)


# --- chunks ------------------------------------------------------------------------------------------------------


def assert_close(one, other) -> None:
    """Equal up to rounding, and not all zero."""
    for (loss, gradients), (other_loss, other_gradients) in zip(one, other, strict=True):
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert all(gradient.abs().sum() > 0 for gradient in one[0][1].values())


@pytest.mark.parametrize(("shortcut", "position", "slots"), CHUNKED)
def test_chunks_change_rounding_only(shortcut, position, slots):
    case = Case(shortcut=shortcut, position=(position,), expert_slot=(slots,), chunks=slots.count(",") + 1)
    off = case.replace(overlap="off", expert_slot=(), chunks=1)
    assert_close(run(case, 2), run(off, 2))


@pytest.mark.parametrize("case", [Case(topk=2, chunks=2), Case(shortcut="dgmoe", chunks=4)], ids=("scmoe-2", "dgmoe"))
def test_chunks_on_four_ranks_change_rounding_only(case):
    assert_close(run(case, 4), run(case.replace(overlap="off", chunks=1), 4))


@pytest.mark.parametrize("shortcut", ["scmoe", "dgmoe"])
def test_chunks_wait_or_not_bit_for_bit(shortcut):
    """At equal chunks the slots change nothing at all."""
    one, other = (Case(shortcut=shortcut, chunks=3, expert_slot=(slots,)) for slots in ("1,1,1", "1,2,3"))
    assert_bit_equal(run(one, 2), run(other, 2))


@pytest.mark.parametrize("recompute", ["full", "core_attn", "shared_experts"])
def test_chunks_under_recompute_equal_chunks_without(recompute):
    case = Case(chunks=2, recompute=recompute)
    assert_bit_equal(run(case, 2), run(case.replace(recompute=None), 2))


def test_more_chunks_than_tokens():
    """A chunk may be empty."""
    case = Case(chunks=17)
    assert models.BATCH_SIZE * models.SEQ_LENGTH // 4 < 17
    assert_close(run(case, 4), run(case.replace(chunks=1, overlap="off"), 4))


# --- launched within or behind the op at the tap -----------------------------------------------------------------

FARSKIP = {"position": ("farskip",), "moe_every": 1, "span": 2, "landing": 1, "expert_slot": (2,)}
LAUNCHED_BEHIND = {
    "pos1": {"position": ("pos1",), "expert_slot": (2,)},
    "pos2": {"expert_slot": (2,)},
    "pos3, last slot": {"position": ("pos3",), "expert_slot": (5,)},
    "chunks": {"chunks": 3, "expert_slot": ("2,2,4",)},
    "dgmoe": {"shortcut": "dgmoe", "expert_slot": (3,)},
    "a late landing": {"span": 2, "landing": 1},
    "farskip": FARSKIP,
    "top-2, weights apart": {"topk": 2, "weights_apart_above": 0.0, "expert_slot": (2,)},
    "bf16": {"dtype": torch.bfloat16, "expert_slot": (3,)},
    "recompute": {"recompute": "full", "expert_slot": (2,)},
    "latents": {"latent": 8, "chunks": 2, "expert_slot": ("2,3",)},
}
LAUNCHED_WITHIN = {
    "pos1": {"position": ("pos1",), "expert_slot": (2,)},
    "pos3, chunks": {"position": ("pos3",), "chunks": 3, "expert_slot": ("2,2,5",)},
    "dgmoe": {"shortcut": "dgmoe", "position": ("pos1",), "expert_slot": (2,)},
    "a late landing": {"position": ("pos1",), "span": 2, "landing": 2, "expert_slot": (2,)},
    "recompute": {"position": ("pos1",), "recompute": "full", "expert_slot": (2,)},
    "recompute of core attention": {"position": ("pos1",), "recompute": "core_attn", "expert_slot": (2,)},
}
LAUNCHED_ASIDE = [
    pytest.param(launch, changes, id=f"{launch}, {name}")
    for launch, kinds in ((Launch.BEHIND, LAUNCHED_BEHIND), (Launch.WITHIN, LAUNCHED_WITHIN))
    for name, changes in kinds.items()
]


@pytest.mark.parametrize(("launch", "changes"), LAUNCHED_ASIDE)
def test_launched_elsewhere_equals_launched_before(launch, changes):
    case = Case(**changes)
    assert_bit_equal(run(case, 2, launch=launch), run(case, 2))


def test_several_micro_batches_launched_behind_equal_off():
    case = Case(shortcut="dgmoe", expert_slot=(2,))
    off = case.replace(overlap="off", expert_slot=())
    assert_bit_equal(run(case, 2, num_micro_batches=2, launch=Launch.BEHIND), run(off, 2, num_micro_batches=2))


def test_what_has_to_know_the_counts_is_never_launched_behind():
    """Packed behind the op at the tap, its gradient would be waited for before that op's backward."""
    shapes = ranks.run(shapes_of_spans, 2, layout=EP[2])[0]
    assert shapes == {"tokens": False, "capacity": True, "zero experts": True, "lsh": True, "unique": True}


def shapes_of_spans() -> dict[str, bool]:
    cases = {
        "tokens": Case(),
        "capacity": Case(capacity=1.0),
        "zero experts": Case(router="longcat", zero_experts=3, topk=3, combine="add"),
        "lsh": Case(codec="lsh"),
        "unique": Case(topk=2, unique="rank"),
    }
    found = {}
    for name, case in cases.items():
        shape = models.build(case).decoder.layers[-1].span.shape
        assert bool(shape.launched_aside(Launch.BEHIND)) != shape.waits_to_pack
        assert shape.has(Plan(((2,),), launch=Launch.BEHIND)) != shape.waits_to_pack
        assert not shape.has(Plan(((2,),), launch=Launch.WITHIN))  # an MLP has no place for it
        found[name] = shape.waits_to_pack
    return found


@pytest.mark.parametrize(
    ("shortcut", "position", "slots", "launch"),
    [
        ("scmoe", "pos2", (2,), Launch.BEHIND),
        ("scmoe", "pos1", (2,), Launch.BEHIND),
        ("scmoe", "pos2", (2, 4), Launch.BEHIND),
        ("dgmoe", "pos2", (3, 3), Launch.BEHIND),
        ("scmoe", "pos1", (2, 3), Launch.WITHIN),
        ("dgmoe", "pos3", (3,), Launch.WITHIN),
    ],
)
def test_recorded_order_of_a_launch_is_the_plans(shortcut, position, slots, launch):
    slot = (",".join(map(str, slots)),)
    case = Case(shortcut=shortcut, position=(position,), num_groups=1, expert_slot=slot, chunks=len(slots))
    plan = plan_of(shortcut, *slots)
    of_plan, *others = (
        (OPS[shortcut], shape_of(shortcut, position), dataclasses.replace(plan, launch=its))
        for its in (launch, *(set(Launch) - {launch}))
    )
    for forward, backward in ranks.run(recorded_order, 2, case, launch, layout=EP[2]):
        assert forward == forward_order(*of_plan)
        assert forward not in [forward_order(*other) for other in others if other[1].has(other[2])]
        assert backward == backward_order(*of_plan) == backward_order(*others[0])


def test_order_of_a_launch_behind_by_hand():
    shape = SpanShape(3, (RoutedCall(tap=0, landing=2),))
    assert forward_order(["MLP", "shared expert", "add"], shape, Plan(((2, 3),), launch=Launch.BEHIND)) == [
        (ROUTE, 0, 0),
        (ENCODE, 0, 0),
        (ENCODE, 1, 0),
        ("MLP", 0, None),
        (WAIT, 0, 0),
        (START_DISPATCH, 0, 0),
        (START_DISPATCH, 1, 0),
        (FINISH_DISPATCH, 0, 0),
        (EXPERTS, 0, 0),
        (START_COMBINE, 0, 0),
        ("shared expert", 1, None),
        (FINISH_DISPATCH, 1, 0),
        (EXPERTS, 1, 0),
        (START_COMBINE, 1, 0),
        (FINISH_COMBINE, 0, 0),
        (DECODE, 0, 0),
        (FINISH_COMBINE, 1, 0),
        (DECODE, 1, 0),
        ("add", 2, None),
    ]


def test_order_of_a_launch_within_by_hand():
    """The op at the tap is two steps in forward, whatever the plan, and one in backward; other attentions are one."""
    ops, shape = ["attention", "attention", "add"], SpanShape(3, (RoutedCall(0, 2),), attentions=frozenset({0, 1}))
    within, before, behind = (
        [step.name for step in forward_order(ops, shape, Plan(((2,),), launch=launch))]
        for launch in (Launch.WITHIN, Launch.BEFORE, Launch.BEHIND)
    )
    launch, rest = [WAIT, START_DISPATCH], [FINISH_DISPATCH, EXPERTS, START_COMBINE, "attention", FINISH_COMBINE]
    rest += [DECODE, "add"]
    assert within == [ROUTE, ENCODE, "attention", *launch, CORE_ATTENTION, *rest]
    assert before == [ROUTE, ENCODE, *launch, "attention", CORE_ATTENTION, *rest]
    assert behind == [ROUTE, ENCODE, "attention", CORE_ATTENTION, *launch, *rest]
    backward = [step.name for step in backward_order(ops, shape, Plan(((2,),), launch=Launch.WITHIN))]
    assert backward[-4:] == ["attention", FINISH_DISPATCH, ENCODE, ROUTE] and CORE_ATTENTION not in backward


def launches_of_a_step(recompute: str | None) -> list[str]:
    """What a step with a launch within attention did, in its order, and whether anybody listens afterwards."""
    from megatron_scmoe.dispatch.flights import Flights

    model = models.build(Case(num_groups=1, position=("pos1",), expert_slot=(2,), recompute=recompute))
    models.launch_at(model, Launch.WITHIN)
    attention = model.decoder.layers[1].self_attention
    steps: list[str] = []
    launch = Flights.launch
    Flights.launch = lambda flights: (steps.append("launch"), launch(flights))[1]
    attention.linear_qkv.register_forward_hook(lambda *_: steps.append("projections"))
    core_attention = type(attention.core_attention).forward
    type(attention.core_attention).forward = lambda core, *args, **options: (
        steps.append("core") if core is attention.core_attention else None,
        core_attention(core, *args, **options),
    )[1]
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels).sum()
    steps.append("backward")
    loss.backward()
    assert not attention.core_attention._forward_pre_hooks
    return steps


@pytest.mark.parametrize(
    ("recompute", "in_backward"),
    [(None, []), ("core_attn", ["core"]), ("full", ["projections", "launch", "core"])],
)
def test_attention_launches_once_a_forward(recompute, in_backward):
    """Core attention that runs again alone launches nothing; a group that does so launches as it did."""
    once = ["projections", "launch", "core"]
    assert ranks.run(launches_of_a_step, 2, recompute, layout=EP[2]) == [[*once, "backward", *in_backward]] * 2


def attention_without_its_core() -> str:
    from megatron_scmoe.dispatch.exchange import ExchangeOrderError

    model = models.build(Case(num_groups=1, position=("pos1",), expert_slot=(2,)))
    models.launch_at(model, Launch.WITHIN)
    core = model.decoder.layers[1].self_attention.core_attention
    type(core).__call__ = type(core).forward  # no hooks, as of a kernel that is called directly
    ((tokens, labels, positions),) = models.my_batch()
    try:
        model(tokens, positions, None, labels=labels)
    except ExchangeOrderError as error:
        return str(error)
    return ""


def test_an_attention_that_passes_by_its_core_attention_is_noticed():
    """Negative control: it launches nothing, and what waits for that says so instead of hanging."""
    words = "dispatch of call 0 (forward) is announced and cannot become finished"
    assert all(words in text for text in ranks.run(attention_without_its_core, 2, layout=EP[2]))


class NamedStream:
    """A stream of which can be told what was done under it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited_for: list[str] = []

    def wait_stream(self, stream: NamedStream) -> None:
        pass

    def wait_event(self, event: str) -> None:
        self.waited_for.append(event)

    def record_event(self) -> str:
        return f"event of {self.name} behind {len(STREAM_LOG)} steps"


STREAM_LOG: list[tuple[str, str]] = []
"""What was done, and the stream that was current."""


def streams_of_a_forward(launch: Launch) -> tuple[list[tuple[str, str]], list[str]]:
    """What a forward did under which stream, and what the stream beside the main one waited for."""
    from megatron_scmoe.dispatch import exchange

    main, aside = NamedStream("main"), NamedStream("aside")
    current = [main]

    @contextlib.contextmanager
    def under(stream):
        current.append(stream if isinstance(stream, NamedStream) else main)
        yield
        current.pop()

    def log(step: str) -> None:
        STREAM_LOG.append((step, current[-1].name))

    def collective(*args, **kwargs):
        log("all-to-all")
        return LoggedWork(original(*args, **kwargs), log)

    original, new_empty = dist.all_to_all_single, torch.Tensor.new_empty
    torch.cuda.current_stream, torch.cuda.stream = lambda: current[-1], under
    exchange._aside = lambda: aside
    torch.Tensor.record_stream = lambda _tensor, stream: log(f"used by {stream.name}")
    dist.all_to_all_single = collective
    torch.Tensor.new_empty = lambda tensor, size, **kwargs: (
        isinstance(size, tuple) and log("allocate"),
        new_empty(tensor, size, **kwargs),
    )[1]
    case = Case(num_groups=1, expert_slot=(2,))
    model = models.build(case)
    models.launch_at(model, launch)
    model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: log("MLP"))
    model.decoder.layers[1].mlp.experts.register_forward_pre_hook(lambda *_: log("experts"))
    ((tokens, labels, positions),) = models.my_batch()
    model(tokens, positions, None, labels=labels)
    return STREAM_LOG, aside.waited_for


class LoggedWork:
    def __init__(self, work: dist.Work, log) -> None:
        self._work, self._log = work, log

    def wait(self) -> None:
        self._log("wait")
        self._work.wait()


def test_a_launch_behind_goes_by_a_stream_that_waits_for_what_was_packed_alone():
    combine = [("allocate", "main"), ("all-to-all", "main"), ("wait", "main")]
    for log, waited_for in ranks.run(streams_of_a_forward, 2, Launch.BEHIND, layout=EP[2]):
        dispatch = [("allocate", "aside"), ("all-to-all", "aside"), ("used by main", "main")]
        assert log == [("MLP", "main"), *dispatch, ("wait", "main"), ("experts", "main"), *combine]
        assert waited_for == ["event of main behind 0 steps"]  # before the MLP
    for log, waited_for in ranks.run(streams_of_a_forward, 2, Launch.BEFORE, layout=EP[2]):
        dispatch = [("allocate", "main"), ("all-to-all", "main")]
        assert log == [*dispatch, ("MLP", "main"), ("wait", "main"), ("experts", "main"), *combine]
        assert waited_for == []


# --- communication is hidden -------------------------------------------------------------------------------------

COLLECTIVE_S = 0.15
DENSE_OP_S = 0.08


class SlowWork:
    """A collective that is done ``COLLECTIVE_S`` after its launch, whoever waits and when."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._done_at = time.perf_counter() + COLLECTIVE_S

    def get_future(self) -> torch.futures.Future:
        return self._work.get_future()

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._done_at - time.perf_counter()))


def slow_step(case: Case) -> dict[str, object]:
    """One step in which every all-to-all and every dense op takes a known time, forward and backward."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    group = model.decoder.layers[-1]
    sleep = lambda *_: time.sleep(DENSE_OP_S)  # noqa: E731
    for module in (group.self_attention, model.decoder.layers[0].mlp, group.mlp.shared_experts):
        module.register_forward_pre_hook(sleep)
        module.register_full_backward_pre_hook(sleep)
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: SlowWork(original(*args, **kwargs))
    ((tokens, labels, positions),) = models.my_batch()
    try:
        with observe.recording() as recorded:
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
        "forward": [step.name for step in order_of(recorded.marks, backward=False)],
        "backward": [step.name for step in order_of(recorded.marks, backward=True)],
    }


def between(order: list[str], first: str, last: str) -> list[str]:
    return order[order.index(first) + 1 : order.index(last)]


def hidden_well(elapsed_s: float) -> bool:
    """Whether the time of one direction is clearly below the sum of two collectives and three dense ops."""
    in_sequence = 2 * COLLECTIVE_S + 3 * DENSE_OP_S
    return elapsed_s < in_sequence - 0.8 * 2 * DENSE_OP_S


@pytest.mark.alone
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
