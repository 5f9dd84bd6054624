"""Spans against the reference: where routed outputs land late, FarSkip's wiring, and one MoE for several groups."""

from __future__ import annotations

import dataclasses

import models
import pytest
import ranks
import reference
import torch
from cases import cases
from models import Case
from test_codec import assert_equals_reference
from test_layer import EP, largest_difference, run, run_reference
from test_overlap import assert_bit_equal
from test_overlap import run as run_ranks

POS1 = Case(position=("pos1",), span=2, landing=1)
POS2 = POS1.replace(position=("pos2",))
POS3 = POS1.replace(position=("pos3",))
EVERY_BLOCK = POS1.replace(moe_every=1)
FARSKIP = EVERY_BLOCK.replace(position=("farskip",), num_groups=4)
DGMOE = POS2.replace(shortcut="dgmoe")
FOUR = {"num_groups": 4, "span": 4}

SPANS = {
    "pos1": POS1,
    "pos1, landing 2, cg2": POS1.replace(landing=2, combine="cg2"),
    "pos1, last landing, add": POS1.replace(landing=3, combine="add"),
    "pos2": POS2,
    "pos2, top-2, cg2": POS2.replace(topk=2, combine="cg2"),
    "pos2, landing 2, add": POS2.replace(landing=2, combine="add"),
    "pos2, last landing, top-2": POS2.replace(landing=3, topk=2),
    "pos2, two spans": POS2.replace(num_groups=4),
    "pos2, four groups, cg2": POS2.replace(**FOUR, combine="cg2"),
    "pos2, four groups, landing 2": POS2.replace(**FOUR, landing=2),
    "pos3": POS3,
    "pos3, landing 2, top-2": POS3.replace(landing=2, topk=2),
    "pos3, last landing, cg2": POS3.replace(landing=3, combine="cg2"),
    "every block": EVERY_BLOCK.replace(num_groups=4),
    "every block, four groups, cg2": EVERY_BLOCK.replace(**FOUR, combine="cg2", topk=2),
    "every third block": POS2.replace(moe_every=3, landing=5),
    "farskip": FARSKIP,
    "farskip, cg2, top-2": FARSKIP.replace(combine="cg2", topk=2),
    "farskip, four groups, add": FARSKIP.replace(span=4, combine="add"),
    "farskip, no span": FARSKIP.replace(span=1, landing=0, num_groups=2),
    "farskip and pos1": FARSKIP.replace(position=("pos1", "farskip", "farskip", "pos1"), span=4, combine="cg2"),
    "dgmoe": DGMOE,
    "dgmoe, last landing": DGMOE.replace(landing=3),
    "dgmoe, pos1, landing 2": DGMOE.replace(position=("pos1",), landing=2),
    "dgmoe, pos3, four groups": DGMOE.replace(position=("pos3",), **FOUR),
    "dgmoe, every block": DGMOE.replace(position=("pos1",), moe_every=1),
    "position per group": POS2.replace(position=("pos3", "pos1", "pos2"), num_groups=3, span=3, landing=2),
    "longcat": POS2.replace(router="longcat", zero_experts=3, topk=3, combine="add"),
}
QUICK = ("pos1, landing 2, cg2", "pos2", "pos2, four groups, landing 2", "pos3, landing 2, top-2", "every third block")
QUICK += ("farskip, cg2, top-2", "farskip and pos1", "dgmoe", "dgmoe, last landing", "position per group", "longcat")


def matches(case: Case, ep: int = 1) -> bool:
    """Outputs, loss and every gradient."""
    return largest_difference(run(case, ep), run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("name", cases(SPANS, QUICK))
def test_span_equals_reference(name):
    assert matches(SPANS[name])


@pytest.mark.parametrize("name", ["pos2, top-2, cg2", "farskip", "dgmoe"])
def test_span_on_two_ranks_equals_reference(name):
    assert matches(SPANS[name], ep=2)


SHARING = {
    "scmoe": Case(num_groups=3, share_groups=3),
    "scmoe, cg2": Case(num_groups=3, share_groups=3, combine="cg2", topk=2),
    "scmoe, no gate": Case(num_groups=2, share_groups=2, combine="add"),
    "dgmoe": Case(shortcut="dgmoe", num_groups=3, share_groups=3),
    "a span shares": POS2.replace(share_groups=2),
    "two spans share, cg2": POS2.replace(num_groups=4, share_groups=4, combine="cg2"),
    "half a span shares, dgmoe": DGMOE.replace(**FOUR, share_groups=2),
    "longcat": Case(num_groups=3, share_groups=3, router="longcat", zero_experts=3, topk=3),
}


@pytest.mark.parametrize("name", cases(SHARING, ("scmoe, cg2", "dgmoe", "a span shares", "longcat")))
def test_groups_that_share_equal_reference(name):
    """Router, experts and shared expert are the first group's, with the gradients of all; norms and cg2's gate not."""
    assert matches(SHARING[name], ep=2)


@pytest.mark.parametrize("case", [POS2, DGMOE, EVERY_BLOCK], ids=["scmoe", "dgmoe", "every block"])
def test_a_span_that_lands_in_time_is_its_groups_bit_for_bit(case):
    case = case.replace(landing=0)
    assert_bit_equal(run_ranks(case, 2), run_ranks(case.replace(span=1), 2))


# --- negative controls: what lands elsewhere, or reads something else, is far away -------------------------------


def distance(found, config: reference.ReferenceConfig) -> float:
    return (found[0] - run_reference(config)[0]).abs().max().item()


@pytest.mark.parametrize(
    ("case", "change"),
    [
        (POS2.replace(landing=2), {"landing": 1}),
        (POS2, {"landing": 0}),
        (DGMOE.replace(landing=3), {"landing": 2}),
        (FARSKIP, {"positions": ("pos1",) * 4}),
        (Case(num_groups=3, share_groups=3), {"share_groups": 1}),
    ],
    ids=["one op earlier", "at the end of the group", "dgmoe, one op earlier", "other position", "not shared"],
)
def test_another_wiring_is_noticed(case, change):
    assert distance(run(case), dataclasses.replace(case.reference_config(), **change)) > 1e-3


def _farskip_that_reads_without_late(without_late, group, late):
    """As the attention does: A in the place of R."""
    (block,) = group.blocks
    whole = without_late if late is None else without_late + late
    normed = block.pre_mlp_norm(without_late)
    shared, routed = group.moe(normed, normed)
    return whole + block.attention(block.input_norm(without_late)) + shared, routed


def test_experts_of_farskip_that_read_what_attention_reads_are_noticed(monkeypatch):
    monkeypatch.setattr(reference, "wire_farskip", _farskip_that_reads_without_late)
    assert distance(run(FARSKIP), FARSKIP.reference_config()) > 1e-3


def with_calls_swapped(case: Case):
    """The outputs of call 1 where those of call 0 should be added, and the other way round."""
    from megatron_scmoe.contracts import SpanShape

    late, end = SpanShape.landing_before, SpanShape.landing_in
    swapped = {0: 1, 1: 0}
    SpanShape.landing_before = lambda shape, place: [swapped[number] for number in late(shape, place)]
    SpanShape.landing_in = lambda shape, place: [swapped[number] for number in end(shape, place)]
    return models.losses_and_gradients(case)


def test_swapped_calls_are_noticed():
    """Both are on their way where the first lands."""
    case = POS3.replace(landing=3, expert_slot=(1,))
    ((loss, _),) = ranks.run(with_calls_swapped, 1, case, layout=EP[1])
    assert distance((loss,), case.reference_config()) > 1e-3
    assert distance(run(case), case.reference_config()) < 1e-5


# --- what else a span goes through -------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("case", [POS2, DGMOE], ids=["scmoe", "dgmoe"])
def test_full_recompute_of_a_span(case, blocks):
    """In units of blocks; the span's last block runs, and recomputes, all of it."""
    recomputed = case.replace(recompute="full", recompute_blocks=blocks)
    assert_bit_equal(run_ranks(recomputed, 2), run_ranks(case, 2))


def test_full_recompute_of_one_span_of_two():
    case = EVERY_BLOCK.replace(num_groups=4)
    recomputed = case.replace(recompute="full", recompute_method="block", recompute_blocks=2)
    assert_bit_equal(run_ranks(recomputed, 2), run_ranks(case, 2))


@pytest.mark.parametrize("module", cases(["core_attn", "mlp", "shared_experts"], ["mlp"]))
def test_selective_recompute_in_a_span(module):
    assert_bit_equal(run_ranks(POS2.replace(recompute=module), 2), run_ranks(POS2, 2))


def test_evaluation_computes_what_training_does():
    (losses,) = ranks.run(training_and_evaluation, 1, FARSKIP.replace(expert_slot=(2,)), layout=EP[1])
    assert torch.equal(*losses)


def training_and_evaluation(case: Case) -> list[torch.Tensor]:
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    with torch.no_grad():
        return [model.train(mode)(tokens, positions, None, labels=labels) for mode in (True, False)]


@pytest.mark.parametrize("case", [POS2, FARSKIP], ids=["pos2", "farskip"])
def test_centroids_in_a_span_equal_reference(case):
    """Each group has rotations of its own."""
    assert_equals_reference(case.replace(codec="lsh"), 2)
