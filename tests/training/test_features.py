"""Megatron's features under a shortcut: each works, overlapped or not, or is refused in one line.

``FEATURES`` and ``REFUSED`` are the tables. A feature works if three steps of the command line that sets it give the
same numbers with overlap on and off, bit for bit, and other numbers than the same command line without it. What DGMoE's
two gates make of it is computed by hand below.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import entry
import models
import pytest
import ranks
import torch
import torch.distributed as dist
import training
from cases import cases
from models import Case
from test_arguments import DGMOE, changes
from torch import Tensor
from training import SCMOE, with_flags, without_flag

STEPS = 3
MICRO_BATCH, SEQ_LENGTH, NUM_EXPERTS = 2, 16, 4  # as training.MODEL has them
TOKENS = MICRO_BATCH * SEQ_LENGTH  # of one micro-batch
COMMON = ["--moe-aux-loss-coeff 0", "--hidden-dropout 0", "--attention-dropout 0", "--expert-model-parallel-size 2"]
COMMON += ["--no-bias-gelu-fusion"]
BASE = {"scmoe": with_flags(SCMOE, *COMMON), "dgmoe": with_flags(DGMOE, *COMMON)}
BOTH = ("scmoe", "dgmoe")
SCMOE_ALONE = ("scmoe",)


@dataclass(frozen=True)
class Feature:
    """One feature, and how it is seen to be on.

    Attributes:
        flags: what switches it on.
        shows: entries of the record (see ``train_one``) that differ from those without the feature.
        without: flags of the run to compare with, where the bare base will not do.
        drop: a flag of the base that the feature goes without.
        shortcuts: where it works; elsewhere it is in ``REFUSED`` or has no meaning.
        padded: whether the model gets a padding mask.
    """

    flags: str = ""
    shows: tuple[str, ...] = ("losses", "grad_norms")
    without: str = ""
    drop: str = ""
    shortcuts: tuple[str, ...] = BOTH
    padded: bool = False


AUX = "--moe-router-load-balancing-type {} --moe-aux-loss-coeff {}"
SIGMOID = "--moe-router-score-function sigmoid"
BIAS = f"{SIGMOID} --moe-router-enable-expert-bias --moe-router-bias-update-rate"
TOP2 = "--moe-router-topk 2"
CAPACITY = "--moe-expert-capacity-factor 0.5"

FEATURES = {
    # router: balance
    "aux_loss": Feature(AUX.format("aux_loss", 0.1), ("grad_norms", "load_balancing_loss")),
    "seq_aux_loss": Feature(AUX.format("seq_aux_loss", 0.1), ("grad_norms", "seq_load_balancing_loss")),
    "global_aux_loss": Feature(AUX.format("global_aux_loss", 0.1), ("grad_norms", "global_load_balancing_loss")),
    "several aux losses": Feature(
        AUX.format("aux_loss seq_aux_loss global_aux_loss", "0.1 0.2 0.3"),
        ("grad_norms", "seq_load_balancing_loss", "global_load_balancing_loss"),
        without=AUX.format("aux_loss", 0.1),
    ),
    "z-loss": Feature("--moe-z-loss-coeff 0.1", ("grad_norms", "z_loss")),
    "expert bias": Feature(f"{BIAS} 0.1", ("losses", "expert_bias"), without=SIGMOID),
    "expert bias update rate": Feature(f"{BIAS} 0.2", ("expert_bias",), without=f"{BIAS} 0.1"),
    "forced balance": Feature("--moe-router-force-load-balancing"),
    "sinkhorn": Feature("--moe-router-load-balancing-type sinkhorn", shortcuts=SCMOE_ALONE),
    "sinkhorn top-2": Feature(f"{TOP2} --moe-router-load-balancing-type sinkhorn", without=TOP2, shortcuts=SCMOE_ALONE),
    "quantile balancing": Feature("--moe-router-load-balancing-type quantile_balancing", shortcuts=SCMOE_ALONE),
    # router: scores and choice
    "sigmoid": Feature(SIGMOID),
    "post-softmax top-2": Feature(TOP2, drop="--moe-router-pre-softmax", without=TOP2, shortcuts=SCMOE_ALONE),
    "group-limited": Feature(
        f"{TOP2} --moe-router-num-groups 2 --moe-router-group-topk 1", without=TOP2, shortcuts=SCMOE_ALONE
    ),
    "scaling factor": Feature("--moe-router-topk-scaling-factor 2.5"),
    "input jitter": Feature("--moe-input-jitter-eps 0.1"),
    "bf16": Feature("--bf16"),
    "router dtype": Feature("--bf16 --moe-router-dtype fp32", ("router_dtype",), without="--bf16"),
    "routing replay": Feature("--moe-enable-routing-replay", ("replays",), shortcuts=SCMOE_ALONE),
    # router: capacity
    "capacity, lowest weights drop": Feature(CAPACITY, ("losses", "routed")),
    "capacity, last positions drop": Feature(
        f"{CAPACITY} --moe-token-drop-policy position", ("losses", "grad_norms"), without=CAPACITY
    ),
    "capacity, padded": Feature(f"{CAPACITY} --moe-pad-expert-input-to-capacity", ("routed",), without=CAPACITY),
    # the layer
    "grouped-query attention": Feature("--group-query-attention --num-query-groups 1"),
    "LayerNorm": Feature("--normalization LayerNorm"),
    "GELU": Feature(drop="--swiglu"),
    "learned positions": Feature("--position-embedding-type learned_absolute"),
    "untied embeddings": Feature("--untie-embeddings-and-output-weights"),
    "qk-layernorm": Feature("--qk-layernorm"),
    "hidden dropout": Feature("--hidden-dropout 0.1"),
    "attention dropout": Feature("--attention-dropout 0.1"),
    "padding mask": Feature(
        AUX.format("aux_loss", 0.1),
        ("grad_norms", "load_balancing_loss"),
        without=AUX.format("aux_loss", 0.1),
        padded=True,
    ),
    "padding mask, all losses": Feature(
        AUX.format("seq_aux_loss global_aux_loss", "0.1 0.2") + " --moe-z-loss-coeff 0.1",
        ("grad_norms", "z_loss", "global_load_balancing_loss"),
        without=AUX.format("seq_aux_loss global_aux_loss", "0.1 0.2") + " --moe-z-loss-coeff 0.1",
        padded=True,
    ),
    "dropout, capacity and all losses at once": Feature(
        f"{BIAS} 0.1 {CAPACITY} --moe-z-loss-coeff 0.1 --hidden-dropout 0.1 --attention-dropout 0.1 "
        "--moe-router-topk-scaling-factor 2.5 " + AUX.format("aux_loss seq_aux_loss", "0.1 0.2")
    ),
}

REFUSED = {
    # shortcut, flags -> words that the line must hold
    ("scmoe", "--moe-layer-recompute"): ["--moe-layer-recompute is True", "drop it"],
    ("scmoe", "--moe-router-num-groups 2 --moe-router-group-topk 2"): [
        "--moe-router-group-topk is 2",
        "--moe-router-topk is 1",
        "use --moe-router-group-topk 1",
    ],
    ("scmoe", "--moe-router-topk 3 --moe-router-num-groups 4 --moe-router-group-topk 2"): [
        "2 groups of 1 hold 2 experts",
        "--moe-router-topk is 3",
        "raise --moe-router-group-topk",
    ],
    ("dgmoe", "--moe-router-num-groups 2 --moe-router-group-topk 1"): [
        "takes one expert, which lies in one group",
        "--moe-router-group-topk is 1",
        "drop it",
    ],
    ("scmoe", "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1"): [
        "sinkhorn",
        "--moe-aux-loss-coeff is 0.1",
        "add --moe-aux-loss-coeff 0",
    ],
    ("scmoe", "--moe-router-load-balancing-type sinkhorn aux_loss --moe-aux-loss-coeff 0 0.1"): [
        "sinkhorn",
        "is sinkhorn aux_loss",
        "give it alone",
    ],
    ("dgmoe", "--moe-router-load-balancing-type sinkhorn"): ["no second choice", "use aux_loss"],
    ("dgmoe", "--moe-router-load-balancing-type quantile_balancing"): ["no second choice", "use aux_loss"],
    ("dgmoe", "--moe-enable-routing-replay"): ["--moe-enable-routing-replay is True", "drop it"],
}


def flags_of(shortcut: str, added: str, drop: str = "") -> list[str]:
    flags = without_flag(BASE[shortcut], drop) if drop else BASE[shortcut]
    return with_flags(flags, *changes(added)) if added else flags


# --- training steps ------------------------------------------------------------------------------------------------


def micro_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Token and label ids of this rank, for ever."""
    generator = torch.Generator().manual_seed(100 + dist.get_rank())
    while True:
        ids = torch.randint(63, (MICRO_BATCH, SEQ_LENGTH + 1), generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_one(args: Namespace, scmoe: Any, padded: bool) -> dict[str, Any]:
    """Three steps of Megatron's own training step, and what there is to see of them.

    Returns:
        Loss and gradient norm of each step, sums of the routers' logged losses over each step, the experts' biases at
        the end, and for each router call the number of (token, expert) pairs and the dtype of the weights.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay
    from megatron.core.utils import get_model_config
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.initialize import _set_random_seed
    from megatron.training.training import setup_model_and_optimizer, train_step

    from megatron_scmoe.models.gpt import model_config_from_args

    _set_random_seed(args.seed)
    RouterReplay.clear_global_router_replay_instances()
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config_from_args(args, scmoe)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    record: dict[str, Any] = {name: [] for name in ("losses", "grad_norms", "routed", "router_dtype", "expert_bias")}

    def note(_router: TopKRouter, _inputs: Any, routing: Any) -> None:
        record["routed"].append(int(routing[1].sum()))
        record["router_dtype"].append(str(routing[0].dtype))

    routers = [module for module in model[0].modules() if isinstance(module, TopKRouter)]
    for router in routers:
        router.register_forward_hook(note)
    loss_func = training.entry_script().loss_func
    mask = (torch.arange(SEQ_LENGTH) >= 12).expand(MICRO_BATCH, -1) if padded else None
    positions = torch.arange(SEQ_LENGTH).expand(MICRO_BATCH, -1)

    def forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> tuple[Tensor, Any]:
        tokens, labels = next(batches)
        losses = model(tokens, positions, None, labels=labels, padding_mask=mask)
        return losses, functools.partial(loss_func, torch.ones_like(losses))

    model[0].train()
    batches = RerunDataIterator(micro_batches())
    for step in range(STEPS):
        loss, *_, grad_norm, _, _ = train_step(
            forward_step, batches, model, optimizer, scheduler, config, get_forward_backward_func(), step
        )
        record["losses"].append(float(loss["lm loss"]))
        record["grad_norms"].append(float(grad_norm))
        tracker = get_moe_metrics_tracker()
        for name, metric in tracker.metrics.items():
            record.setdefault(name, []).append(metric.values.sum().item())
        tracker.clear()
    tracker.metrics.clear()
    record["expert_bias"] = [router.expert_bias.tolist() for router in routers if router.expert_bias is not None]
    record["replays"] = len(RouterReplay.global_router_replay_instances)
    return record


def train_both(flags: list[str], padded: bool) -> list[dict[str, Any]]:
    """What ``train_one`` sees with overlap on, and off."""
    from megatron.training.initialize import initialize_megatron

    from megatron_scmoe.config import Overlap
    from megatron_scmoe.training.arguments import parse_and_validate_args

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        args, scmoe, _ = parse_and_validate_args()
        initialize_megatron(allow_no_cuda=True)
        return [train_one(args, replace(scmoe, overlap=overlap), padded) for overlap in (Overlap.FIXED, Overlap.OFF)]


@functools.cache
def trained(flags: tuple[str, ...], padded: bool = False) -> list[list[dict[str, Any]]]:
    """By rank: the records with overlap on, and off."""
    return ranks.run(train_both, 2, list(flags), padded, timeout_s=60)


WORKING = [(shortcut, name) for name, feature in FEATURES.items() for shortcut in feature.shortcuts]


QUICK = [
    (feature.shortcuts[index % len(feature.shortcuts)], name) for index, (name, feature) in enumerate(FEATURES.items())
]
"""Every feature, with one shortcut and then the other."""


@pytest.mark.parametrize(("shortcut", "name"), cases(WORKING, QUICK))
def test_feature(shortcut, name):
    feature = FEATURES[name]
    with_it = trained(tuple(flags_of(shortcut, feature.flags, feature.drop)), feature.padded)
    without_it = trained(tuple(flags_of(shortcut, feature.without)))
    for (on, off), (other, _) in zip(with_it, without_it, strict=True):
        assert on == off
        numbers = on["losses"] + on["grad_norms"]
        assert len(numbers) == 2 * STEPS and all(math.isfinite(number) and number > 0 for number in numbers)
        for name in feature.shows:
            assert on.get(name) != other.get(name), name


def test_no_token_is_dropped_without_a_capacity():
    for shortcut, calls in (("scmoe", 1), ("dgmoe", 2)):
        for on, _ in trained(tuple(BASE[shortcut])):
            assert on["routed"] == [TOKENS] * (2 * 2 * STEPS * calls)  # groups, micro-batches


@pytest.mark.parametrize("shortcut", BOTH)
def test_capacity_pads_and_drops_to_the_counts_computed_by_hand(shortcut):
    """Half of 32 tokens / 4 experts: 4 places. Padded, all 16 are filled in each flight; else at most as many."""
    padded = trained(tuple(flags_of(shortcut, FEATURES["capacity, padded"].flags)))
    dropped = trained(tuple(flags_of(shortcut, CAPACITY)))
    for (on, _), (other, _) in zip(padded, dropped, strict=True):
        assert set(on["routed"]) == {4 * NUM_EXPERTS}
        assert max(other["routed"]) <= 4 * NUM_EXPERTS and min(other["routed"]) < 4 * NUM_EXPERTS
        assert on["losses"] == pytest.approx(other["losses"], rel=1e-5)  # what pads weighs nothing


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refused():
    bases = {shortcut: without_flag(flags, "--expert-model-parallel-size") for shortcut, flags in BASE.items()}
    entry.assert_refused(
        (with_flags(bases[shortcut], *changes(flags)), words) for (shortcut, flags), words in REFUSED.items()
    )


def test_accepted():
    """Negative control: next to what is refused lies what is not. (Sinkhorn takes no softmax over one logit.)"""
    base = without_flag(without_flag(BASE["scmoe"], "--expert-model-parallel-size"), "--moe-router-pre-softmax")
    accepted = (
        "--moe-router-load-balancing-type sinkhorn",
        "--moe-router-topk 3 --moe-router-num-groups 2 --moe-router-group-topk 2",
    )
    entry.assert_accepted([with_flags(base, *changes(flags)) for flags in accepted])


# --- by hand: the two gates of DGMoE -------------------------------------------------------------------------------


def dual_gate_router(**settings: Any) -> Any:
    """The router of a small model: its logits are the first four values of a token."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

    router = models.build(Case(shortcut="dgmoe", num_groups=1)).decoder.layers[1].mlp.router
    for name, value in settings.items():
        assert hasattr(router.config, name)
        setattr(router.config, name, value)
    router.routing_type = router.config.moe_router_load_balancing_type
    router.score_function = router.config.moe_router_score_function
    if router.get_aux_loss_coeff("global_aux_loss"):
        router.global_tokens_per_expert, router.ga_steps = torch.zeros(NUM_EXPERTS), torch.zeros(())
    with torch.no_grad():
        router.weight.copy_(torch.eye(*router.weight.shape))
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    get_moe_metrics_tracker().metrics.clear()
    return router


def as_input(logits: Tensor) -> Tensor:
    """[s, b, experts] -> a tensor [s, b, h] that gives these logits."""
    return torch.nn.functional.pad(logits, (0, 16 - NUM_EXPERTS))


def second_choice() -> None:
    router = dual_gate_router()
    probabilities = torch.tensor([0.6436, 0.237, 0.0597, 0.0597])
    favourite = as_input(probabilities.log().view(1, 1, -1))
    first = router(favourite)
    assert first.chosen.tolist() == [[True, False, False, False]]
    assert first.probs[0, 0].item() == pytest.approx(0.6436, abs=1e-4)
    second = router(favourite, preceding=first)
    assert second.chosen.tolist() == [[False, True, False, False]]
    # Without expert 0 the softmax over the others would say 0.665.
    assert second.probs[0].tolist() == pytest.approx([0, 0.237, 0, 0], abs=1e-4)
    # Where the first choices differ the second gate keeps its own.
    elsewhere = router(as_input(torch.tensor([[[0.0, 0.0, 3.0, 0.0]]])))
    assert router(favourite, preceding=elsewhere).probs[0].tolist() == pytest.approx([0.6436, 0, 0, 0], abs=1e-4)


def second_choice_with_a_bias() -> None:
    router = dual_gate_router(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.0)
    router.expert_bias = torch.tensor([0.0, 0.0, 0.5, 0.0])
    tokens = as_input(torch.tensor([[[2.0, 1.0, 0.0, -1.0]]]))  # sigmoid: 0.881, 0.731, 0.500, 0.269; biased: 1.000
    first = router(tokens)
    second = router(tokens, preceding=first)
    # The bias decides which expert; the weight is the score itself, times the scaling factor.
    assert first.probs[0].tolist() == pytest.approx([0, 0, 2 * 0.5, 0], abs=1e-4)
    assert second.probs[0].tolist() == pytest.approx([2 * 0.8808, 0, 0, 0], abs=1e-4)


def capacity_of_both_gates(pad: bool) -> None:
    router = dual_gate_router(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=pad)
    strength = torch.arange(8.0).view(8, 1)  # token 7 is the surest of its choice
    tokens = as_input(torch.cat([3 + strength, 2 + strength, torch.zeros(8, 2)], dim=1).view(8, 1, NUM_EXPERTS))
    first = router(tokens)
    second = router(tokens, preceding=first)
    for routing, expert in ((first, 0), (second, 1)):  # 8 tokens, 4 experts: 2 places, all 8 want the same expert
        assert routing.chosen.sum(dim=0)[expert] == 8
        assert routing.routing_map[:, expert].tolist() == [False] * 6 + [True] * 2
        assert routing.probs.count_nonzero() == 2
        assert routing.routing_map.sum() == (2 * NUM_EXPERTS if pad else 2)
    assert not (first.chosen & second.chosen).any()


def balance_by_hand(scores: Tensor, chosen: Tensor) -> Tensor:
    """E * sum over experts of the share of choices times the mean score; [n, e] each."""
    total = torch.zeros(())
    for expert in range(NUM_EXPERTS):
        share = sum(1 for row in chosen.tolist() if row[expert]) / len(chosen)
        total = total + share * sum(row[expert] for row in scores) / len(scores)
    return NUM_EXPERTS * total


def balance_of_both_gates(kind: str, logged_as: str, padded: bool) -> None:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    coefficient = 0.3
    router = dual_gate_router(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=coefficient)
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(6, 3, NUM_EXPERTS, generator=generator).requires_grad_() for _ in range(2)]
    mask = (torch.arange(6) >= 4).view(6, 1).expand(6, 3) if padded else None
    first = router(as_input(logits[0]), mask)
    second = router(as_input(logits[1]), mask, preceding=first)
    (logged,) = get_moe_metrics_tracker().metrics.items()
    (second.probs * 0).sum().backward()
    found = [tensor.grad for tensor in logits]

    kept = 4 if padded else 6
    copies = [tensor.detach().clone().requires_grad_() for tensor in logits]
    scores = torch.cat([copy[:kept].softmax(-1) for copy in copies])
    chosen = torch.cat([routing.chosen.view(6, 3, NUM_EXPERTS)[:kept] for routing in (first, second)])
    parts = [(scores, chosen)]
    if kind == "seq_aux_loss":
        parts = [(scores[:, b], chosen[:, b]) for b in range(3)]
    expected = sum(balance_by_hand(p.reshape(-1, NUM_EXPERTS), c.reshape(-1, NUM_EXPERTS)) for p, c in parts) / len(
        parts
    )
    (coefficient * expected).backward()

    name, entry = logged
    assert name == logged_as
    assert entry.values.tolist() == pytest.approx([0.0, expected.item()], rel=1e-5)  # by layer: once, not once per gate
    for gradient, copy in zip(found, copies, strict=True):
        assert copy.grad.abs().max() > 1e-4
        torch.testing.assert_close(gradient, copy.grad, rtol=1e-4, atol=1e-6)


def logged_z_loss() -> tuple[float, float, float]:
    """What is logged, and the mean squared log-sum of each gate's logits."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    router = dual_gate_router(moe_z_loss_coeff=0.1)
    logits = [torch.randn(6, 3, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    router(as_input(logits[1]), preceding=router(as_input(logits[0])))
    (entry,) = get_moe_metrics_tracker().metrics.values()
    preceding, current = (tensor.logsumexp(-1).square().mean().item() for tensor in logits)
    return entry.values.sum().item(), preceding, current


def test_the_second_choice_keeps_its_full_softmax_weight():
    ranks.run(second_choice, 1, layout={})


def test_the_second_choice_follows_the_expert_bias():
    ranks.run(second_choice_with_a_bias, 1, layout={})


@pytest.mark.parametrize("pad", [False, True])
def test_capacity_of_both_gates_by_hand(pad):
    ranks.run(capacity_of_both_gates, 1, pad, layout={})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("kind", "logged_as"),
    [
        ("aux_loss", "load_balancing_loss"),
        ("seq_aux_loss", "seq_load_balancing_loss"),
        ("global_aux_loss", "global_load_balancing_loss"),
    ],
)
def test_balance_losses_of_both_gates_by_hand(kind, logged_as, padded):
    ranks.run(balance_of_both_gates, 1, kind, logged_as, padded, layout={})


def test_z_loss_is_that_of_each_gate():
    ((logged, preceding, current),) = ranks.run(logged_z_loss, 1, layout={})
    assert logged == pytest.approx(preceding + current, rel=1e-5)


# --- routing replay ------------------------------------------------------------------------------------------------


def replayed(replay: bool) -> bool:
    """Whether a router with other weights sends the same tokens to the same experts as the one that was recorded."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    RouterReplay.clear_global_router_replay_instances()
    model = models.build(Case(topk=2))
    ((tokens, labels, positions),) = models.my_batch()
    routers = [layer.mlp.router for layer in model.decoder.layers[1::2]]
    maps: list[Tensor] = []
    for router in routers:
        router.router_replay = RouterReplay()
        router.register_forward_hook(lambda _router, _inputs, routing: maps.append(routing[1]))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    model(tokens, positions, None, labels=labels)
    with torch.no_grad():
        for router in routers:
            router.weight.neg_()
    if replay:
        RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    model(tokens, positions, None, labels=labels)
    RouterReplay.clear_global_router_replay_instances()
    return all(torch.equal(one, other) for one, other in zip(maps[:2], maps[2:], strict=True))


@pytest.mark.parametrize("replay", [True, False])
def test_a_recorded_routing_is_replayed(replay):
    assert ranks.run(replayed, 1, replay, layout={}) == [replay]
