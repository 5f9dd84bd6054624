"""The stock MoE layer in chunks: it equals the stock layer up to rounding, under the same names."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import entry
import models
import pytest
import ranks
import torch
import training
from models import BATCH_SIZE, SEQ_LENGTH, VOCAB_SIZE, Case
from test_overlap import assert_close, order_of
from training import STOCK, with_flags, without_flag

from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.plan import ADD, SHARED_EXPERT, backward_order, forward_order

EP = {size: {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1} for size in (1, 2, 4)}
KINDS = {
    # name -> fields of Core's TransformerConfig
    "top-2": {"moe_router_topk": 2},
    "top-1": {"moe_router_topk": 1},
    "shared expert": {"moe_router_topk": 1, "moe_shared_expert_intermediate_size": 20},
    "shared expert, gated": {
        "moe_router_topk": 1,
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_gate": True,
    },
    "dropped": {"moe_router_topk": 2, "moe_expert_capacity_factor": 0.6},
    "padded": {
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.6,
        "moe_pad_expert_input_to_capacity": True,
    },
    "latents": {"moe_router_topk": 2, "moe_latent_size": 8, "moe_shared_expert_intermediate_size": 20},
    "latents, padded": {
        "moe_router_topk": 2,
        "moe_latent_size": 8,
        "moe_expert_capacity_factor": 0.6,
        "moe_pad_expert_input_to_capacity": True,
    },
    "balance loss": {
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
    },
}


def build(kind: str, chunks: int, **settings):
    """The stock model of a kind, with an MoE in every second block; in chunks for a number of them, as it is for 0.

    ``settings`` are others of ``ScMoEConfig``.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_scmoe.config import ScMoEConfig
    from megatron_scmoe.models.specs import pipelined_block_spec

    transformer = models.transformer_config(Case())
    transformer.moe_shared_expert_intermediate_size = None
    transformer.moe_shared_expert_gate = False
    for name, value in KINDS[kind].items():
        setattr(transformer, name, value)
    config = GPTModelConfig(
        transformer=transformer,
        vocab_size=VOCAB_SIZE,
        seq_length=SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    if chunks:
        scmoe = ScMoEConfig(overlap_chunks=chunks, **settings)
        config.transformer_layer_spec = partial(pipelined_block_spec, scmoe=scmoe)
    model = GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(models.parameter(models.global_name(name), tuple(value.shape)))
    return model


def losses_and_gradients(
    kind: str, chunks: int, launch: Launch = Launch.BEFORE
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    import torch.distributed as dist

    model = build(kind, chunks)
    models.launch_at(model, launch)
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels)
    (loss.sum() / (BATCH_SIZE * SEQ_LENGTH)).backward()
    gradients = {}
    for name, value in model.named_parameters():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        if "local_experts" not in name:
            dist.all_reduce(gradient)
        gradients[models.global_name(name)] = gradient
    return loss.detach(), gradients


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_stock_layer_up_to_rounding(kind):
    stock = ranks.run(losses_and_gradients, 2, kind, 0, layout=EP[2])
    for chunks in (2, 4):
        assert_close(ranks.run(losses_and_gradients, 2, kind, chunks, layout=EP[2]), stock)


@pytest.mark.parametrize("ep", [1, 4])
def test_on_one_rank_and_on_four(ep):
    kind = "shared expert, gated"
    one, other = (ranks.run(losses_and_gradients, ep, kind, chunks, layout=EP[ep]) for chunks in (4, 0))
    assert_close(one, other)


def test_another_capacity_would_be_noticed():
    """Negative control: what is compared depends on which tokens are dropped."""
    one, other = (ranks.run(losses_and_gradients, 2, kind, 2, layout=EP[2]) for kind in ("dropped", "top-2"))
    with pytest.raises(AssertionError):
        assert_close(one, other)


def keys(kind: str, chunks: int) -> tuple[list[str], list[str]]:
    """Parameter names, and sharded keys with their global shapes."""
    model = build(kind, chunks)
    sharded = model.sharded_state_dict()
    shapes = [f"{value.key} {getattr(value, 'global_shape', None)}" for value in sharded.values()]
    return [name for name, _ in model.named_parameters()], shapes


@pytest.mark.parametrize("kind", ["top-2", "shared expert, gated", "latents"])
def test_names_and_keys_are_those_of_stock(kind):
    stock, ours = (ranks.run(keys, 2, kind, chunks, layout=EP[2]) for chunks in (0, 2))
    assert stock == ours
    assert any("experts" in key for key in stock[0][1])


def orders(kind: str, chunks: int, trains: bool, launch: Launch = Launch.BEFORE) -> tuple[list, list]:
    from megatron_scmoe.overlap import observe

    model = build(kind, chunks)
    model.train(trains)
    models.launch_at(model, launch)
    for layer in model.decoder.layers[1::2]:
        layer.mlp.forward_plan = Plan(((1,),))
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as recorded:
        model(tokens, positions, None, labels=labels).sum().backward()
    marks = [mark for mark in recorded.marks if mark.group == 3]
    return order_of(marks, backward=False), order_of(marks, backward=True)


@pytest.mark.parametrize("kind", ["top-2", "shared expert"])
def test_recorded_order_is_the_plans(kind):
    ops = [SHARED_EXPERT, ADD] if kind == "shared expert" else [ADD]
    shape = SpanShape(len(ops), (RoutedCall(tap=0, landing=len(ops) - 1),))
    for trains in (True, False):
        plan = Plan(((len(ops),) * 2,) if trains else ((1,),))
        for forward, backward in ranks.run(orders, 2, kind, 2, trains, layout=EP[2]):
            assert forward == forward_order(ops, shape, plan)
            assert backward == backward_order(ops, shape, plan)


def test_launched_behind_the_shared_expert():
    """The same numbers bit for bit, in another order."""
    kind = "shared expert, gated"
    launches = (Launch.BEFORE, Launch.BEHIND)
    results = [ranks.run(losses_and_gradients, 2, kind, 2, launch, layout=EP[2]) for launch in launches]
    for (loss, gradients), (other_loss, others) in zip(*results, strict=True):
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    plan = Plan(((2, 2),), launch=Launch.BEHIND)
    ops, shape = [SHARED_EXPERT, ADD], SpanShape(2, (RoutedCall(tap=0, landing=1),))
    for forward, backward in ranks.run(orders, 2, kind, 2, True, Launch.BEHIND, layout=EP[2]):
        assert forward == forward_order(ops, shape, plan)
        assert backward == backward_order(ops, shape, plan)


# ---- through the entry script -----------------------------------------------------------------------------------

FLAGS = with_flags(STOCK, "--moe-layer-freq [0,1]*2", "--expert-model-parallel-size 2", "--train-iters 5")
TOP_2 = with_flags(FLAGS, "--moe-router-topk 2")


def test_it_trains_like_stock_and_reports(tmp_path: Path):
    flags = {
        "stock": [],
        "chunks": ["--overlap-chunks 2", f"--overlap-report {tmp_path / 'report'}"],
        "adaptive": ["--overlap-chunks 2", "--overlap adaptive"],
        "unique": ["--a2a-unique rank", f"--overlap-report {tmp_path / 'unique-report'}"],
    }
    scalars = {}
    for name, changes in flags.items():
        more = ["--train-iters 18"] if name == "adaptive" else []
        folder = tmp_path / name
        printed = ranks.run(training.train, 2, with_flags(TOP_2, *changes, *more, f"--tensorboard-dir {folder}"))
        assert "exit code" not in printed[0], printed[0][-3000:]
        scalars[name] = training.scalars(folder, "lm loss", "grad-norm")
        assert bool(re.search(r"> overlap from iteration 10: groups? 1\b.*slots", printed[0])) == (name == "adaptive")
    for name, values in scalars["stock"].items():
        assert scalars["chunks"][name] == pytest.approx(values, rel=1e-4)
        assert scalars["unique"][name] == pytest.approx(values, rel=1e-4)
        first = {iteration: scalars["adaptive"][name][iteration] for iteration in values}
        assert first == pytest.approx(values, rel=1e-4)
    every, unique = (sent_bytes(tmp_path / name) for name in ("report", "unique-report"))
    assert [len(every), len(unique)] == [4, 4]
    assert sum(unique) < 0.95 * sum(every)


def sent_bytes(report: Path) -> list[int]:
    """By rank 1, in each reported step."""
    steps = [json.loads(line) for line in (report / "rank00001.jsonl").read_text().splitlines()]
    return [sum(group["sent_bytes"] for group in step["groups"]) for step in steps]


def test_nothing_to_report_without_chunks():
    flags = with_flags(without_flag(FLAGS, "--expert-model-parallel-size"), "--overlap adaptive")
    entry.assert_refused([(flags, ["add --overlap-chunks 2"])])


def experts_that_add(case: Case, kind: str | None) -> set[bool]:
    """Whether Transformer Engine's linears would be left untold which forward of a micro-batch is the first."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    original = MoELayer.__init__

    def like_transformer_engine(self, *args, **kwargs):
        original(self, *args, **kwargs)
        projections = (self.fc1_latent_proj, self.fc2_latent_proj) if self.config.moe_latent_size else ()
        for module in (*self.experts.modules(), *projections):
            module.disable_parameter_transpose_cache = False

    MoELayer.__init__ = like_transformer_engine
    try:
        model = models.build(case) if kind is None else build(kind, case.chunks)
    finally:
        MoELayer.__init__ = original
    modules = [module for module in model.modules() if hasattr(module, "disable_parameter_transpose_cache")]
    return {module.disable_parameter_transpose_cache for module in modules}


@pytest.mark.parametrize(
    ("case", "kind", "adds"),
    [
        (Case(chunks=2), None, True),
        (Case(shortcut="dgmoe"), None, True),
        (Case(latent=8), None, True),
        (Case(chunks=2), "top-2", True),
        (Case(chunks=2), "latents", True),
        (Case(chunks=0), "top-2", False),  # negative control: Core's own layer runs its experts once
    ],
    ids=["chunks", "two gates", "latents", "stock in chunks", "stock in chunks, latents", "stock"],
)
def test_flights_add_to_the_gradients_of_experts(case, kind, adds):
    """Its backward of a first forward overwrites weight gradients, and of several flights it runs last."""
    assert ranks.run(experts_that_add, 1, case, kind, layout={}) == [{adds}]
