"""LSH-MoE in the layers: it equals the slow reference, whatever the schedule, and its bytes are those of centroids."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import time
import weakref
from argparse import Namespace
from collections.abc import Iterator
from statistics import fmean
from types import SimpleNamespace

import entry
import models
import pytest
import ranks
import reference
import test_pipelined
import torch
import torch.distributed as dist
import training
from cases import cases
from models import BATCH_SIZE, SEQ_LENGTH, Case
from test_overlap import EP, all_to_one_rank, assert_bit_equal, assert_close, run
from test_report import read
from training import SCMOE, STOCK, with_flags, without_flag

from megatron_scmoe.report.figures import GroupRow, codec_scalars

LSH = Case(codec="lsh")
"""Few tokens that are not alike: one function of four answers makes them share centroids all the same."""

LLOYD = LSH.replace(refinement="lloyd", topk=2, hashes=2)
"""Of so few tokens, some that join another mean."""

CASES = {
    "pos2": LSH,
    "pos1": LSH.replace(position=("pos1",)),
    "pos3, top-2, add": LSH.replace(position=("pos3",), topk=2, combine="add"),
    "dgmoe": LSH.replace(shortcut="dgmoe"),
    "no compensation": LSH.replace(compensation="none"),
    "low rank": LSH.replace(compensation="lowrank"),
    "low rank, dgmoe": LSH.replace(compensation="lowrank", shortcut="dgmoe"),
    "three functions": LSH.replace(hashes=3, width=1),
    "latents, low rank, top-2": LSH.replace(latent=8, compensation="lowrank", topk=2),
    "latents, paper, dgmoe": LSH.replace(latent=12, shortcut="dgmoe"),
    "latents, lloyd, chunks": LLOYD.replace(latent=8, chunks=2),
    "lloyd": LLOYD,
    "lloyd, low rank": LLOYD.replace(compensation="lowrank"),
    "lloyd, dgmoe": LSH.replace(refinement="lloyd", shortcut="dgmoe"),
}


def hashers_of_groups(case: Case) -> list:
    from megatron_scmoe.codec.lsh import Hasher

    seeds = (1234 * 100_003 + group for group in range(case.num_groups))
    return [Hasher(case.latent or 16, hashes=case.hashes, width=case.width, seed=seed) for seed in seeds]


def reference_of_ranks(case: Case, num_ranks: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and gradients by the slow reference, whose tokens are clustered rank by rank."""
    hashers = hashers_of_groups(case)
    config = dataclasses.replace(
        case.reference_config(),
        lsh_columns=tuple(hasher._columns.split(case.width, dim=1) for hasher in hashers),
        lsh_compensation=case.compensation,
        lsh_sketches=tuple(hasher._sketch for hasher in hashers) if case.refinement == "lloyd" else (),
    )
    parameters = models.reference_parameters(config)
    parts = zip(*(ids.chunk(num_ranks) for ids in models.batch()), strict=True)
    results = [reference.loss_and_gradients(parameters, tokens, labels, config) for tokens, labels in parts]
    gradients = {name: sum(gradients[name] for _, gradients in results) / num_ranks for name in results[0][1]}
    return torch.cat([loss for loss, _ in results]), gradients


def assert_equals_reference(case: Case, num_ranks: int) -> None:
    loss, gradients = reference_of_ranks(case, num_ranks)
    results = run(case, num_ranks)
    torch.testing.assert_close(torch.cat([one for one, _ in results]), loss, rtol=1e-5, atol=1e-5)
    for _, of_rank in results:
        for name, gradient in of_rank.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_reference(name):
    assert_equals_reference(CASES[name], 2)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_on_one_rank_and_on_four(num_ranks):
    assert_equals_reference(LSH.replace(topk=2), num_ranks)


def test_the_residual_matters():
    """Negative control: the reference that leaves the residual out is another model, in loss and in gradients."""
    loss, gradients = reference_of_ranks(LSH.replace(compensation="none"), 2)
    results = run(LSH, 2)
    assert (torch.cat([one for one, _ in results]) - loss).abs().max() > 1e-3
    assert any((gradient - gradients[name]).abs().max() > 1e-3 for name, gradient in results[0][1].items())


def test_clusters_do_not_depend_on_where_experts_live():
    """The same tokens on each rank, with all experts there and with half of them."""
    one, other = (ranks.run(step_with_counts, 2, LSH, layout=EP[size]) for size in (1, 2))
    for mine, its in zip(one, other, strict=True):
        assert mine["members"] == its["members"] and mine["largest"] > 1
    copies, halves = (ranks.run(models.losses_and_gradients, 2, LSH, layout=EP[size]) for size in (1, 2))
    expected = {
        name: sum(gradients[name] for _, gradients in copies) if "local_experts" in name else gradient
        for name, gradient in copies[0][1].items()
    }
    for (loss, gradients), (its_loss, _) in zip(halves, copies, strict=True):
        torch.testing.assert_close(loss, its_loss, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def stock_and_loops(kind: str, compensation: str) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Of every stock MoE layer: output, and gradients of its input and of its experts, here and by slow loops.

    Also how many choices of all tokens capacity dropped.
    """
    from megatron_scmoe.config import Codec, Compensation
    from megatron_scmoe.layers.pipelined import PipelinedMoELayer

    settings = {"a2a_codec": Codec.LSH, "lsh_hashes": 1, "lsh_compensation": Compensation(compensation)}
    model = test_pipelined.build(kind, 2, **settings)
    layers = [module for module in model.modules() if isinstance(module, PipelinedMoELayer)]
    pairs, dropped = [], 0
    for number, moe in enumerate(layers):
        generator = torch.Generator().manual_seed(number)
        hidden = torch.randn(SEQ_LENGTH, BATCH_SIZE, moe.config.hidden_size, generator=generator)
        towards = torch.randn(hidden.shape, generator=generator)
        found = []
        for forward in (lambda one, moe=moe: moe(one)[0], lambda one, moe=moe: in_loops(moe, one, compensation)):
            moe.zero_grad()
            its = hidden.clone().requires_grad_()
            output = forward(its)
            (output * towards).sum().backward()
            found.append([output.detach(), its.grad, *(value.grad for value in moe.experts.parameters())])
        pairs += zip(*found, strict=True)
        _, routing_map = moe.route(hidden)
        dropped += SEQ_LENGTH * BATCH_SIZE * moe.config.moe_router_topk - int(routing_map.sum())
    return pairs, dropped


def in_loops(moe: torch.nn.Module, hidden: torch.Tensor, compensation: str) -> torch.Tensor:
    """The output of a stock MoE layer whose tokens hash, cluster by cluster and token by token."""
    probs, routing_map = moe.route(hidden)
    rows = hidden.view(-1, hidden.shape[-1])
    hasher = moe.cargo_maker._hasher
    columns = hasher._columns.split(hasher._width, dim=1)
    output = torch.zeros_like(rows)
    for number, expert in enumerate(moe.experts.local_experts):
        clusters: dict[tuple, list[int]] = {}
        for token in routing_map[:, number].nonzero().flatten().tolist():
            clusters.setdefault(reference.bucket(rows[token], columns), []).append(token)
        for members in clusters.values():
            centroid = rows[members].mean(dim=0)
            result, _ = expert(centroid.unsqueeze(0))
            for token in members:
                residual = rows[token] - centroid if compensation == "paper" else 0
                output = output.index_add(
                    0, torch.tensor([token]), probs[token, number] * (result + residual).view(1, -1)
                )
    output = output.view(hidden.shape)
    return output + moe.shared_experts_compute(hidden) if moe.use_shared_expert else output


@pytest.mark.parametrize("compensation", ["paper", "none"])
@pytest.mark.parametrize("kind", ["top-2", "shared expert, gated", "dropped"])
def test_stock_layers_equal_slow_loops(kind, compensation):
    """With capacity, too, that drops tokens: it counts them before they are clustered."""
    ((pairs, dropped),) = ranks.run(stock_and_loops, 1, kind, compensation, layout=EP[1])
    assert (dropped > 0) == (kind == "dropped")
    assert len(pairs) == 2 * (2 + 4 * 2)  # layers; output, input, experts' matrices
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-3


def evaluated(case: Case) -> list[torch.Tensor]:
    """The loss of every token, [b, s], in evaluation; and of a batch whose sequences end in another token."""
    model = models.build(case).eval()
    tokens, labels = models.batch()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % models.VOCAB_SIZE
    positions = torch.arange(SEQ_LENGTH).expand_as(tokens)
    with torch.no_grad():
        return [model(ids, positions, None, labels=labels) for ids in (tokens, other)]


EVALUATED = ("pos2", "dgmoe", "low rank", "lloyd, low rank")
ROUNDING = 1e-5


@pytest.mark.parametrize(
    ("name", "chunks"),
    cases(
        [(name, chunks) for chunks in (1, 2) for name in EVALUATED], [*((name, 1) for name in EVALUATED), ("dgmoe", 2)]
    ),
)
def test_evaluation_sends_tokens(name, chunks):
    """It is bit for bit that of the model without a codec, on every rank, and no loss depends on a later token."""
    case = CASES[name].replace(chunks=chunks)
    found = ranks.run(evaluated, 2, case, layout=EP[2])
    expected = ranks.run(evaluated, 2, case.replace(codec="none"), layout=EP[2])
    for (losses, others), (its_losses, _) in zip(found, expected, strict=True):
        assert torch.equal(losses, its_losses)
        apart = (losses - others).abs()  # another token moves rows between experts, and so their products' rounding
        assert apart[:, :-1].max() <= ROUNDING and apart[:, -1].min() > 0.1


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_with_centroids_sees_later_tokens(name):
    """What the other test is there for; and it is what training computes."""
    case = CASES[name].replace(evaluation="centroids")
    ((losses, others),) = ranks.run(evaluated, 1, case, layout=EP[1])
    assert (losses - others)[:, :-1].abs().max() > 100 * ROUNDING
    ((trained, _),) = ranks.run(models.losses_and_gradients, 1, case.replace(evaluation="tokens"), layout=EP[1])
    assert torch.equal(losses, trained)


def evaluated_stock(kind: str, codec: str) -> list[torch.Tensor]:
    """Losses in evaluation of the stock layers in chunks, and in training."""
    from megatron_scmoe.config import Codec

    ((tokens, labels, positions),) = models.my_batch()
    with torch.no_grad():
        model = test_pipelined.build(kind, 2, a2a_codec=Codec(codec), **({"lsh_hashes": 1} if codec == "lsh" else {}))
        return [model.train(training)(tokens, positions, None, labels=labels) for training in (False, True)]


@pytest.mark.parametrize("kind", ["top-2", "padded"])
def test_evaluation_of_stock_layers_sends_tokens(kind):
    found, expected = (ranks.run(evaluated_stock, 2, kind, codec, layout=EP[2]) for codec in ("lsh", "none"))
    for (evaluated, trained), (its, _) in zip(found, expected, strict=True):
        assert torch.equal(evaluated, its) and not torch.equal(evaluated, trained)


def losses_of_turned_batch(case: Case) -> torch.Tensor:
    """The loss of every token, of the batch's sequences in another order; put back into theirs."""
    tokens, labels = (ids.flip(0) for ids in models.batch())
    return models.build(case)(tokens, torch.arange(SEQ_LENGTH).expand_as(tokens), None, labels=labels).flip(0)


@pytest.mark.parametrize("case", [LSH, LLOYD], ids=["hashed", "refined"])
def test_order_of_tokens_does_not_matter(case):
    """Means are of the same tokens in whatever order they come, though clusters are numbered by their first one."""
    ((loss, _),), (turned,) = run(case, 1), ranks.run(losses_of_turned_batch, 1, case, layout=EP[1])
    torch.testing.assert_close(turned, loss, rtol=1e-5, atol=1e-6)
    ((uncompressed, _),) = run(case.replace(codec="none"), 1)
    assert (turned - uncompressed).abs().max() > 1e-3  # tokens do share means


def test_a_rank_without_centroids():
    results = ranks.run(all_to_one_rank, 2, LSH, layout=EP[2])
    (none, some) = sorted(received for received, _ in results)
    assert none == [0, 0] and all(0 < rows < BATCH_SIZE * SEQ_LENGTH for rows in some)
    off = ranks.run(all_to_one_rank, 2, LSH.replace(overlap="off"), layout=EP[2])
    for (_, gradient), (_, gradient_off) in zip(results, off, strict=True):
        assert torch.equal(gradient, gradient_off) and gradient.abs().sum() > 0


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_every_slot_equals_off_bit_for_bit(slot):
    assert_bit_equal(run(LSH.replace(expert_slot=(slot,)), 2), run(LSH.replace(overlap="off"), 2))


def test_refinement_changes_what_is_computed():
    """Negative control: of the comparisons with a reference that refines too."""
    with pytest.raises(AssertionError):
        assert_close(run(LLOYD, 2), run(LLOYD.replace(refinement="none"), 2))


@pytest.mark.parametrize(
    ("case", "chunks"), [(LSH, 2), (LSH, 4), (LSH.replace(shortcut="dgmoe"), 3), (LLOYD, 2), (LLOYD, 3)]
)
def test_chunks_change_rounding_only(case, chunks):
    """The clusters are those of all tokens, whatever they travel in."""
    assert_close(run(case.replace(chunks=chunks), 2), run(case.replace(overlap="off"), 2))


def test_more_chunks_than_centroids():
    assert_close(run(LSH.replace(chunks=17), 4), run(LSH, 4))


def rows_alive_while_experts_run(case: Case) -> set[bool]:
    """Whether the rows that were clustered are in memory still."""
    from megatron_scmoe.codec import centroids as codec
    from megatron_scmoe.dispatch.flights import Flight
    from megatron_scmoe.overlap.plan import EXPERTS

    clustered, alive = [], set()
    means, begin = codec.means, Flight._begin

    def noted(rows, *others):
        clustered.append(weakref.ref(rows))
        return means(rows, *others)

    def looked(self, step):
        if step == EXPERTS:
            alive.update(rows() is not None for rows in clustered)
        begin(self, step)

    codec.means, Flight._begin = noted, looked
    try:
        model = models.build(case)
        ((tokens, labels, positions),) = models.my_batch()
        model(tokens, positions, None, labels=labels).sum().backward()
    finally:
        codec.means, Flight._begin = means, begin
    return alive


@pytest.mark.parametrize(("compensation", "alive"), [("none", {False}), ("paper", {True})])
@pytest.mark.parametrize("chunks", [1, 2])
def test_rows_are_kept_for_compensation_alone(compensation, alive, chunks):
    case = LSH.replace(compensation=compensation, chunks=chunks, num_groups=1)
    assert ranks.run(rows_alive_while_experts_run, 2, case, layout=EP[2]) == [alive] * 2


def maps_after_a_step() -> list[torch.Tensor]:
    """Fresh maps: what they do at first, and the gradients that they get, from products as they are on Blackwell."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_scmoe.codec.compensation import ResidualMap

    torch.manual_seed(0)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, num_moe_experts=3)
    one = ResidualMap(config, 8, seed=1)
    residuals = torch.randn(10, 16)
    rows_per_expert = torch.tensor([4, 0, 6])
    product = torch.nn.functional.grouped_mm

    def leaves_unwritten(rows, weights, offs):
        weights.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), float("nan")))
        return product(rows, weights, offs=offs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", leaves_unwritten)
        first = one(residuals, rows_per_expert)
    (first * torch.randn(10, 16)).sum().backward()
    return [first, one.up.grad, one.down.grad]


def test_maps_begin_as_nothing_and_learn():
    ((first, up, down),) = ranks.run(maps_after_a_step, 1)
    assert torch.equal(first, torch.zeros_like(first)) and torch.equal(down, torch.zeros_like(down))
    assert up[0].abs().sum() > 0 and up[2].abs().sum() > 0 and up[1].abs().sum() == 0


def test_saved_maps_need_their_flag(tmp_path):
    """Core would leave them out without a word where the model has none."""
    flags = with_flags(TRAINED["low rank"], "--a2a-codec lsh", f"--save {tmp_path}", "--save-interval 1")
    printed, *_ = ranks.run(training.train, 2, with_flags(flags, "--train-iters 1"))
    assert "successfully saved checkpoint" in printed, printed[-3000:]
    resumed = with_flags(flags, "--train-iters 1", f"--load {tmp_path}")
    entry.assert_accepted([resumed], entry.world(2))
    other = with_flags(resumed, "--lsh-compensation paper")
    entry.assert_refused([(other, ["--lsh-compensation lowrank"])], entry.world(2))


@pytest.mark.parametrize("case", [LSH, LLOYD], ids=["hashed", "refined"])
@pytest.mark.parametrize("recompute", ["full", "core_attn", "shared_experts"])
def test_recompute_finds_the_same_clusters(recompute, case):
    assert_bit_equal(run(case.replace(recompute=recompute), 2), run(case, 2))


def test_several_micro_batches_in_flight():
    assert_bit_equal(run(LSH, 2, num_micro_batches=2), run(LSH.replace(overlap="off"), 2, num_micro_batches=2))


@pytest.mark.parametrize("case", [LSH, LLOYD, LSH.replace(compensation="lowrank")], ids=["paper", "lloyd", "low rank"])
def test_overlap_equals_off_in_bf16(case):
    case = case.replace(dtype=torch.bfloat16)
    assert_bit_equal(run(case, 2), run(case.replace(overlap="off"), 2))


def test_what_pads_an_expert_to_its_capacity_joins_no_cluster():
    """With room for all, padding changes nothing: not which clusters there are, nor any number."""
    ample = LSH.replace(topk=2, capacity=2.0)
    assert_bit_equal(run(ample.replace(padded=True), 2), run(ample, 2))
    padded, plain = (ranks.run(step_with_counts, 2, case, layout=EP[2]) for case in (ample.replace(padded=True), ample))
    assert [one["rows"] for one in padded] == [one["rows"] for one in plain]
    assert [one["clusters"] for one in padded] == [one["clusters"] for one in plain]
    assert all(one["clusters"] < one["rows"] for one in plain)


def ones_for_gates(case: Case) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A step in which every gate weight is exactly 1, so that where it is applied does not matter."""
    from megatron.core.transformer.moe.router import TopKRouter

    original = TopKRouter.forward

    def forward(self, *args, **kwargs):
        probs, routing_map = original(self, *args, **kwargs)
        return probs + (routing_map.to(probs.dtype) - probs).detach(), routing_map

    TopKRouter.forward = forward
    return models.losses_and_gradients(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("compensation", "refinement"),
    cases(itertools.product(("paper", "none"), ("none", "lloyd")), [("paper", "none"), ("none", "lloyd")]),
)
def test_one_token_in_each_cluster_equals_no_codec_bit_for_bit(compensation, refinement, dtype):
    many = LSH.replace(hashes=16, width=4, compensation=compensation, refinement=refinement, dtype=dtype)
    one, other = (ranks.run(ones_for_gates, 2, case, layout=EP[2]) for case in (many, Case(dtype=dtype)))
    near = {"rtol": 1e-5, "atol": 1e-7} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.01}
    for (loss, gradients), (other_loss, other_gradients) in zip(one, other, strict=True):
        assert torch.equal(loss, other_loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, other_gradients[name], **near, msg=name)


def step_with_counts(case: Case) -> dict[str, object]:
    """One step: bytes handed to the all-to-all, counted here, those reported, and what was recorded of clusters."""
    from megatron_scmoe.codec import centroids as codec
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    counted = {"collectives": 0, "bytes": 0}
    members, cluster = list[list[int]](), codec.cluster
    original = dist.all_to_all_single

    def clustering(*arguments):
        clusters = cluster(*arguments)
        members.append(clusters.ids.tolist())
        return clusters

    def counting(output, tensor, output_splits, input_splits, **kwargs):
        row_bytes = tensor[:1].nbytes if tensor.shape[0] else 0
        own = input_splits[dist.get_rank()]
        counted["collectives"] += 1
        counted["bytes"] += (sum(input_splits) - own) * row_bytes
        return original(output, tensor, output_splits, input_splits, **kwargs)

    dist.all_to_all_single, codec.cluster = counting, clustering
    ((tokens, labels, positions),) = models.my_batch()
    try:
        with observe.recording() as recorded:
            model(tokens, positions, None, labels=labels).sum().backward()
    finally:
        dist.all_to_all_single, codec.cluster = original, cluster
    return {
        **counted,
        "reported": sum(transfer.sent_bytes for transfer in recorded.transfers),
        "rows": sum(one.rows for one in recorded.compressions),
        "clusters": sum(one.clusters for one in recorded.compressions),
        "largest": max((int(one.largest) for one in recorded.compressions), default=0),
        "members": members,
        "residuals": [float(one.residual) for one in recorded.compressions],
    }


def test_what_travels_are_centroids_in_both_directions():
    plain = ranks.run(step_with_counts, 2, Case(topk=2), layout=EP[2])
    compressed = ranks.run(step_with_counts, 2, LSH.replace(topk=2), layout=EP[2])
    for with_codec, without in zip(compressed, plain, strict=True):
        assert with_codec["collectives"] == without["collectives"] == 2 * 4  # groups, halves of forward and backward
        assert with_codec["bytes"] == with_codec["reported"]
        assert without["bytes"] == without["reported"]
        assert without["clusters"] == 0
        assert with_codec["rows"] == 2 * 2 * BATCH_SIZE * SEQ_LENGTH // 2  # groups, top-2, half of the batch
        assert with_codec["clusters"] < with_codec["rows"]
        assert with_codec["largest"] > 1
        assert all(0 < residual < 2 for residual in with_codec["residuals"])
    # All rows of a step together, since experts of a rank may attract more of one rank's tokens.
    rate = sum(one["clusters"] for one in compressed) / sum(one["rows"] for one in compressed)
    sent = sum(one["bytes"] for one in compressed) / sum(one["bytes"] for one in plain)
    assert sent == pytest.approx(rate, rel=0.2)


def waits_and_exchanges(case: Case, rate: float | None = None) -> dict[str, int]:
    """Of a step: how often the host asks the device for numbers, and counts are exchanged; at a target rate, or not."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_scmoe.codec.rate import RateControl
    from megatron_scmoe.layers.group import GroupBlock
    from megatron_scmoe.mcore import token_dispatcher

    model = models.build(case)
    controls = []
    if rate is not None:
        for module in model.modules():
            if isinstance(module, GroupBlock):
                module.cargo_maker.rate_control = RateControl(rate, case.hashes, width=2)
                controls.append(module.cargo_maker.rate_control)
    counted = {"waits": 0, "exchanges": 0}

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            counted["waits"] += function in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.repeat_interleave.Tensor,
            ) and "output_size" not in (keywords or {})
            return function(*arguments, **(keywords or {}))

    original = token_dispatcher.gather_from_sequence_parallel_region

    def counting(*arguments, **keywords):
        counted["exchanges"] += 1
        return original(*arguments, **keywords)

    token_dispatcher.gather_from_sequence_parallel_region = counting
    ((tokens, labels, positions),) = models.my_batch()
    try:
        with Waits():
            model(tokens, positions, None, labels=labels).sum().backward()
    finally:
        token_dispatcher.gather_from_sequence_parallel_region = original
    assert [bool(control.seen.min() > 0) for control in controls] == ([] if rate is None else [True] * case.num_groups)
    return counted


def test_no_wait_that_none_has_not_and_one_exchange_of_counts():
    plain, hashed, held, refined = (
        ranks.run(waits_and_exchanges, 2, case.replace(topk=2, chunks=2), rate, layout=EP[2])[0]
        for case, rate in ((Case(), None), (LSH, None), (LSH.replace(hashes=4), 0.3), (LLOYD, None))
    )
    assert {one["exchanges"] for one in (plain, hashed, held, refined)} == {2}  # groups, whatever the chunks
    assert hashed["waits"] == held["waits"] == plain["waits"]
    assert refined["waits"] > plain["waits"]  # negative control: it asks for the most clusters of an expert


def poisoned(case: Case, value: float) -> str:
    """What every rank raises where rank 1 has one bad token."""
    model = models.build(case)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.embedding.word_embeddings.weight[models.batch()[0][-1, 0], 3] = value
    ((tokens, labels, positions),) = models.my_batch()
    with pytest.raises(ValueError) as caught:
        model(tokens, positions, None, labels=labels)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_tokens_are_named_on_every_rank(value):
    for message in ranks.run(poisoned, 2, LSH, value, layout=EP[2]):
        assert message == (
            "group 0: tokens with NaN or infinity cannot be hashed; rank(s) 1 have some: the training has diverged; "
            "lower --lr, or load an earlier checkpoint (--ckpt-step)"
        )


def test_a_bad_token_is_named_on_every_tensor_parallel_rank():
    """Each of them has tokens of its own, and would wait for the others in the next dense op."""
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    assert ranks.run(announced_bad, 2, LSH, layout=layout) == [["1"], ["1"]]


def test_bad_tokens_are_named_where_experts_are_split_both_ways():
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2}
    seen = "or an expert-parallel peer of it"
    assert ranks.run(announced_bad, 4, LSH, 3, layout=layout) == [[f"1 {seen}"], ["3"], [f"3 {seen}"], ["3"]]


def announced_bad(case: Case, bad: int = 1) -> list[str]:
    """What this rank makes of counts that the rank ``bad`` announces as such."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_scmoe.mcore import token_dispatcher

    config = models.transformer_config(case)
    config.tensor_model_parallel_size = config.expert_tensor_parallel_size = 2
    groups = get_default_pg_collection()
    config.expert_model_parallel_size = groups.ep.size()
    count = 4 // groups.ep.size()
    here = range(groups.ep.rank() * count, (groups.ep.rank() + 1) * count)
    dispatcher = MoEAlltoAllTokenDispatcher(len(here), list(here), config, pg_collection=groups)
    check = token_dispatcher.Check(torch.tensor(dist.get_rank() != bad), "rows", "fix")
    counts = token_dispatcher.Counts(dispatcher, torch.full((1, 4), 3), check)
    with pytest.raises(ValueError, match=r"rows; rank\(s\) .* have some: fix") as caught:
        counts.split_rows(0)
    return str(caught.value).removeprefix("rows; rank(s) ").removesuffix(" have some: fix").split(", ")


# ---- through the entry script -----------------------------------------------------------------------------------

EP2 = "--expert-model-parallel-size 2"
TOP2 = with_flags(without_flag(STOCK, "--moe-shared-expert-intermediate-size"), "--moe-layer-freq [0,1]*2")
TRAINED = {
    "stock top-2": with_flags(TOP2, EP2, "--moe-router-topk 2"),
    "stock, shared expert": with_flags(STOCK, EP2),
    "stock, capacity": with_flags(TOP2, EP2, "--moe-expert-capacity-factor 1.0"),
    "stock, padded": with_flags(
        TOP2, EP2, "--moe-expert-capacity-factor 1.0", "--moe-pad-expert-input-to-capacity", "--overlap-chunks 2"
    ),
    "scmoe, adaptive": with_flags(SCMOE, EP2, "--overlap adaptive", "--overlap-chunks 2", "--train-iters 18"),
    "dgmoe": with_flags(
        without_flag(SCMOE, "--moe-shared-expert-intermediate-size"), EP2, "--shortcut dgmoe", "--moe-router-topk 2"
    ),
    "tensor parallel": with_flags(SCMOE, "--tensor-model-parallel-size 2", "--sequence-parallel"),
    "pipeline": with_flags(SCMOE, "--pipeline-model-parallel-size 2"),
    "low rank": with_flags(TOP2, EP2, "--lsh-compensation lowrank"),
    "lloyd": with_flags(TOP2, EP2, "--lsh-refinement lloyd", "--overlap-chunks 2"),
    "spherical": with_flags(TOP2, EP2, "--lsh-kind spherical"),
    "tensor and expert parallel": with_flags(SCMOE, EP2, "--tensor-model-parallel-size 2", "--sequence-parallel"),
    "pipeline and expert parallel": with_flags(SCMOE, EP2, "--pipeline-model-parallel-size 2"),
    "low rank, tensor parallel": with_flags(
        SCMOE, "--tensor-model-parallel-size 2", "--sequence-parallel", "--lsh-compensation lowrank"
    ),
}


def train(flags: list[str]) -> str:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it under tensor parallelism
    return training.train(flags)


QUICK = ("stock, padded", "scmoe, adaptive", "dgmoe", "pipeline")


@pytest.mark.parametrize("name", cases(TRAINED, QUICK))
def test_it_trains_and_reports(name, tmp_path):
    flags = with_flags(
        TRAINED[name],
        "--a2a-codec lsh",
        "--lsh-hashes 2",
        f"--overlap-report {tmp_path / 'report'}",
        f"--tensorboard-dir {tmp_path}",
    )
    printed = ranks.run(train, 4 if "and expert" in name else 2, flags)
    assert "exit code" not in printed[0], printed[0][-3000:]
    losses = list(training.scalars(tmp_path, "lm loss")["lm loss"].values())
    assert losses[-1] < losses[0]
    of_groups = [name for name in training.scalar_names(tmp_path) if name.startswith("codec/")]
    values = training.scalars(tmp_path, "overlap/sent_rate", "overlap/residual", *of_groups)
    assert all(0 < rate < 1 for rate in values["overlap/sent_rate"].values())
    assert all(0 < residual < 2 for residual in values["overlap/residual"].values())
    last_stage = "/group1" if "pipeline" in name else "/group"  # of two groups, or of all
    for what in ("sent_rate", "residual"):
        for iteration, overall in values[f"overlap/{what}"].items():
            mine = [values[tag][iteration] for tag in of_groups if tag.startswith(f"codec/{what}{last_stage}")]
            assert mine and overall == pytest.approx(fmean(mine))
    assert all(min(values[tag].values()) > 1 for tag in of_groups if "largest_cluster" in tag)


def steps_of_figures(flags: list[str]) -> list[int]:
    """Of each figure that W&B would get, in turn, where figures of other stages take their time.

    Whoever writes without having waited for another stage writes too little, or an earlier step behind a later one.
    """
    from megatron_scmoe.mcore import stages
    from megatron_scmoe.report import scalars

    send, steps = stages.StageMail.send, list[int]()

    def send_late(mail: stages.StageMail, text: str) -> None:
        time.sleep(0.5)
        send(mail, text)

    stages.StageMail.send = send_late
    scalars.get_wandb_writer = lambda: SimpleNamespace(run=object(), log=lambda _values, step: steps.append(step))
    train(flags)
    return steps


@pytest.mark.parametrize("name", cases(["stock top-2", "pipeline", "pipeline and expert parallel"], ["pipeline"]))
def test_tensorboard_has_every_group(name, tmp_path):
    """Whichever pipeline stage it is in, of each step that is logged, the last one too."""
    flags = with_flags(
        TRAINED[name],
        *("--a2a-codec lsh", "--lsh-hashes 2", "--num-layers 8", "--train-iters 6", "--log-interval 2"),
        *(f"--overlap-report {tmp_path / 'report'}", f"--tensorboard-dir {tmp_path}"),
    )
    if name == "stock top-2":
        flags = with_flags(flags, "--moe-layer-freq [0,1]*4")
    *_, steps = ranks.run(steps_of_figures, 4 if "and expert" in name else 2, flags)
    assert steps == sorted(steps) and set(steps) == {2, 4, 6}
    tags = [tag for tag in training.scalar_names(tmp_path) if tag.startswith("codec/")]
    assert len(tags) == 3 * 4
    written = training.scalars(tmp_path, *tags)
    lines_of_ranks = read(tmp_path / "report")
    for iteration in (2, 4, 6):
        lines = [line for lines in lines_of_ranks for line in lines if line["iteration"] == iteration]
        expected = codec_scalars([[GroupRow(**group) for group in line["groups"]] for line in lines])
        found = {tag.removeprefix("codec/"): values.pop(iteration) for tag, values in written.items()}
        assert found == pytest.approx(expected)
        assert all(size > 1 for tag, size in found.items() if "largest_cluster" in tag)
    assert not any(written.values())


@pytest.mark.parametrize("skipped", cases(["", "--iterations-to-skip 3"], [""]))
def test_the_log_says_the_rate_where_nothing_was_asked_for(skipped):
    flags = with_flags(TRAINED["stock top-2"], "--a2a-codec lsh", "--lsh-hashes 2", "--log-interval 2")
    printed, *_ = ranks.run(train, 2, with_flags(flags, "--train-iters 6", *filter(None, [skipped])))
    assert [int(found) for found in re.findall(r"overlap at iteration (\d+): .* of the rows sent", printed)] == [
        2,
        4,
        6,
    ]
    printed, *_ = ranks.run(train, 2, with_flags(TRAINED["stock top-2"], "--log-interval 2", "--train-iters 3"))
    assert "exit code" not in printed and "rows sent" not in printed


def train_maps(flags: list[str]) -> tuple[str, list[torch.Tensor]]:
    """What was printed, and the learned maps of this rank when training is over."""
    from megatron_scmoe.codec.compensation import ResidualMap

    with instances_of(ResidualMap) as made:
        printed = train(flags)
    return printed, [weight.detach().clone() for one in made for weight in (one.down, one.up)]


@pytest.mark.full
def test_learned_maps_stay_equal_on_tensor_parallel_ranks():
    """Each rank sees a part of the tokens; the gradients are summed over all."""
    flags = with_flags(TRAINED["low rank, tensor parallel"], "--a2a-codec lsh", "--lsh-hashes 2")
    (printed, one), (_, other) = ranks.run(train_maps, 2, flags)
    assert "exit code" not in printed, printed[-3000:]
    assert len(one) == len(other) == 4 and all(weight.abs().sum() > 0 for weight in one)  # two groups
    assert all(torch.equal(weight, its) for weight, its in zip(one, other, strict=True))


def test_a_rate_is_held_where_a_stage_has_no_moe():
    flags = with_flags(
        without_flag(STOCK, "--moe-shared-expert-intermediate-size"),
        "--moe-layer-freq [0,0,1,1]",
        "--pipeline-model-parallel-size 2",
        "--a2a-codec lsh",
        "--lsh-target-rate 0.4",
        "--train-iters 3",
    )
    for printed in ranks.run(train, 2, flags):
        assert "exit code" not in printed, printed[-3000:]


SETTINGS = ("compensation paper", "compensation lowrank", "refinement lloyd")


@pytest.mark.parametrize("setting", cases(SETTINGS, ["compensation lowrank"]))
def test_resume_is_exact(tmp_path, setting):
    """Iterations 6 to 10 after a resume at 5 equal those of a run that was not interrupted, bit for bit."""
    codec = ["--a2a-codec lsh", "--lsh-hashes 2", f"--lsh-{setting}"]
    flags = with_flags(SCMOE, EP2, *codec, f"--save {tmp_path}/save", "--save-interval 5")
    scalars = {}
    for name, more in (("through", []), ("resumed", [f"--load {tmp_path}/save"])):
        printed, *_ = ranks.run(training.train, 2, with_flags(flags, *more, f"--tensorboard-dir {tmp_path}/{name}"))
        assert "exit code" not in printed, printed[-3000:]
        scalars[name] = training.scalars(tmp_path / name, "lm loss", "grad-norm")
        (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("5")
    for name, values in scalars["resumed"].items():
        assert sorted(values) == [6, 7, 8, 9, 10]
        assert all(values[iteration] == scalars["through"][name][iteration] for iteration in values)


def train_to_rate(flags: list[str]) -> tuple[str, dict[str, float]]:
    from megatron.training import get_args

    printed = training.train(flags)
    assert "exit code" not in printed, printed[-3000:]
    return printed, getattr(get_args(), "lsh_levels", {})


@contextlib.contextmanager
def instances_of(kind: type) -> Iterator[list]:
    """What is made of ``kind`` inside."""
    made, original = [], kind.__init__

    def init(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        made.append(self)

    kind.__init__ = init
    try:
        yield made
    finally:
        kind.__init__ = original


def evaluated_levels(flags: list[str]) -> tuple[str, list[float]]:
    """What was printed, and how many hash functions counted in each group at the end."""
    from megatron_scmoe.codec.rate import RateControl

    with instances_of(RateControl) as made:
        printed = training.train(flags)
    return printed, [control.level.item() for control in made]


@pytest.mark.full
def test_a_target_rate_is_held_alike_on_all_ranks_and_after_a_resume(tmp_path):
    codec = with_flags(
        TRAINED["stock top-2"],
        "--seq-length 64",
        "--max-position-embeddings 64",
        "--a2a-codec lsh",
        "--lsh-hashes 8",
    )
    flags = with_flags(
        codec,
        "--lsh-target-rate 0.4",
        f"--overlap-report {tmp_path / 'report'}",
        f"--tensorboard-dir {tmp_path}",
        f"--save {tmp_path / 'saved'}",
        f"--load {tmp_path / 'saved'}",
        "--save-interval 100",
        "--override-opt-param-scheduler",
    )
    (printed, levels), _ = ranks.run(train_to_rate, 2, with_flags(flags, "--train-iters 30"))
    assert "exit code" not in printed, printed[-3000:]
    assert "codec warning" not in printed.partition("iteration       15/")[2]
    rates = training.scalars(tmp_path, "overlap/sent_rate")["overlap/sent_rate"]
    late = [rate for iteration, rate in rates.items() if iteration > 15]
    assert sum(late) / len(late) == pytest.approx(0.4, rel=0.1)
    assert levels.keys() == {"1", "3"} and all(0 < level < 8 for level in levels.values())

    (printed, levels), _ = ranks.run(train_to_rate, 2, with_flags(flags, "--train-iters 33"))
    assert "exit code" not in printed, printed[-3000:]
    resumed = training.scalars(tmp_path, "overlap/sent_rate")["overlap/sent_rate"]
    assert resumed[32] == pytest.approx(0.4, rel=0.25)  # the first step of a run is not reported

    (printed, found), _ = ranks.run(
        evaluated_levels, 2, with_flags(flags, "--train-iters 33", "--skip-train", "--lsh-evaluation centroids")
    )
    assert "exit code" not in printed, printed[-3000:]
    assert found and found == list(levels.values())  # an evaluation hashes as the training did

    free = f"--overlap-report {tmp_path / 'free'}", f"--tensorboard-dir {tmp_path / 'free'}", "--train-iters 3"
    (printed, levels), _ = ranks.run(train_to_rate, 2, with_flags(codec, *free))
    assert "exit code" not in printed, printed[-3000:]
    rates = training.scalars(tmp_path / "free", "overlap/sent_rate")["overlap/sent_rate"]
    assert rates[3] > 0.6 and not levels  # negative control: it is held there, and not there by itself


@pytest.mark.parametrize(
    ("rate", "why"),
    [
        ("0.99", "all 1 hash functions count and more rows should travel; give more --lsh-hashes"),
        ("0.001", "no hash function counts, one mean for each expert; give a larger rate"),
    ],
)
def test_a_rate_out_of_reach_is_said(rate, why):
    flags = with_flags(TRAINED["stock top-2"], "--a2a-codec lsh", "--lsh-hashes 1", f"--lsh-target-rate {rate}")
    printed, _ = ranks.run(training.train, 2, with_flags(flags, "--train-iters 5"))
    for group in (1, 3):
        assert f" > codec warning: group {group} cannot hold --lsh-target-rate {rate}: {why}\n" in printed, printed


def levels_of_ranks() -> list[float]:
    """Ranks see different tokens and end at one level."""
    from megatron_scmoe.codec.lsh import cluster
    from megatron_scmoe.codec.rate import RateControl, adjust_rates

    control = RateControl(0.25, 8, width=2)
    levels = []
    for step in range(4):
        generator = torch.Generator().manual_seed(dist.get_rank() + 10 * step)
        control.see(cluster(torch.randint(20, (100,), generator=generator), torch.tensor([60, 40])))
        adjust_rates([control], dist.group.WORLD)
        levels.append(control.level.item())
    return levels


def test_levels_are_equal_on_all_ranks():
    one, *others = ranks.run(levels_of_ranks, 3)
    assert all(other == one for other in others)
    assert len(set(one)) > 1


def places_of_a_rate(loaded: bool) -> set[str]:
    """Where a control's tensors are before its first step; the meta device stands for a GPU."""
    from megatron_scmoe.codec.maker import CargoMaker
    from megatron_scmoe.config import Codec, ScMoEConfig, Shortcut
    from megatron_scmoe.training.session import OverlapSession

    torch.cuda.current_device = lambda: torch.device("meta")
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, a2a_codec=Codec.LSH, lsh_target_rate=0.2)
    maker = CargoMaker(scmoe, SimpleNamespace(hidden_size=48, moe_latent_size=None, moe_expert_capacity_factor=None), 3)
    if loaded:
        session = OverlapSession(Namespace(lsh_levels={"3": 2.5}), scmoe)
        session._see_codec(SimpleNamespace(cargo_maker=maker, group_index=3))
    control = maker.rate_control
    assert control is not None
    before = {control.level.device.type, control.seen.device.type}
    control.adjust(control.seen)
    return before | {control.level.device.type, control.seen.device.type}


@pytest.mark.parametrize("loaded", [False, True])
def test_levels_are_where_the_rows_will_be(loaded):
    """Also on a stage that has routed nothing yet, whose ranks reduce what they saw all the same."""
    assert ranks.run(places_of_a_rate, 1, loaded) == [{"meta"}]
