"""Unique tokens: what a rank gets once and sends back once equals slow loops, and rows are those that are predicted.

Whole flights run on gloo ranks in float64, with experts of a line each; the loops run in one process and share no code.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import models
import pytest
import ranks
import test_layer
import test_pipelined
import torch
import torch.distributed as dist
from cases import cases
from models import Case
from test_latent import sent_bytes
from test_overlap import EP, assert_bit_equal, assert_close, run
from test_slow_link import slow_links  # noqa: F401 - a fixture
from test_token_dispatcher import LAYOUTS, layout
from torch import Tensor
from training import ROOT

from megatron_scmoe.config import expected_unique_share

WIDTH = 5


class Flown(NamedTuple):
    """Tokens of a routing, the same number on every rank.

    Attributes:
        tokens: of each rank.
        experts: on all expert-parallel ranks together.
        topk: experts of a token.
        chosen: how: "uniform": any; "first rank": those of the first rank alone; "all ranks": one of each;
            "none of the second rank": the second rank's tokens have none, as with zero experts alone.
        chunks: that the tokens travel in.
        apart: whether weights travel as collectives of their own.
        places: ranks or nodes that "all ranks" means; 0: the expert-parallel ranks.
    """

    tokens: int = 7
    experts: int = 8
    topk: int = 3
    chosen: str = "uniform"
    chunks: int = 1
    apart: bool = False
    places: int = 0


FLOWN = {
    "uniform": Flown(),
    "in chunks": Flown(chunks=3),
    "apart": Flown(chunks=2, apart=True),
    "few of many experts": Flown(experts=64, topk=2, tokens=11),
    "few of many, apart, in chunks": Flown(experts=64, topk=2, tokens=11, chunks=2, apart=True),
    "all to one rank": Flown(chosen="first rank", topk=2),
    "one token": Flown(tokens=1),
    "one token in chunks": Flown(tokens=1, chunks=3),
    "every expert": Flown(topk=8),
    "a rank that sends nothing": Flown(chosen="none of the second rank", chunks=2),
    "nothing repeats": Flown(chosen="all ranks"),
}


def choices_of(case: Flown, rank: int, token: int, ep: int) -> list[int]:
    """Experts of a token, each once."""
    here = case.experts // ep
    generator = torch.Generator().manual_seed(1000 * rank + token)
    shuffled = torch.randperm(case.experts, generator=generator).tolist()
    if case.chosen == "first rank":
        return [expert for expert in shuffled if expert < here][: case.topk]
    if case.chosen == "none of the second rank" and rank == 1:
        return []
    if case.chosen == "all ranks":
        places = case.places or ep
        of_place = case.experts // places
        return [next(expert for expert in shuffled if expert // of_place == one) for one in range(places)]
    return shuffled[: case.topk]


def values(name: str, *shape: int) -> Tensor:
    return models.parameter(name, shape).double()


def inputs(case: Flown, rank: int, ep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a rank: tokens [n, 1, w], gate weights [n, experts], and what the output is multiplied with for the loss."""
    probs = torch.zeros(case.tokens, case.experts, dtype=torch.float64)
    for token in range(case.tokens):
        for expert in choices_of(case, rank, token, ep):
            probs[token, expert] = 0.1 + values(f"gate {rank} {token} {expert}", 1).abs()
    return values(f"tokens {rank}", case.tokens, 1, WIDTH), probs, values(f"towards {rank}", case.tokens, 1, WIDTH)


def scales(case: Flown, tp: int) -> Tensor:
    """The parameters of all experts, each in ``tp`` parts: an expert is the sum of its parts, tanh(scale x)."""
    return values("experts", tp, case.experts, WIDTH)


# ---- by ours ----------------------------------------------------------------------------------------------------


def layer_of(case: Flown) -> Any:
    """What flights ask of Core's layer, with this rank's experts; beside them their parameters."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    groups = get_default_pg_collection()
    config = models.transformer_config(Case(topk=2))
    config.num_moe_experts, config.moe_router_topk = case.experts, case.topk
    config.hidden_size, config.params_dtype = WIDTH, torch.float64
    config.tensor_model_parallel_size = config.expert_tensor_parallel_size = groups.expt_tp.size()
    config.expert_model_parallel_size = groups.ep.size()
    here = case.experts // groups.ep.size()
    local = list(range(groups.ep.rank() * here, (groups.ep.rank() + 1) * here))
    own = scales(case, groups.expt_tp.size())[groups.expt_tp.rank(), local].clone().requires_grad_()

    def experts(rows: Tensor, rows_per_expert: Tensor, weights: Tensor) -> tuple[Tensor, None]:
        assert int(rows_per_expert.sum()) == len(rows) == len(weights)
        of_row = own[torch.arange(here).repeat_interleave(rows_per_expert)]
        return weights.unsqueeze(-1) * torch.tanh(of_row * rows), None

    dispatcher = MoEAlltoAllTokenDispatcher(here, local, config, pg_collection=groups)
    return SimpleNamespace(config=config, token_dispatcher=dispatcher, ep_group=groups.ep, experts=experts, own=own)


def cargo_of(once: str, layer: Any, tokens: Tensor, probs: Tensor, tag: Any, **options: Any) -> Any:
    """``once``: a value of --a2a-unique."""
    from megatron_scmoe.dispatch.node import NodeTokens
    from megatron_scmoe.dispatch.tokens import Tokens
    from megatron_scmoe.dispatch.unique import UniqueTokens
    from megatron_scmoe.mcore.nodes import nodes_of

    if once == "node":
        return NodeTokens(layer, tokens, probs, nodes=nodes_of(layer.ep_group), tag=tag, **options)
    if once == "rank":
        return UniqueTokens(layer, tokens, probs, **options)
    return Tokens(layer, tokens, probs, probs > 0, **options, travels_topk=False)


def flown(case: Flown, how: str, mutant: str = "") -> dict[str, Tensor]:
    """Output and gradients of this rank; rows, as they travel there, and inside its node."""
    from megatron_scmoe.dispatch.exchange import Tag
    from megatron_scmoe.dispatch.flights import Flights
    from megatron_scmoe.dispatch.tokens import How
    from megatron_scmoe.overlap.observe import Marker

    layer = layer_of(case)
    tokens, probs, towards = inputs(case, dist.get_rank(), layer.ep_group.size())
    tokens.requires_grad_()
    probs.requires_grad_()
    passed = How(apart_above=-1.0 if case.apart else float("inf"))
    options: dict[str, Any] = {"chunks": case.chunks, "how": passed}
    if how != "none":
        spoil(mutant)
    tag = Tag(Marker(0))
    cargo = cargo_of(how, layer, tokens, probs, tag, **options)
    flights = Flights(layer, cargo, slots=(2,) * case.chunks, blocking=False, aside=False, tag=tag)
    flights.run_experts(slot=2)
    output = flights.finish_combine()
    (output * towards).sum().backward()
    rows = [cargo.counts.split_rows(chunk)[0] for chunk in range(case.chunks)]

    def inside(chunk: int) -> list[int]:
        return cargo.counts.split_inside(chunk)[0]

    return {
        "output": output.detach(),
        "tokens": tokens.grad,
        "weights": probs.grad,
        "experts": layer.own.grad,
        "rows": torch.tensor(rows),
    } | ({"inside": torch.tensor(list(map(inside, range(case.chunks))))} if how == "node" else {})


def spoil(mutant: str) -> None:
    """Put a fault into the package."""
    from megatron_scmoe.mcore.unique_rows import UniqueRowsDispatcher as Dispatcher

    spread, combine = Dispatcher.dispatch_postprocess, Dispatcher.combine_postprocess

    def weighted_twice(self, rows, weights):
        rows, rows_per_expert, spread_weights = spread(self, rows, weights)
        return rows, rows_per_expert, spread_weights**2

    def one_dropped(self, outputs):
        return combine(self, torch.cat([outputs[:-1], outputs[:1].detach() * 0]))

    if mutant == "a weight applied twice":
        Dispatcher.dispatch_postprocess = weighted_twice
    elif mutant == "a row dropped":
        Dispatcher.combine_postprocess = one_dropped


def all_flown(names: list[str], mutant: str = "") -> dict[tuple[str, str], dict[str, Tensor]]:
    return {(name, how): flown(FLOWN[name], how, mutant) for name in names for how in ("rank", "none")}


@functools.cache
def found(layout_name: str) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    """By rank, of every routing, with unique tokens and without."""
    size, ep, tp = LAYOUTS[layout_name]
    return ranks.run(all_flown, size, list(FLOWN), layout=layout(ep, tp))


# ---- by loops ---------------------------------------------------------------------------------------------------


def in_loops(case: Flown, size: int, ep: int, tp: int) -> list[dict[str, Tensor]]:
    """The same of all ranks, token by token and rank by rank; tensor-parallel ranks are neighbours."""
    parameters = scales(case, tp).requires_grad_()
    here, loss, of_ranks = case.experts // ep, 0.0, []
    for rank in range(size):
        tokens, probs, towards = inputs(case, rank, ep)
        tokens.requires_grad_()
        probs.requires_grad_()
        rows, outputs = torch.zeros(case.chunks, ep, dtype=torch.long), []
        for chunk, part in enumerate(torch.arange(case.tokens).tensor_split(case.chunks)):
            for token in part.tolist():
                total = torch.zeros(WIDTH, dtype=torch.float64)
                for owner in range(ep):
                    there = [one for one in choices_of(case, rank, token, ep) if one // here == owner]
                    rows[chunk, owner] += bool(there)
                    for expert in there:
                        for shard in range(tp):
                            total = total + probs[token, expert] * torch.tanh(
                                parameters[shard, expert] * tokens[token, 0]
                            )
                outputs.append(total)
        output = torch.stack(outputs).unsqueeze(1)
        loss = loss + (output * towards).sum()
        of_ranks.append((output, tokens, probs, rows))
    loss.backward()
    return [
        {
            "output": output.detach(),
            "tokens": torch.zeros_like(tokens) if tokens.grad is None else tokens.grad,
            "weights": torch.zeros_like(probs) if probs.grad is None else probs.grad,
            "experts": parameters.grad[rank % tp].view(ep, here, WIDTH)[rank // tp],
            "rows": rows,
        }
        for rank, (output, tokens, probs, rows) in enumerate(of_ranks)
    ]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("name", FLOWN)
@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_it_equals_slow_loops(layout_name, name):
    """Outputs and all gradients, of gate weights too; and how many rows go to each rank."""
    case, (size, ep, tp) = FLOWN[name], LAYOUTS[layout_name]
    for of_rank, expected in zip(found(layout_name), in_loops(case, size, ep, tp), strict=True):
        assert_equal(of_rank[name, "rank"], expected)


@pytest.mark.parametrize("layout_name", LAYOUTS)
def test_it_equals_tokens_that_travel_as_often_as_they_have_experts(layout_name):
    """Experts read the same rows in the same order, so that their gradients are the same bit for bit."""
    fewer = set()
    for of_rank, name in itertools.product(found(layout_name), FLOWN):
        unique, plain = dict(of_rank[name, "rank"]), dict(of_rank[name, "none"])
        if unique.pop("rows").sum() < plain.pop("rows").sum():
            fewer.add(name)
        assert torch.equal(unique.pop("experts"), plain.pop("experts"))
        assert_equal(unique, plain)
    assert fewer >= {"uniform", "all to one rank", "every expert", "in chunks"} and "nothing repeats" not in fewer


@pytest.mark.parametrize("layout_name", ["ep2", "ep4", "one rank", "ep2 expert tp2"])
def test_where_nothing_repeats_no_bit_changes(layout_name):
    for of_rank in found(layout_name):
        unique, plain = (of_rank["nothing repeats", one] for one in ("rank", "none"))
        assert all(torch.equal(value, plain[name]) for name, value in unique.items())
        assert unique["output"].any() and unique["weights"].any()


@pytest.mark.parametrize("mutant", ["a weight applied twice", "a row dropped"])
def test_a_fault_is_noticed(mutant):
    """Negative control of all comparisons above."""
    for of_rank in ranks.run(all_flown, 2, ["uniform"], mutant, layout=layout(2, 1)):
        with pytest.raises(AssertionError):
            assert_equal(of_rank["uniform", "rank"], of_rank["uniform", "none"])


# ---- what lies beside a row -------------------------------------------------------------------------------------


def shapes_sent(names: list[str]) -> dict[str, list[tuple[str, int]]]:
    """Dtype and bytes of a row of each all-to-all, of one step: there, back, and in backward."""
    sent: list[tuple[str, int]] = []
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda output, packed, *args, **kwargs: (
        sent.append((str(packed.dtype), packed[:1].nbytes)) or original(output, packed, *args, **kwargs)
    )
    found = {}
    for name in names:
        sent.clear()
        flown(FLOWN[name], "rank")
        found[name] = list(sent)
    dist.all_to_all_single = original
    return found


def test_a_row_carries_the_shorter_of_two_forms():
    """Eight experts of 8 bytes each are 64; two weights and two ids, filled up to 16 bytes each, are 32 for 32 experts.

    Ids do not travel in backward.
    """
    row = 48  # 5 numbers of 8 bytes, filled up
    names = ["every expert", "few of many experts", "few of many, apart, in chunks"]
    for one in ranks.run(shapes_sent, 2, names, layout=layout(2, 1)):
        assert [size for _, size in one["every expert"]] == [row + 32, 40, 40, row + 32]
        assert [size for _, size in one["few of many experts"]] == [row + 32, 40, 40, row + 16]
        apart = [*[("torch.float64", 40), ("torch.float64", 16), ("torch.uint8", 4)] * 2]
        assert one["few of many, apart, in chunks"][:6] == apart
        assert "torch.int16" not in {name for sent in one.values() for name, _ in sent}  # NCCL has no such type


@pytest.mark.parametrize(
    ("dtype", "some", "here", "shorter"),
    [
        (torch.float32, 2, 2, False),  # all of them are wanted
        (torch.float32, 2, 8, False),  # 32 bytes each
        (torch.float32, 2, 32, True),  # 32 against 128
        (torch.bfloat16, 2, 16, False),
        (torch.bfloat16, 8, 32, True),
    ],
)
def test_which_form_is_shorter(dtype, some, here, shorter):
    from megatron_scmoe.dispatch.unique import ids_are_shorter

    assert ids_are_shorter(dtype, some, here) is shorter


# ---- models -----------------------------------------------------------------------------------------------------

UNIQUE = Case(topk=2, unique="rank")


def longcat(case: Case) -> Case:
    return case.replace(router="longcat", zero_experts=3, topk=3, combine="add")


def wired(case: Case) -> dict[str, Case]:
    """Architectures, by name, with the experts of ``case`` and its places."""
    return {
        "pos2": case,
        "pos1, every block": case.replace(position=("pos1",), moe_every=1),
        "pos3, added, chunks": case.replace(position=("pos3",), combine="add", chunks=3),
        "ids": case.replace(experts=64),
        "late landing": case.replace(num_groups=4, span=2, landing=1),
        "farskip": case.replace(span=2, landing=1, moe_every=1, position=("farskip",)),
        "shared": case.replace(share_groups=2, combine="cg2"),
        "longcat": longcat(case),
        "longcat, latents, chunks": longcat(case).replace(latent=8, chunks=2),
        "latents": case.replace(latent=8),
    }


MODELS = wired(UNIQUE) | {"top-3": UNIQUE.replace(topk=3), "top-4 of 4": UNIQUE.replace(topk=4)}
QUICK = ("pos2", "ids", "late landing", "farskip", "longcat, latents, chunks")


@pytest.mark.parametrize(
    ("name", "ep"),
    cases([(name, ep) for name in MODELS for ep in (1, 2, 4)], [(name, 2) for name in QUICK]),
)
def test_models_equal_the_reference(name, ep):
    """Losses and every gradient, by another implementation, which goes through tokens."""
    case = MODELS[name]
    expected = test_layer.run_reference(case.reference_config())
    assert test_layer.largest_difference(test_layer.run(case, ep), expected) < 1e-5


def plain(case: Case) -> Case:
    return case.replace(unique="none")


@pytest.mark.parametrize("case", [UNIQUE, longcat(UNIQUE)], ids=["top-2", "zero experts"])
def test_one_expert_on_each_rank_changes_no_bit(case):
    """Of a whole model: a token has one expert on a rank at most."""
    assert_bit_equal(run(case, 4), run(plain(case), 4))


@pytest.mark.parametrize(
    "changes",
    [
        {"expert_slot": (1,)},
        {"expert_slot": (4,)},
        {"recompute": "full"},
        {"weights_apart_above": 0.0},
    ],
    ids=str,
)
def test_a_schedule_changes_no_bit(changes):
    assert_bit_equal(run(UNIQUE.replace(**changes), 2), run(UNIQUE.replace(overlap="off"), 2))


@pytest.mark.parametrize(
    "case",
    [
        UNIQUE.replace(capacity=0.6, chunks=2),
        UNIQUE.replace(capacity=1.5, padded=True),
        UNIQUE.replace(capacity=0.6, padded=True, chunks=2),
    ],
    ids=["dropped, chunks", "padded", "padded, dropped, chunks"],
)
def test_capacity_drops_the_same_choices(case):
    """What pads an expert up to its capacity stays at home."""
    assert_close(run(case, 2), run(plain(case), 2))
    with pytest.raises(AssertionError):  # negative control: drops change what is computed
        assert_close(run(case, 2), run(case.replace(capacity=None, padded=False), 2))


def test_bf16_is_no_farther_from_float32_than_tokens_that_travel_as_often_as_they_have_experts():
    case = UNIQUE.replace(dtype=torch.bfloat16, num_groups=1)
    exact = run(plain(case).replace(dtype=torch.float32), 2)

    def off(rounded: list[tuple[Tensor, dict[str, Tensor]]]) -> float:
        """Relative error of all gradients of all ranks together."""
        pairs = [
            (grads[name].float() - right[name], right[name])
            for (_, grads), (_, right) in zip(rounded, exact, strict=True)
            for name in right
        ]
        return math.sqrt(
            sum(float(wrong.norm()) ** 2 for wrong, _ in pairs) / sum(float(r.norm()) ** 2 for _, r in pairs)
        )

    assert 0 < off(run(case, 2)) < 1.5 * off(run(plain(case), 2))
    assert off(run(case.replace(capacity=1.0), 2)) > 1.5 * off(run(plain(case), 2))  # drops are seen


def stock(kind: str, chunks: int, unique: str) -> tuple[tuple[Tensor, dict[str, Tensor]], int]:
    """Losses and gradients of a step, and bytes that the combines of its forward sent."""
    from megatron_scmoe.config import Unique
    from megatron_scmoe.overlap import observe

    build = test_pipelined.build
    test_pipelined.build = lambda kind, chunks: build(kind, chunks, a2a_unique=Unique(unique))
    with observe.recording() as recorded:
        found = test_pipelined.losses_and_gradients(kind, chunks)
    combines = [one for one in recorded.transfers if one.name == "combine" and not one.backward]
    assert combines
    return found, sum(one.sent_bytes for one in combines)


STOCK = ("top-2", "dropped", "padded", "latents", "balance loss")


@pytest.mark.parametrize("kind", cases(STOCK, {"top-2", "padded"}))
def test_stock_layers(kind):
    expected = ranks.run(test_pipelined.losses_and_gradients, 2, kind, 0, layout=EP[2])
    every = ranks.run(stock, 2, kind, 1, "none", layout=EP[2])
    for chunks in (1, 2):
        unique = ranks.run(stock, 2, kind, chunks, "rank", layout=EP[2])
        assert_close([found for found, _ in unique], expected)
        assert sum(sent for _, sent in unique) < 0.95 * sum(sent for _, sent in every)


# ---- how many rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "topk", "ep", "zero"), [(4, 2, 2, 0), (6, 3, 3, 0), (8, 5, 2, 0), (4, 4, 4, 0), (4, 3, 2, 2)]
)
def test_expected_share_by_counting_all_choices(experts, topk, ep, zero):
    here, rows, real = experts // ep, 0, 0
    for chosen in itertools.combinations(range(experts + zero), topk):
        there = [expert // here for expert in chosen if expert < experts]
        rows, real = rows + len(set(there)), real + len(there)
    assert expected_unique_share(experts, topk, ep, zero) == pytest.approx(rows / real)


def test_expected_share_of_what_cannot_be_shared_is_an_error():
    for experts, topk, ep in ((6, 2, 4), (4, 5, 2), (4, 0, 2), (4, 2, 0)):
        with pytest.raises(ValueError, match="ranks have the same number of experts"):
            expected_unique_share(experts, topk, ep)


PREDICTED = {"top-2 at EP 2": (8, 2, 2), "top-6 at EP 4": (64, 6, 4), "12 of 64 at EP 8": (64, 12, 8)}
"""Experts, top-k, expert parallelism."""


def rows_and_bytes(case: Flown, hows: tuple[str, ...] = ("rank", "none")) -> list[tuple[int, int]]:
    """That leave this rank in a forward's dispatch and combine, in each of ``hows``, of uniform routing."""
    from megatron_scmoe.dispatch.exchange import Tag
    from megatron_scmoe.dispatch.flights import Flights
    from megatron_scmoe.overlap import observe

    layer = layer_of(case)
    rank, found = dist.get_rank(), []
    scores = torch.rand(case.tokens, case.experts, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    probs = torch.zeros_like(scores).scatter(1, scores.topk(case.topk).indices, 0.5)
    tokens = torch.ones(case.tokens, 1, WIDTH, dtype=torch.float64)
    for how in hows:
        with observe.recording() as recorded, torch.no_grad():
            tag = Tag(observe.Marker(0))
            cargo = cargo_of(how, layer, tokens, probs, tag, chunks=1)
            flights = Flights(layer, cargo, slots=(1,), blocking=False, aside=False, tag=tag)
            flights.run_experts(slot=1)
            flights.finish_combine()
        there = cargo.counts.split_rows(0)[0]
        (combine,) = [one.sent_bytes for one in recorded.transfers if one.name == "combine"]
        found.append((sum(there) - there[cargo.group.rank()], combine))
    return found


@pytest.mark.parametrize("name", PREDICTED)
def test_rows_are_as_predicted_under_uniform_routing(name):
    """By the counts, and by the bytes that the exchanges send: those of a combine have no weights beside them."""
    experts, topk, ep = PREDICTED[name]
    case = Flown(tokens=2000, experts=experts, topk=topk)
    of_ranks = torch.tensor(ranks.run(rows_and_bytes, ep, case, layout=layout(ep, 1)))  # [ranks, 2, 2]
    (rows, num_bytes), (all_rows, all_bytes) = of_ranks.sum(dim=0).tolist()
    expected = expected_unique_share(experts, topk, ep)
    assert rows / all_rows == pytest.approx(expected, rel=0.02)
    assert num_bytes / all_bytes == pytest.approx(expected, rel=0.02)
    assert expected < 0.85  # another share would be noticed


def test_a_step_sends_fewer_bytes_as_the_report_counts_them():
    case = UNIQUE.replace(num_groups=1)
    found = [ranks.run(sent_bytes, 2, one, layout=EP[2]) for one in (case, plain(case))]
    for unique, every in zip(*found, strict=True):
        assert 0.4 * every < unique < 0.95 * every


@pytest.mark.full
@pytest.mark.usefixtures("slow_links")
def test_bytes_by_interface_counters(tmp_path: Path):
    """Of each rank's network interface, under uniform routing. Two weights take the 16 bytes that one does, too."""
    counted = {}
    for unique in ("none", "rank"):
        path = tmp_path / f"{unique}.json"
        words = [sys.executable, ROOT / "tools" / "slow_link.py", "--rate", "unlimited", "--"]
        words += [sys.executable, ROOT / "tests" / "support" / "latent_bytes.py", path, 0, unique]
        subprocess.run([str(word) for word in words], check=True, timeout=300)
        counted[unique] = json.loads(path.read_text())["interface"]
    ratio = sum(counted["rank"]) / sum(counted["none"])
    assert ratio == pytest.approx(expected_unique_share(4, 2, 2), rel=0.02), counted
