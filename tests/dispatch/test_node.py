"""Tokens once for a node: what is spread inside it and summed there equals slow loops, over nodes that ranks pretend.

Ranks of one machine are on the nodes that NCCL_HOSTID names, which NCCL, too, believes.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import ranks
import test_layer
import test_pipelined
import test_unique
import torch
import torch.distributed as dist
import training
from cases import cases
from models import Case
from test_overlap import (
    EP,
    OPS,
    assert_bit_equal,
    assert_close,
    plan_of,
    recorded_order,
    shape_of,
)
from test_slow_link import slow_links  # noqa: F401 - a fixture
from test_token_dispatcher import layout
from test_unique import FLOWN, Flown, assert_equal, choices_of, flown, in_loops, rows_and_bytes, wired
from torch import Tensor
from training import ROOT, SCMOE, with_flags

from megatron_scmoe.config import ConfigError, expected_unique_share
from megatron_scmoe.mcore.nodes import ranks_of_a_node
from megatron_scmoe.overlap.plan import backward_order, even_plan, forward_order

LAYOUTS = {
    # name -> ranks, expert parallelism, expert tensor parallelism, expert-parallel ranks of a node
    "2 nodes of 2": (4, 4, 1, 2),
    "2 nodes of 3": (6, 6, 1, 3),
    "3 nodes of 2": (6, 6, 1, 2),
    "4 nodes of 2": (8, 8, 1, 2),
    "2 nodes of 4": (8, 8, 1, 4),
    "2 nodes of 2, expert tp2": (8, 4, 2, 2),
}
QUICK = ("2 nodes of 2", "2 nodes of 3", "2 nodes of 2, expert tp2")


def pretend(ranks_of_node: int) -> None:
    """That this rank is on a node with as many ranks."""
    os.environ["NCCL_HOSTID"] = f"node {dist.get_rank() // ranks_of_node}"


def fitted(name: str, ep: int, nodes: int) -> Flown:
    """A case, with experts that ``ep`` ranks can share; "nothing repeats" on a node, too."""
    case = FLOWN[name]
    experts = case.experts if case.experts % ep == 0 and case.experts > ep else 3 * case.experts
    case = case._replace(experts=experts, topk=experts if name == "every expert" else case.topk)
    return case._replace(places=nodes) if name == "nothing repeats" else case


def flown_on_nodes(layout_name: str, mutant: str = "") -> dict[tuple[str, str], dict[str, Tensor]]:
    _, ep, tp, mates = LAYOUTS[layout_name]
    pretend(mates * tp)
    return {
        (name, how): flown(fitted(name, ep, ep // mates), how, mutant)
        for name in (FLOWN if not mutant else ["uniform"])
        for how in ("node", "none")
    }


@functools.cache
def found(layout_name: str) -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    """By rank, of every routing, once for a node and once for each expert."""
    size, ep, tp, _ = LAYOUTS[layout_name]
    return ranks.run(flown_on_nodes, size, layout_name, layout=layout(ep, tp))


def rows_in_loops(case: Flown, rank: int, ep: int, tp: int, mates: int) -> tuple[Tensor, Tensor]:
    """That a rank sends to each node, and to each rank of its own, in each chunk."""
    chunks = [part.tolist() for part in torch.arange(case.tokens).tensor_split(case.chunks)]
    shard, ep_rank = rank % tp, rank // tp
    node, local = divmod(ep_rank, mates)
    across = torch.zeros(case.chunks, ep // mates, dtype=torch.long)
    inside = torch.zeros(case.chunks, mates, dtype=torch.long)
    for chunk, part in enumerate(chunks):
        for token in part:
            owners = {expert // (case.experts // ep) for expert in choices_of(case, rank, token, ep)}
            for there in {owner // mates for owner in owners}:
                across[chunk, there] += 1
        for from_node, token in itertools.product(range(ep // mates), part):
            sender = (from_node * mates + local) * tp + shard
            owners = {expert // (case.experts // ep) for expert in choices_of(case, sender, token, ep)}
            for owner in owners:
                if owner // mates == node:
                    inside[chunk, owner % mates] += 1
    return across, inside


@pytest.mark.parametrize("name", FLOWN)
@pytest.mark.parametrize("layout_name", cases(LAYOUTS, QUICK))
def test_it_equals_slow_loops(layout_name, name):
    """Outputs and all gradients, of gate weights too; and how many rows go to each node, and inside it to each rank."""
    size, ep, tp, mates = LAYOUTS[layout_name]
    case = fitted(name, ep, ep // mates)
    for rank, (of_rank, expected) in enumerate(zip(found(layout_name), in_loops(case, size, ep, tp), strict=True)):
        expected["rows"], expected["inside"] = rows_in_loops(case, rank, ep, tp, mates)
        assert_equal(of_rank[name, "node"], expected)


@pytest.mark.parametrize("layout_name", cases(LAYOUTS, QUICK))
def test_it_saves_rows_where_tokens_have_several_experts_on_a_node(layout_name):
    fewer = set()
    for of_rank, name in itertools.product(found(layout_name), FLOWN):
        if of_rank[name, "node"]["rows"].sum() < of_rank[name, "none"]["rows"].sum():
            fewer.add(name)
    assert fewer >= {"uniform", "all to one rank", "every expert", "in chunks"} and "nothing repeats" not in fewer


@pytest.mark.parametrize("layout_name", cases(LAYOUTS, QUICK))
def test_where_nothing_repeats_no_bit_changes(layout_name):
    """But of sums over rows, which experts read in another order: by the rank that they crossed to."""
    for of_rank in found(layout_name):
        node, plain = (of_rank["nothing repeats", how] for how in ("node", "none"))
        assert all(torch.equal(node[name], plain[name]) for name in ("output", "tokens", "weights"))
        assert node["output"].any() and node["weights"].any()


def spoil(mutant: str) -> None:
    """Put a fault into the hops inside a node."""
    from megatron_scmoe.dispatch.node import NodeTokens

    hop = NodeTokens._hop

    def of_own_rank_alone(self, name, chunk, tensors, sent, received):
        arrived = hop(self, name, chunk, tensors, sent, received)
        if name != "gather":
            return arrived
        keeps = torch.arange(len(received)).repeat_interleave(torch.tensor(received)) == self._inside.rank()
        return tuple(one * keeps.unsqueeze(-1) for one in arrived)

    def skipped(self, name, chunk, tensors, sent, received):
        if sent != received:
            return hop(self, name, chunk, tensors, sent, received)
        return tensors

    def shifted(self, name, chunk, tensors, sent, received):
        arrived = hop(self, name, chunk, tensors, sent, received)
        return tuple(one.roll(1, dims=0) for one in arrived) if name == "spread" else arrived

    changed = {"sums of one rank": of_own_rank_alone, "rows of a neighbour": shifted, "hop skipped": skipped}
    NodeTokens._hop = changed[mutant]


def spoiled(layout_name: str, mutant: str) -> dict[tuple[str, str], dict[str, Tensor]]:
    spoil(mutant)
    _, ep, _, mates = LAYOUTS[layout_name]
    pretend(mates)
    case = fitted("every expert", ep, ep // mates)  # as many rows come as go: a hop can be skipped
    return {("every expert", how): flown(case, how) for how in ("node", "none")}


@pytest.mark.parametrize("mutant", ["a weight applied twice", "sums of one rank", "rows of a neighbour", "hop skipped"])
def test_a_fault_is_noticed(mutant):
    """Negative control of all comparisons above."""
    name, run = ("uniform", flown_on_nodes) if mutant == "a weight applied twice" else ("every expert", spoiled)
    noticed = 0
    for of_rank in ranks.run(run, 4, "2 nodes of 2", mutant, layout=layout(4, 1)):
        node, plain = dict(of_rank[name, "node"]), dict(of_rank[name, "none"])
        del node["rows"], node["inside"], plain["rows"]
        with pytest.raises(AssertionError):
            assert_equal(node, plain)
        noticed += 1
    assert noticed == 4


# ---- models -----------------------------------------------------------------------------------------------------

NODE = Case(topk=2, unique="node", experts=8)
MODELS = wired(NODE) | {"top-8 of 8": NODE.replace(topk=8), "one expert on each rank": NODE.replace(experts=4)}


@pytest.mark.parametrize("name", cases(MODELS, ("pos2", "late landing", "longcat, latents, chunks")))
def test_models_equal_the_reference(name):
    """Losses and every gradient, by another implementation, which goes through tokens."""
    case = MODELS[name]
    expected = test_layer.run_reference(case.reference_config())
    assert test_layer.largest_difference(test_layer.run(case, 4), expected) < 1e-5


def run(case: Case) -> list[Any]:
    return ranks.run(models.losses_and_gradients, 4, case, layout=EP[4])


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
    assert_bit_equal(run(NODE.replace(**changes)), run(NODE.replace(overlap="off")))


@pytest.mark.parametrize(
    "case",
    [
        NODE.replace(capacity=0.6, chunks=2),
        NODE.replace(capacity=1.5, padded=True),
        NODE.replace(capacity=0.6, padded=True, chunks=2),
    ],
    ids=["dropped, chunks", "padded", "padded, dropped, chunks"],
)
def test_capacity_drops_the_same_choices(case):
    plain = case.replace(unique="none")
    assert_close(run(case), run(plain))
    with pytest.raises(AssertionError):  # negative control: drops change what is computed
        assert_close(run(case), run(plain.replace(capacity=None, padded=False)))


def stock(kind: str, chunks: int) -> tuple[tuple[Tensor, dict[str, Tensor]], int]:
    pretend(2)
    return test_unique.stock(kind, chunks, "node")


@pytest.mark.parametrize("kind", cases(("top-2", "padded", "latents"), {"top-2"}))
def test_stock_layers(kind):
    expected = ranks.run(test_pipelined.losses_and_gradients, 4, kind, 0, layout=EP[4])
    every = ranks.run(test_unique.stock, 4, kind, 1, "none", layout=EP[4])
    for chunks in (1, 2):
        node = ranks.run(stock, 4, kind, chunks, layout=EP[4])
        assert_close([found for found, _ in node], expected)
        assert sum(sent for _, sent in node) < 0.95 * sum(sent for _, sent in every)


@pytest.mark.parametrize("chunks", [1, 2])
def test_recorded_order_is_the_plans(chunks):
    """Hops inside a node are no steps of a plan; they are bytes on the wire."""
    case = NODE.replace(num_groups=1, chunks=chunks)
    plan = plan_of("scmoe", *even_plan(shape_of("scmoe", "pos2"), chunks).slots[0])
    of_plan = OPS["scmoe"], shape_of("scmoe", "pos2"), plan
    for forward, backward in ranks.run(recorded_order, 4, case, layout=EP[4]):
        assert forward == forward_order(*of_plan)
        assert backward == backward_order(*of_plan)


def transfers(case: Case) -> list[tuple[str, bool]]:
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as recorded:
        model(tokens, positions, None, labels=labels).sum().backward()
    return [(one.name, one.backward) for one in recorded.transfers]


def test_a_token_flies_across_and_hops_inside():
    forward, backward = ["dispatch", "spread", "gather", "combine"], ["combine", "gather", "spread", "dispatch"]
    for found in ranks.run(transfers, 4, NODE.replace(num_groups=1), layout=EP[4]):
        assert found == [(name, False) for name in forward] + [(name, True) for name in backward]


# ---- how many rows ----------------------------------------------------------------------------------------------

PREDICTED = {"top-6 of 64 on 2 nodes of 2": (64, 6, 4, 2), "12 of 64 on 4 nodes of 2": (64, 12, 8, 2)}
"""Experts, top-k, expert parallelism, ranks of a node."""


def rows_on_nodes(case: Flown, mates: int) -> list[tuple[int, int]]:
    """That leave this rank's node, in rows and in bytes of the combine."""
    pretend(mates)
    return rows_and_bytes(case, ("node",))


def rows_to_other_nodes(case: Flown, mates: int) -> int:
    """One row for each expert of another node."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    scores = torch.rand(case.tokens, case.experts, generator=generator, dtype=torch.float64)
    of_node = case.experts * mates // dist.get_world_size()
    return int((scores.topk(case.topk).indices // of_node != dist.get_rank() // mates).sum())


@pytest.mark.parametrize("name", PREDICTED)
def test_rows_are_as_predicted_under_uniform_routing(name):
    experts, topk, ep, mates = PREDICTED[name]
    case = Flown(tokens=2000, experts=experts, topk=topk)
    of_ranks = ranks.run(rows_on_nodes, ep, case, mates, layout=layout(ep, 1))
    rows, num_bytes = (sum(one[0][which] for one in of_ranks) for which in (0, 1))
    every = sum(ranks.run(rows_to_other_nodes, ep, case, mates))
    expected = expected_unique_share(experts, topk, ep // mates)
    assert rows / every == pytest.approx(expected, rel=0.02)
    assert num_bytes == rows * 5 * 8
    assert expected < 0.6  # another share would be noticed


@pytest.mark.full
@pytest.mark.usefixtures("slow_links")
def test_bytes_between_nodes_by_interface_counters(tmp_path: Path):
    """Of each node, under uniform routing. Two weights take the 16 bytes that one does, too; a rank has one expert, so
    that once for a rank saves nothing.
    """
    counted = {}
    for unique in ("none", "rank", "node"):
        path = tmp_path / f"{unique}.json"
        words = [sys.executable, ROOT / "tools" / "slow_link.py", "--ranks", 4, "--ranks-per-node", 2]
        words += ["--rate", "unlimited", "--", sys.executable, ROOT / "tests" / "support" / "latent_bytes.py"]
        subprocess.run([str(word) for word in (*words, path, 0, unique)], check=True, timeout=300)
        counted[unique] = json.loads(path.read_text())["interface"]
    assert all(len(nodes) == 2 for nodes in counted.values())
    ratio = sum(counted["node"]) / sum(counted["none"])
    assert ratio == pytest.approx(expected_unique_share(4, 2, 2), rel=0.02), counted
    assert sum(counted["rank"]) / sum(counted["none"]) == pytest.approx(1.0, rel=0.02), counted


# ---- which ranks share a node -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("aaaa", ["within a node", "of 4 ranks from 8 to 11 has one node"]),
        ("abcd", ["where a node has one rank", "one on each node"]),
        ("aaab", ["as many ranks", "has 3, 1 on its nodes"]),
        ("abab", ["must be neighbours", "start ranks node by node"]),
        ("abba", ["must be neighbours", "start ranks node by node"]),
    ],
)
def test_what_saves_nothing_or_cannot_be_is_refused(names, words):
    with pytest.raises(ConfigError) as refused:
        ranks_of_a_node(names, range(8, 12))
    text = str(refused.value)
    assert all(word in text for word in (*words, "--a2a-unique is node", "--a2a-unique rank")) and "\n" not in text


def test_nodes_of_as_many_ranks_are_taken():
    assert [ranks_of_a_node(names, range(len(names))) for names in ("aabb", "aaabbb", "aabbcc")] == [2, 3, 2]


def groups(ranks_of_node: int) -> tuple[list[int], list[int], bool]:
    from megatron.core import parallel_state

    from megatron_scmoe.mcore.nodes import nodes_of

    pretend(ranks_of_node)
    ep = parallel_state.get_expert_model_parallel_group()
    nodes = nodes_of(ep)
    members = [dist.get_process_group_ranks(group) for group in nodes]
    for group in nodes:  # they work
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        assert total == group.size()
    return *members, nodes_of(ep) is nodes


def test_groups_lie_across_nodes_and_inside_them():
    """Of two expert-parallel groups each makes its own; the second call makes none."""
    found = ranks.run(groups, 8, 2, layout=layout(4, 1))
    assert found[1] == ([1, 3], [0, 1], True)
    assert found[6] == ([4, 6], [6, 7], True)


def test_new_groups_have_the_settings_of_the_expert_parallel_one(monkeypatch):
    """Of NCCL, too, which this machine may not have."""
    from megatron.core import parallel_state

    from megatron_scmoe.mcore import nodes

    made: dict[str, Any] = {}

    def new_group(ranks: list[int], **options: Any) -> dist.ProcessGroup:
        made.update(options, ranks=ranks)
        return dist.ProcessGroup(0, 1)

    own = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    own.config.max_ctas, own._timeout = 4, timedelta(minutes=7)
    group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(options=own) if device.type == "cuda" else None)
    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel_state, "_global_process_group_list", [None])
    monkeypatch.setattr(nodes.dist, "get_backend", lambda _group: "nccl")
    nodes._like(group, [1, 3], "two of four")
    assert len(parallel_state._global_process_group_list) == 2  # whose timeouts Core changes when training has begun
    options = made.pop("pg_options")
    assert (options.is_high_priority_stream, options.config.max_ctas) == (True, 4) and options is not own
    assert made == {
        "ranks": [1, 3],
        "timeout": timedelta(minutes=7),
        "backend": "nccl",
        "use_local_synchronization": True,
        "group_desc": "two of four",
    }


def adaptive(flags: list[str]) -> str:
    os.environ["NCCL_HOSTID"] = f"node {int(os.environ['RANK']) // 2}"
    return training.train(flags)


@pytest.mark.full
def test_a_plan_is_found_and_kept(tmp_path):
    """Adaptive overlap measures and solves with hops inside the experts' slot; the checkpoint keeps what it found."""
    flags = with_flags(SCMOE, "--moe-router-topk 2", "--expert-model-parallel-size 4", "--overlap adaptive")
    flags = with_flags(flags, "--a2a-unique node", "--overlap-chunks 2", f"--save {tmp_path}", "--save-interval 18")
    flags = with_flags(flags, "--override-opt-param-scheduler")
    first = ranks.run(adaptive, 4, with_flags(flags, "--train-iters 18"))
    again = ranks.run(adaptive, 4, with_flags(flags, "--train-iters 24", f"--load {tmp_path}"))
    other = with_flags(flags, "--train-iters 24", f"--load {tmp_path}", "--a2a-unique rank")
    for printed in (*first, *again):
        assert "exit code" not in printed, printed[-3000:]
    assert "> overlap from iteration 10:" in first[0]
    assert "overlap from iteration" not in again[0] and "measured with" not in again[0]
    assert "a2a_unique" in "".join(ranks.run(adaptive, 4, other))
