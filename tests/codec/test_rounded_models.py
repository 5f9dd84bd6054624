"""Models whose rows travel in fp8 or bf16: against the slow reference, and against themselves in other layouts."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from unittest import mock

import models
import pytest
import ranks
import slow_fp8
import test_layer
import test_pipelined
import torch
import torch.distributed as dist
from cases import cases
from models import Case
from test_latent import sent_bytes
from test_overlap import EP, assert_bit_equal, run
from torch import Tensor

from megatron_scmoe.contracts import Launch, TransferName

ALL = tuple(name.value for name in TransferName)
SUBSETS = [chosen for count in range(1, 5) for chosen in itertools.combinations(ALL, count)]
FP8 = Case(codec="fp8", topk=2)
FOUR = FP8.replace(transfers=ALL)
BF16 = Case(codec="bf16", topk=2)
LONGCAT = FOUR.replace(router="longcat", zero_experts=3, topk=3, combine="add")

type Step = tuple[Tensor, dict[str, Tensor]]


def joined(results: list[Step]) -> Step:
    return torch.cat([loss for loss, _ in results]), {name: one for _, its in results for name, one in its.items()}


def off(found: Step, expected: Step) -> float:
    """Relative error of the loss and of all gradients together."""
    assert found[1].keys() == expected[1].keys()
    pairs = [(found[0], expected[0]), *((found[1][name], expected[1][name]) for name in found[1])]
    wrong = sum(float((one - other).norm()) ** 2 / float(other.norm()) ** 2 for one, other in pairs)
    return (wrong / len(pairs)) ** 0.5


# ---- each transfer ----------------------------------------------------------------------------------------------


def of_subsets(subsets: list[tuple[str, ...]]) -> list[Step]:
    return [models.losses_and_gradients(FP8.replace(num_groups=1, transfers=one)) for one in subsets]


@functools.cache
def found() -> dict[tuple[str, ...], Step]:
    """Of each subset of the transfers, and of none."""
    plain = FP8.replace(codec="none", num_groups=1)
    by_rank = ranks.run(of_subsets, 2, SUBSETS, layout=EP[2])
    return {(): joined(run(plain, 2))} | {
        one: joined([of_rank[number] for of_rank in by_rank]) for number, one in enumerate(SUBSETS)
    }


@functools.cache
def expected(subset: tuple[str, ...]) -> Step:
    config = replace(FP8.replace(num_groups=1).reference_config(), rounded=subset)
    return test_layer.run_reference(config)


@pytest.mark.parametrize("subset", SUBSETS, ids=" ".join)
def test_each_subset_of_the_transfers_equals_the_reference(subset):
    """And no other subset does: a transfer that was missing, or one too many, would be noticed."""
    errors = {other: off(found()[other], expected(subset)) for other in found()}
    assert errors.pop(subset) < 1e-5
    assert min(errors.values()) > 1e-4


def test_a_neighbours_scale_is_noticed(monkeypatch):
    """Negative control of the comparison above."""
    subset = ("dispatch-forward",)
    monkeypatch.setattr(slow_fp8, "scale_of", lambda block: 2 * slow_fp8.LEAST_SCALE * 2**117)
    wrong = test_layer.run_reference(replace(FP8.replace(num_groups=1).reference_config(), rounded=subset))
    assert off(found()[subset], wrong) > 1e-4


MODELS = {
    "pos2": FOUR,
    "top-1, pos1, every block": FOUR.replace(topk=1, position=("pos1",), moe_every=1),
    "late landing, chunks": FOUR.replace(num_groups=4, span=2, landing=1, chunks=2),
    "farskip": FOUR.replace(span=2, landing=1, moe_every=1, position=("farskip",)),
    "dgmoe": FOUR.replace(shortcut="dgmoe", topk=1),
    "shared": FOUR.replace(share_groups=2, combine="cg2"),
    "longcat": LONGCAT,
    "latents, chunks": LONGCAT.replace(latent=8, chunks=2),
}
QUICK = ("pos2", "dgmoe", "latents, chunks")


@pytest.mark.parametrize(
    ("name", "ep"), cases([(name, ep) for name in MODELS for ep in (1, 2, 4)], [(name, 2) for name in QUICK])
)
def test_models_equal_the_reference(name, ep):
    """One rank rounds as several do: numbers do not depend on where experts are."""
    case = MODELS[name]
    assert off(test_layer.run(case, ep), test_layer.run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("ep", [1, 2])
def test_unique_tokens_and_partial_sums_are_rounded(ep):
    """A row for a rank, its gradient, the sum that comes back and that sum's gradient."""
    case = FOUR.replace(unique="rank", topk=3)
    config = case.reference_config()
    assert off(test_layer.run(case, ep), test_layer.run_reference(replace(config, ranks=ep))) < 1e-5
    assert off(test_layer.run(case, ep), test_layer.run_reference(config)) > 1e-4


def test_across_nodes_rows_are_rounded_and_inside_them_not():
    """A row for a node, its gradient, the sum that comes back and that sum's gradient; hops carry them as they are."""
    case = FOUR.replace(unique="node", topk=3, experts=8)
    config = case.reference_config()
    found = test_layer.run(case, 4)
    assert off(found, test_layer.run_reference(replace(config, ranks=2))) < 1e-5  # of as many places
    assert off(found, test_layer.run_reference(replace(config, ranks=4))) > 1e-4  # each rank's sum


def test_bf16_is_near_fp32_and_not_equal():
    error = off(joined(run(BF16, 2)), joined(run(BF16.replace(codec="none"), 2)))
    assert 1e-4 < error < 1e-2
    assert error < off(joined(run(FOUR, 2)), joined(run(FOUR.replace(codec="none"), 2))) / 4


# ---- nothing else changes ---------------------------------------------------------------------------------------

SCHEDULES = {
    "slot 1": {"expert_slot": (1,)},
    "slot 4": {"expert_slot": (4,)},
    "weights apart": {"weights_apart_above": 0.0},
    "recompute": {"recompute": "full"},
    "recompute of the MLP": {"recompute": "mlp"},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_changes_no_bit(name):
    assert_bit_equal(run(FOUR.replace(**SCHEDULES[name]), 2), run(FOUR.replace(overlap="off"), 2))


@pytest.mark.parametrize("launch", [Launch.BEHIND, Launch.WITHIN])
@pytest.mark.parametrize("case", [FOUR, BF16], ids=["fp8", "bf16"])
def test_a_later_launch_changes_no_bit(case, launch):
    case = case.replace(position=("pos1",))
    assert_bit_equal(run(case, 2, launch=launch), run(case.replace(overlap="off"), 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap": "off"},
        {"weights_apart_above": 0.0},
        {"unique": "rank"},
        {"shortcut": "dgmoe", "topk": 1},
        {"capacity": 0.6},
        {"capacity": 1.0, "padded": True},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_micro_batches_in_flight_change_no_bit(changes):
    """What is open at once has forms of its own."""
    case = FOUR.replace(**changes)
    in_flight, sequence = run(case, 2, num_micro_batches=2), run(case.replace(overlap="off"), 2, num_micro_batches=2)
    assert_bit_equal(in_flight, sequence)


@pytest.mark.parametrize("kind", ["top-2", "padded", "latents"])
def test_stock_layers_round_each_transfer(kind):
    """Chunks change no row that travels, but padded ones."""
    exact = joined(ranks.run(test_pipelined.losses_and_gradients, 2, kind, 0, layout=EP[2]))
    one, two = (joined(ranks.run(stock, 2, kind, chunks, layout=EP[2])) for chunks in (1, 2))
    assert off(one, two) < 1e-5
    assert 1e-3 < off(one, exact) < 0.1


def stock(kind: str, chunks: int) -> Step:
    from megatron_scmoe.config import Codec

    settings = {"a2a_codec": Codec.FP8, "fp8_transfers": tuple(TransferName)}
    build = functools.partial(test_pipelined.build, **settings)
    with mock.patch.object(test_pipelined, "build", build):
        return test_pipelined.losses_and_gradients(kind, chunks)


# ---- bytes, and how often ---------------------------------------------------------------------------------------


def bytes_by_transfer(case: Case) -> dict[str, tuple[int, int]]:
    """Sent by this rank in a step, and what it would have been."""
    from megatron_scmoe.overlap import observe
    from megatron_scmoe.overlap.costs import passes_of

    model = models.build(case)
    with observe.recording() as recorded:
        ((tokens, labels, positions),) = models.my_batch()
        model(tokens, positions, None, labels=labels).sum().backward()
    passes = passes_of(recorded)
    for one in passes:
        assert one.sent_bytes == sum(one.sent_by.values())
    return {
        name: (sum(one.sent_by.get(name, 0) for one in passes), sum(one.plain_by.get(name, 0) for one in passes))
        for name in TransferName
    }


@pytest.mark.parametrize("apart", [False, True])
def test_bytes_are_said_by_transfer(apart):
    """Rows of 16 numbers: 64 bytes in fp32, 32 in fp8 (codes and scale are 16 each), beside a weight's 16 or 4."""
    case = FP8.replace(num_groups=1, weights_apart_above=0.0 if apart else 8.0)
    weight = 4 if apart else 16
    row = {
        "dispatch-forward": 32 + weight,
        "combine-forward": 64,
        "dispatch-backward": 64 + weight,
        "combine-backward": 32,
    }
    plain = {
        "dispatch-forward": 64 + weight,
        "combine-forward": 64,
        "dispatch-backward": 64 + weight,
        "combine-backward": 64,
    }
    for of_rank, its_plain in zip(
        ranks.run(bytes_by_transfer, 2, case, layout=EP[2]),
        ranks.run(bytes_by_transfer, 2, case.replace(codec="none"), layout=EP[2]),
        strict=True,
    ):
        rows = its_plain["combine-forward"][1] // 64, its_plain["combine-backward"][1] // 64  # received, sent
        assert all(rows)
        for name, (sent, would_be) in of_rank.items():
            count = rows[name in ("dispatch-forward", "combine-backward")]
            assert (sent, would_be) == (row[name] * count, plain[name] * count), name
            assert its_plain[name] == (would_be, would_be)


def test_the_reports_sum_is_what_travels():
    case = FOUR.replace(num_groups=1)
    found = [
        ranks.run(sent_bytes, 2, one, layout=EP[2])
        for one in (case, BF16.replace(num_groups=1), FP8.replace(codec="none", num_groups=1))
    ]
    for fp8, bf16, plain in zip(*found, strict=True):
        assert fp8 == bf16 < 0.7 * plain  # rows are 16 bytes and a scale that is filled up to 16 bytes


def all_to_alls(case: Case) -> list[str]:
    sent = []
    original = dist.all_to_all_single

    def spied(output, packed, *args, **kwargs):
        sent.append(str(packed.dtype))
        return original(output, packed, *args, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", spied):
        models.losses_and_gradients(case.replace(num_groups=1))
    return sent


def test_codes_and_scales_are_one_collective():
    """In the types that NCCL has, beside weights or apart from them."""
    for sent in ranks.run(all_to_alls, 2, FOUR, layout=EP[2]):
        assert sent == ["torch.int64"] * 4
    for sent in ranks.run(all_to_alls, 2, FOUR.replace(weights_apart_above=0.0), layout=EP[2]):
        assert sent == ["torch.int64", "torch.float32", "torch.int64", "torch.int64", "torch.int64", "torch.float32"]


# ---- NaN and infinity -------------------------------------------------------------------------------------------


def poisoned(case: Case, value: float) -> str:
    """What this rank raises, or which of its losses are no numbers, where rank 1 has one bad token."""
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.embedding.word_embeddings.weight[tokens[-1, 0], 3] = value
    try:
        loss = model(tokens, positions, None, labels=labels)
    except ValueError as error:
        return str(error)
    return "finite" if loss.isfinite().all() else "not finite"


NAMED = (
    "group 0: tokens with NaN or infinity have no scale in fp8; rank(s) 1 have some: the training has diverged; lower "
    "--lr, or load an earlier checkpoint (--ckpt-step)"
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunks": 2},
        {"unique": "rank"},
        {"capacity": 1.0},
        {"router": "longcat", "zero_experts": 3, "topk": 3, "combine": "add"},
    ],
    ids=str,
)
def test_bad_tokens_are_named_on_every_rank(changes, value):
    assert ranks.run(poisoned, 2, FP8.replace(**changes), value, layout=EP[2]) == [NAMED] * 2


def test_bad_tokens_are_named_across_nodes():
    case = FP8.replace(unique="node", experts=8)
    assert ranks.run(poisoned, 4, case, float("nan"), layout=EP[4]) == [NAMED] * 4


@pytest.mark.parametrize(
    "case",
    [FP8.replace(capacity=2.0, padded=True), FP8.replace(transfers=("combine-forward",)), BF16],
    ids=["padded: no counts", "dispatched as they are", "bf16"],
)
def test_elsewhere_they_travel_as_what_they_are(case):
    """Where nobody is told, Megatron's own check sees the loss."""
    found = ranks.run(poisoned, 2, case, float("nan"), layout=EP[2])
    assert found[1] == "not finite" and found[0] in ("finite", "not finite")


def bad_gradient(case: Case, value: float) -> bool:
    """Whether every gradient of the experts' input is a number where that of the loss is not."""
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels)
    towards = torch.ones_like(loss)
    towards[0, 0] = value
    loss.backward(towards)
    return all(
        one.grad is None or bool(one.grad.isfinite().all())
        for name, one in model.named_parameters()
        if "local_experts" in name
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_gradients_reach_the_experts(value):
    case = FP8.replace(num_groups=1, transfers=("combine-backward", "dispatch-backward"))
    assert not all(ranks.run(bad_gradient, 2, case, value, layout=EP[2]))
    assert all(ranks.run(bad_gradient, 2, case, 2.0, layout=EP[2]))
