"""The counts of a routing: what Core's dispatcher would have found, in one exchange, for one wait of the host."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from models import Case
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scmoe.contracts import Launch

LAYOUTS = {
    "one rank": (1, 1, 1),
    "ep2": (2, 2, 1),
    "ep4": (4, 4, 1),
    "ep2 expert tp2": (4, 2, 2),
    "expert tp2": (2, 1, 2),
}
"""Ranks, expert parallelism, expert tensor parallelism."""


def layout(ep: int, tp: int) -> dict[str, int]:
    return {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": tp, "tensor_model_parallel_size": tp}


# ---- values -----------------------------------------------------------------------------------------------------


def told(dispatcher: Any, splits: tuple[Any, Any]) -> dict[str, list[int]]:
    """What the stages of a flight read of the counts."""
    return {
        "split rows": [list(rows) for rows in splits],
        "rows of experts": dispatcher.tokens_per_expert.tolist(),
        "from tensor-parallel ranks": dispatcher.output_splits_tp.tolist(),
        "by sender": dispatcher.num_global_tokens_per_local_expert.tolist(),
    }


def found_by_both(chunks: int) -> list[tuple[dict[str, list[int]], dict[str, list[int]]]]:
    """Of each chunk, what Core's dispatcher finds, and what ours is told."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_scmoe.mcore.token_dispatcher import Counts, dispatcher_for_one_flight

    groups = get_default_pg_collection()
    config = models.transformer_config(Case())
    config.tensor_model_parallel_size = config.expert_tensor_parallel_size = groups.expt_tp.size()
    config.expert_model_parallel_size = groups.ep.size()
    count = 4 // groups.ep.size()
    here = list(range(groups.ep.rank() * count, (groups.ep.rank() + 1) * count))
    cores = MoEAlltoAllTokenDispatcher(count, here, config, pg_collection=groups)
    generator = torch.Generator().manual_seed(dist.get_rank())
    maps = [torch.rand(7 + chunk, 4, generator=generator) < 0.5 for chunk in range(chunks)]
    flights = [dispatcher_for_one_flight(SimpleNamespace(token_dispatcher=cores), keeps_capacity=False) for _ in maps]
    counts = Counts(flights[0], torch.stack([one.sum(dim=0) for one in maps]))
    found = []
    for chunk, (ours, routing_map) in enumerate(zip(flights, maps, strict=True)):
        core = copy.copy(cores)
        # Core exchanges nothing on one rank, where it needs no splits.
        core.input_splits = core.output_splits = core.output_splits_tp = routing_map.sum().view(1)
        tokens = core.preprocess(routing_map)
        core.tokens_per_expert = core._maybe_dtoh_and_synchronize("before_permutation_1", tokens)
        by_sender = core.num_global_tokens_per_local_expert if count > 1 else core.tokens_per_expert
        core.num_global_tokens_per_local_expert = by_sender.view(-1, count)
        counts.tell(ours, chunk)
        assert counts.num_rows_to_send(chunk) == int(routing_map.sum())
        found.append((told(core, (core.input_splits, core.output_splits)), told(ours, counts.split_rows(chunk))))
    return found


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_flight_is_told_what_core_would_have_found(name, chunks):
    size, ep, tp = LAYOUTS[name]
    for found in ranks.run(found_by_both, size, chunks, layout=layout(ep, tp)):
        for core, ours in found:
            if name != "ep4":
                assert ours == core
            else:  # one expert on each rank: Core does not ask who sent what
                assert {**ours, "by sender": None} == {**core, "by sender": None}
        assert len({str(ours) for _, ours in found}) == chunks  # negative control: chunks have other counts


# ---- waits ------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts exchanges of counts, and numbers that the host takes from a tensor, each of which waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.exchanges += name == "c10d::_allgather_base_" and not args[1].is_floating_point()
        if name == "aten::_local_scalar_dense":
            self.numbers += args[0].dtype is not torch.bool  # Core asks the CPU's generator whether it moved
        self.numbers += name in ("aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


def in_one_forward(case: Case, asks_again: bool = False) -> dict[str, int]:
    """What one forward of the model's decoder exchanges, and waits for.

    Args:
        asks_again: the host waits whenever it asks.
    """
    from megatron_scmoe.cpu.stand_ins import InertEvent
    from megatron_scmoe.mcore.token_dispatcher import Counts

    waits = []
    InertEvent.synchronize = lambda _event: waits.append(1)
    if asks_again:
        Counts._on_host = property(Counts._on_host.func)
    model = models.build(case)
    hidden = torch.randn(models.SEQ_LENGTH, 2, 16, generator=torch.Generator().manual_seed(1))
    rotary = model.rotary_pos_emb(models.SEQ_LENGTH)
    with Watch() as watch:
        model.decoder(hidden, None, rotary_pos_emb=rotary)
    return {"waits": len(waits), "exchanges": watch.exchanges, "numbers": watch.numbers}


LSH = {"codec": "lsh", "hashes": 2, "compensation": "none"}
LONGCAT = {"router": "longcat", "zero_experts": 2, "topk": 2, "combine": "add"}
ROUTINGS = {
    "scmoe": ({}, 2),
    "top-2": ({"topk": 2}, 2),
    "dgmoe": ({"shortcut": "dgmoe"}, 4),
    "two groups in a span": ({"span": 2, "landing": 2}, 2),
    "zero experts": (LONGCAT, 2),
    "capacity": ({"capacity": 1.0}, 2),
    "unique": ({"topk": 2, "unique": "rank"}, 2),
    "unique, zero experts": ({**LONGCAT, "unique": "rank"}, 2),
    "unique, padded": ({"topk": 2, "unique": "rank", "capacity": 1.0, "padded": True}, 2),
    "lsh": (LSH, 2),
    "lsh, dgmoe": ({**LSH, "shortcut": "dgmoe"}, 4),
}
"""Of two groups: settings, and routings."""


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_host_waits_once_for_each_routing(name, chunks):
    changes, routings = ROUTINGS[name]
    found = ranks.run(in_one_forward, 2, Case(chunks=chunks, **changes), layout=layout(2, 1))
    assert found == [{"waits": routings, "exchanges": routings, "numbers": 0}] * 2


def test_what_the_host_waits_for_beside_the_counts():
    """The codec has to know how many rows there are before it can say which are alike, where that is not the top-k."""
    found = ranks.run(in_one_forward, 2, Case(**LSH, capacity=1.0), layout=layout(2, 1))
    assert found == [{"waits": 2, "exchanges": 2, "numbers": 2}] * 2
    padded = ranks.run(in_one_forward, 2, Case(capacity=1.0, padded=True), layout=layout(2, 1))
    assert padded == [{"waits": 0, "exchanges": 0, "numbers": 0}] * 2


def test_a_second_wait_is_counted():
    """Negative control."""
    (found, _) = ranks.run(in_one_forward, 2, Case(chunks=2), True, layout=layout(2, 1))
    assert found["waits"] > 2 and found["exchanges"] == 2


def steps_of_a_forward(position: str, launch: Launch) -> list[str]:
    """What the host does of the op at the tap, and its wait for the counts, in the order in which they come."""
    from megatron_scmoe.cpu.stand_ins import InertEvent

    steps: list[str] = []
    model = models.build(Case(num_groups=1, position=(position,), expert_slot=(2,)))
    models.launch_at(model, launch)
    InertEvent.synchronize = lambda _event: steps.append("wait")
    first, last = model.decoder.layers
    op = first.mlp if position == "pos2" else last.self_attention
    op.register_forward_pre_hook(lambda *_: steps.append("begin"))
    op.register_forward_hook(lambda *_: steps.append("end"))
    if position == "pos1":
        op.linear_qkv.register_forward_hook(lambda *_: steps.append("projections"))
    ((tokens, labels, positions),) = models.my_batch()
    model(tokens, positions, None, labels=labels)
    return steps


@pytest.mark.parametrize(
    ("position", "launch", "steps"),
    [
        ("pos2", Launch.BEFORE, ["wait", "begin", "end"]),
        ("pos2", Launch.BEHIND, ["begin", "end", "wait"]),
        ("pos1", Launch.BEFORE, ["wait", "begin", "projections", "end"]),
        ("pos1", Launch.WITHIN, ["begin", "projections", "wait", "end"]),
        ("pos1", Launch.BEHIND, ["begin", "projections", "end", "wait"]),
    ],
)
def test_the_host_waits_where_the_plan_launches(position, launch, steps):
    assert ranks.run(steps_of_a_forward, 2, position, launch, layout=layout(2, 1)) == [steps] * 2
