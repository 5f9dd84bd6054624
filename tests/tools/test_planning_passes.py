"""What ops send, run again and share: as Core's layers do, counted by hand."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from test_planning_model import ATTENTION, MOE, span, workload

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from planning.counts import Parameters, model_flops, parameters
from planning.hardware import machine
from planning.passes import Pricing
from planning.step import predict
from planning.tensors import collectives
from planning.training import Training
from planning.workload import Attention, Embedding, Layout, Mlp, Moe, Op, Output

from megatron_scmoe.config import Overlap
from megatron_scmoe.overlap.solver import schedule

H100, A30 = machine("H100"), machine("A30-PCIe")
TP2 = Layout(gpus=8, tp=2)
LATENT = Attention(heads=16, kv_heads=16, head_dim=64, q_latent=384, kv_latent=128, rope_dim=32)


def sent(op: Op, *, sequence_parallel: bool) -> dict[str, tuple[float, float]]:
    """Widths of a token that are sent forward and backward, by kind."""
    found: dict[str, tuple[float, float]] = {}
    for one in collectives(op, 1024, sequence_parallel=sequence_parallel):
        forward, backward = found.get(one.kind, (0.0, 0.0))
        found[one.kind] = (
            forward + one.width * one.forward,
            backward + one.width * (one.backward + one.beside),
        )
    return {kind: widths for kind, widths in found.items() if any(widths)}


@pytest.mark.parametrize(
    ("op", "shared", "alone"),
    [
        (ATTENTION, {"all-gather": (1024, 2048), "reduce-scatter": (1024, 1024)}, {"all-reduce": (1024, 1024)}),
        (Mlp(width=9), {"all-gather": (1024, 2048), "reduce-scatter": (1024, 1024)}, {"all-reduce": (1024, 1024)}),
        (LATENT, {"all-gather": (544, 1536), "reduce-scatter": (1024, 544)}, {"all-reduce": (1024, 512)}),
        (Embedding(), {"all-gather": (0, 1024), "reduce-scatter": (1024, 0)}, {"all-reduce": (1024, 0)}),
        (Output(), {"all-gather": (1024, 1024), "reduce-scatter": (0, 1024)}, {"all-reduce": (0, 1024)}),
        (MOE, {}, {}),
    ],
)
def test_tensor_parallel_ranks_send_what_cores_layers_do(op, shared, alone):
    """Core 0.19.2: tensor_parallel/layers.py with and without sequence parallelism; latents are whole on each rank."""
    assert sent(op, sequence_parallel=True) == shared
    assert sent(op, sequence_parallel=False) == alone


def dense(**training: object) -> dict[str, float]:
    """Bytes over tensor parallel ranks of a step of one MLP."""
    work = replace(workload(TP2, Training(**training), shortcut=False), stages=((Mlp(width=4096),),))
    told = predict(work, H100)
    return {wire.kind: wire.inside for wire in told.wires if wire.group == "TP"}


def test_without_sequence_parallelism_ranks_add_up():
    both, alone = dense(), dense(sequence_parallel=False)
    assert set(both) == {"all-gather", "reduce-scatter"} and set(alone) == {"all-reduce"}
    assert alone["all-reduce"] == pytest.approx(2 * both["reduce-scatter"])  # as often, and twice round
    norms = [Pricing(replace(workload(TP2, Training(sequence_parallel=on), shortcut=False)), H100).ops for on in (1, 0)]
    assert norms[1].norm("mlp").forward.seconds > 1.5 * norms[0].norm("mlp").forward.seconds  # of all tokens each


def test_backward_hides_what_runs_beside_its_products():
    """Gathers of the input and scatters of its gradient; on slow links some of them is left."""
    work = replace(workload(TP2, Training(), shortcut=False), stages=((Mlp(width=4096),),))
    slow = replace(H100, hardware=replace(H100.hardware, link=1e9))
    for where, hidden in ((H100, True), (slow, False)):
        wires = [wire for wire in predict(work, where).wires if wire.group == "TP"]
        exposed_s, sent_s = sum(wire.exposed_s for wire in wires), sum(wire.seconds for wire in wires)
        assert (exposed_s == pytest.approx(sent_s * 3 / 5)) is hidden  # two of five wait for nobody
        assert sent_s * 3 / 5 * (1 - 1e-9) <= exposed_s < sent_s


@pytest.mark.parametrize("overlap", Overlap)
def test_full_recomputation_runs_the_same_forward_again(overlap):
    layout, again = Layout(gpus=8, ep=8), frozenset({"full"})
    stages = ((span(overlap),),)
    once, twice = (
        predict(replace(workload(layout, Training(recompute=recompute), shortcut=True), stages=stages), A30)
        for recompute in (frozenset(), again)
    )
    costs = twice.spans[0].costs[twice.spans[0].solution.plan.chunks]
    assert costs.forward_runs == 2
    assert costs.backward == once.spans[0].costs[twice.spans[0].solution.plan.chunks].backward  # nothing folded in
    played = schedule(twice.spans[0].shape, costs.forward, twice.spans[0].solution.plan, backward=False)
    forward_s = max(one.end_s for one in played)
    (stage,) = twice.stages
    assert stage.forward_s == pytest.approx(forward_s)
    same = replace(twice.spans[0].span, plan=twice.spans[0].solution.plan, overlap=Overlap.FIXED)
    if overlap is not Overlap.OFF:
        (alone,) = predict(replace(workload(layout, Training(), shortcut=True), stages=((same,),)), A30).stages
        assert stage.backward_s == pytest.approx(alone.backward_s + forward_s)
    assert twice.a2a_s == pytest.approx(1.5 * once.a2a_s)
    assert twice.spans[0].limit_s <= twice.spans[0].solution.predicted_s * (1 + 1e-9)


def test_a_stock_layer_runs_again_with_all_that_it_sends():
    layout = Layout(gpus=16, tp=2, cp=2, ep=4, etp=2)
    for part in (1.0, 0.5):
        training = Training(recompute=frozenset({"full"}), recomputed_layers=part)
        once, again = (
            predict(replace(workload(layout, how, shortcut=False), stages=((ATTENTION, MOE),)), H100)
            for how in (Training(), training)
        )
        (first,), (second,) = once.stages, again.stages
        assert second.backward_s == pytest.approx(first.backward_s + part * first.forward_s)
        for group in ("TP", "EP"):
            wires = [sum(wire.seconds for wire in told.wires if wire.group == group) for told in (once, again)]
            assert wires[1] > wires[0] * (1 + 0.3 * part)


def test_output_layer_and_embedding_do_not_run_again():
    ends = (Embedding(), Output())
    once, again = (
        predict(replace(workload(Layout(gpus=1), how, shortcut=False), stages=(ends,)), H100).step_s
        for how in (Training(), Training(recompute=frozenset({"full"})))
    )
    assert once == again


def test_what_places_share_is_counted_once_and_computed_each_time():
    work = workload(Layout(gpus=8, ep=8), Training(), shortcut=False)
    own, shared = (Moe(experts=16, top_k=2, width=768, shared=Mlp(width=768), owners=owners) for owners in (1, 4))
    assert sum((parameters(shared, work) for _ in range(4)), Parameters()) == parameters(own, work)
    assert sum((parameters(Mlp(width=8, owners=2), work) for _ in range(2)), Parameters()) == parameters(
        Mlp(width=8), work
    )
    flops, steps = (
        [function(replace(work, stages=((op,) * 4,))) for op in (own, shared)]
        for function in (model_flops, lambda one: predict(one, H100))
    )
    assert flops[0] == flops[1]
    reduced = [sum(wire.inside + wire.between for wire in told.wires if wire.group == "DP") for told in steps]
    assert reduced[0] == pytest.approx(4 * reduced[1])
    assert steps[0].parts["experts"] == steps[1].parts["experts"]
    assert steps[0].parts["optimizer"] == pytest.approx(4 * steps[1].parts["optimizer"])


def test_predictions_read_the_models_output_layer():
    work = workload(Layout(gpus=1), Training(), shortcut=False)
    assert parameters(Output(own=False), work) == Parameters() != parameters(Output(), work)
    flops = [model_flops(replace(work, stages=((op,),))) for op in (Output(), Output(own=False))]
    assert flops[0] == flops[1] > 0


def test_an_optimizer_that_moves_less_takes_less():
    times = [
        predict(workload(Layout(gpus=8, ep=8), Training(update_bytes=size, grad_bytes=0), shortcut=False), H100).parts
        for size in (34, 17)
    ]
    assert times[0]["optimizer"] == pytest.approx(2 * times[1]["optimizer"])


def test_what_optimizers_keep_and_move():
    """By hand, in bytes of a parameter: gradient twice, what is kept both ways, bf16 written."""
    import torch
    from planning.running import _update_bytes

    from megatron_scmoe.dry_run.memory import optimizer_bytes_per_parameter

    def args(**values: object) -> Namespace:
        told = {"optimizer": "adam", "sgd_momentum": 0.9, "bf16": True, "fp16": False}
        told |= {"use_precision_aware_optimizer": False}
        told |= dict.fromkeys(
            ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32
        )
        return Namespace(**(told | values))

    aware = {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    for values, kept, moved in (
        ({}, 12, 34),
        ({"optimizer": "sgd"}, 8, 26),
        ({"optimizer": "sgd", "sgd_momentum": 0.0}, 4, 18),
        (aware, 6, 8 + 2 * 8),  # bf16 and the bits that it lacks, two moments in bf16
        (aware | {"main_grads_dtype": torch.bfloat16}, 6, 4 + 2 * 8),
        (aware | {"bf16": False, "fp16": True}, 8, 8 + 2 * 8 + 2),
    ):
        assert optimizer_bytes_per_parameter(args(**values)) == kept, values
        assert _update_bytes(args(**values)) == moved, values
