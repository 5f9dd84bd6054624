"""The planner's model of time: what has to hold whatever the constants, and shapes of published models."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from planning import notes
from planning.counts import Parameters, parameters
from planning.hardware import HARDWARE, Constants, Hardware, Machine, machine
from planning.kernels import Clock, Kernel
from planning.ops import Ops
from planning.shapes import SHAPES
from planning.step import predict
from planning.training import Dispatcher, Precision, Training
from planning.wires import Group
from planning.workload import Attention, Embedding, GroupEnd, Layout, Mlp, Moe, Output, Span, Workload

from megatron_scmoe.config import Overlap, ScMoEConfig, Shortcut

ATTENTION = Attention(heads=16, kv_heads=4, head_dim=64)
MOE = Moe(experts=16, top_k=2, width=768)
PARTS = ("bf16", "fp8", "fp4", "memory_bandwidth", "link", "network")


def span(overlap: Overlap = Overlap.ADAPTIVE) -> Span:
    """A group of two blocks at pos2."""
    shape = ScMoEConfig(shortcut=Shortcut.SCMOE).span_shape(0, [3])
    ops = (ATTENTION, Mlp(width=4096), ATTENTION, Mlp(width=768), GroupEnd())
    return Span(ops=ops, calls=(MOE,), shape=shape, overlap=overlap, chunks=(1, 2))


def workload(layout: Layout, training: Training, shortcut: bool) -> Workload:
    group = (span(),) if shortcut else (ATTENTION, Mlp(width=4096), ATTENTION, replace(MOE, shared=Mlp(width=768)))
    stages = [[*group] * 2 for _ in range(layout.pp)]
    stages[0].insert(0, Embedding())
    stages[-1].append(Output())
    return Workload(
        stages=tuple(map(tuple, stages)),
        hidden=1024,
        vocabulary=32768,
        seq_length=2048,
        micro_batch=1,
        global_batch=layout.dp * 4,
        layout=layout,
        training=training,
    )


workloads = st.builds(
    workload,
    st.sampled_from(
        [
            Layout(gpus=8, ep=8),
            Layout(gpus=16, ep=16),
            Layout(gpus=32, ep=8, pp=2, vp=2, tp=2),
            Layout(gpus=16, ep=4, cp=2, etp=2),
        ]
    ),
    st.builds(
        Training,
        precision=st.sampled_from(Precision),
        dispatcher=st.sampled_from(Dispatcher),
        recompute=st.sampled_from([frozenset(), frozenset({"full"}), frozenset({"moe_act", "core_attn"})]),
        overlap_moe=st.booleans(),
        overlap_grad_reduce=st.booleans(),
        distributed_optimizer=st.booleans(),
    ),
    st.booleans(),
)
machines = st.builds(
    lambda hardware, constants: Machine(hardware=hardware, constants=constants),
    st.sampled_from(list(HARDWARE.values())),
    st.builds(Constants, gemm=st.floats(0.2, 1), memory=st.floats(0.2, 1), launch_s=st.floats(0, 2e-5)),
)


def slower_parts(make, where: Machine) -> list[str]:
    """What of a machine makes ``make(machine)`` seconds longer when there is twice as much of it."""
    before = make(where)
    found = []
    for part in PARTS:
        more = replace(where.hardware, **{part: 2 * getattr(where.hardware, part)})
        if make(replace(where, hardware=more)) > before * (1 + 1e-9):
            found.append(part)
    return found


@settings(max_examples=25, deadline=None)
@given(workloads, machines, st.booleans())
def test_more_of_anything_is_never_slower(work, where, forward_only):
    assert not slower_parts(lambda one: predict(work, one, forward_only=forward_only).step_s, where)


def test_what_gets_slower_with_more_is_noticed():
    where = machine("H100")
    assert slower_parts(lambda one: 1 + one.hardware.link, where) == ["link"]


@settings(max_examples=25, deadline=None)
@given(workloads, machines, st.booleans())
def test_parts_add_up(work, where, forward_only):
    told = predict(work, where, forward_only=forward_only)
    assert math.isclose(sum(told.parts.values()), told.step_s, rel_tol=1e-9)
    assert all(seconds > 0 for seconds in told.parts.values())
    assert told.tokens_per_s * told.step_s * work.layout.gpus == pytest.approx(work.global_batch * work.seq_length)
    assert all(wire.exposed_s <= wire.seconds * (1 + 1e-9) or wire.group == "EP" for wire in told.wires)


def test_a_shortcut_costs_less_than_waiting_and_no_less_than_its_limit():
    work = workload(Layout(gpus=8, ep=8), Training(), shortcut=True)
    (told,) = predict(work, machine("A30-PCIe")).spans
    assert told.limit_s * (1 - 1e-9) <= told.solution.predicted_s < told.sequential_s
    waiting = replace(work, stages=((Embedding(), span(Overlap.OFF), span(Overlap.OFF), Output()),))
    (off,) = predict(waiting, machine("A30-PCIe")).spans
    assert off.solution.predicted_s == off.sequential_s  # what does not overlap gains nothing


def test_narrow_experts_with_few_rows_reach_less_of_the_peak():
    clock = Clock(machine("H100"), Precision.BF16)

    def rate(rows: float, width: float) -> float:
        return rows * width * 2048 / clock.product(rows, width, 2048, groups=16, grouped=True)

    assert rate(64, 768) < 0.5 * rate(4096, 768) and rate(4096, 96) < rate(4096, 768)


def test_what_leaves_the_domain_goes_over_the_network():
    where = Machine(hardware=HARDWARE["H100"], constants=Constants())
    inside, across = Group(where, 8).all_to_all(64e6), Group(where, 64).all_to_all(64e6)
    assert (inside.between, across.between) == (0, 56e6) and across.seconds > 5 * inside.seconds
    once = Group(where, 64).unique(1000, 8, 8192, experts=256)  # a token goes once to each node
    assert once.between < 0.7 * Group(where, 64).all_to_all(1000 * 8 * 8192).between


def test_a_token_goes_once_to_each_rank_of_its_experts_of_which_no_two_are_the_same():
    """All choices of 3 of 8 experts on 4 ranks, counted; with repetition they would be fewer ranks."""
    where = Machine(hardware=HARDWARE["H100"], constants=Constants())
    chosen = list(itertools.combinations(range(8), 3))
    ranks = sum(len({expert // 2 for expert in its}) for its in chosen) / len(chosen)
    sent = Group(where, 4).unique(1000, 3, 10, experts=8)
    assert sent.inside == pytest.approx(1000 * 10 * ranks * 3 / 4) and sent.between == 0
    assert ranks > 1.05 * 4 * (1 - (1 - 1 / 4) ** 3)
    assert Group(where, 4).unique(1000, 7, 10, experts=8).inside == pytest.approx(1000 * 10 * 4 * 3 / 4)  # all ranks


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_their_names(name):
    shape = SHAPES[name]
    work = Workload(
        stages=((),), hidden=shape.hidden, vocabulary=shape.vocabulary, seq_length=1, micro_batch=1, global_batch=1,
        layout=Layout(gpus=1),
    )  # fmt: skip
    ops = [Embedding(), *(op for layer in shape.layers for op in layer), Output()]
    counted = sum((parameters(op, work) for op in ops), Parameters())
    assert sum(counted) == pytest.approx(shape.size, rel=0.02)
    assert sum(counted) - sum(parameters(ops[1], work)) != pytest.approx(sum(counted), rel=1e-6)


OTHERWISE_COUNTED = {"GPT OSS 120B", "Nemotron_3_Nano", "DeepSeekV4 Flash"}
"""Families whose tables count other model FLOP than their shapes have."""


def test_published_steps_compute_what_their_tables_say():
    """Model FLOP of a token as published, which says more of a shape than its parameters do."""
    assert set(notes.otherwise_counted()) == OTHERWISE_COUNTED
    assert notes.otherwise_counted()["GPT OSS 120B"].endswith(" to +20.6%")


@pytest.mark.parametrize("wrong", [{"gemm": 0.0}, {"launch_s": -1.0}, {"memory": math.nan}, {"speed": 1.0}])
def test_impossible_constants_are_refused(wrong):
    told = machine("H200").as_json()
    assert Machine.from_json(told) == machine("H200")
    told["constants"] |= wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Machine.from_json(told)


def test_unknown_machines_and_layouts_are_refused():
    with pytest.raises(ValueError, match="hardware H1 is not known: choose one of A30-PCIe"):
        machine("H1")
    with pytest.raises(ValueError, match=r"no constants of H100 for release 1\.0"):
        machine("H100", release="1.0")
    with pytest.raises(ValueError, match="ep x etp x pp is 16, which does not divide 8 GPUs"):
        Layout(gpus=8, ep=16)
    assert isinstance(machine("H100", network=1e9).hardware, Hardware)


def test_without_a_distributed_optimizer_gradients_go_both_ways_of_a_ring_and_parameters_none():
    layout = Layout(gpus=16, ep=8)
    shared, whole = (
        predict(workload(layout, Training(distributed_optimizer=shared), shortcut=False), machine("H100"))
        for shared in (True, False)
    )
    sent = {
        one: {wire.kind: wire.inside + wire.between for wire in told.wires if wire.group == "DP"}
        for one, told in (("shared", shared), ("whole", whole))
    }
    assert set(sent["whole"]) == {"all-reduce"}
    assert sent["whole"]["all-reduce"] == pytest.approx(2 * sent["shared"]["reduce-scatter"])  # of 4 bytes each
    assert sent["shared"]["reduce-scatter"] == pytest.approx(2 * sent["shared"]["all-gather"])  # of 4 bytes and of 2


def test_what_fills_experts_up_travels():
    def a2a(rows: float) -> float:
        told = predict(workload(Layout(gpus=8, ep=8), Training(expert_rows=rows), shortcut=False), machine("H100"))
        return sum(wire.inside + wire.between for wire in told.wires if wire.group == "EP")

    assert a2a(2.0) == pytest.approx(2 * a2a(1.0))


def test_a_pipeline_of_several_nodes_hands_on_over_the_network():
    """Of 16 stages on 64 GPUs of 8 a node, every second hop stays in a node, and the others do not."""
    told = predict(workload(Layout(gpus=64, pp=16), Training(), shortcut=False), machine("H100"))
    assert all(wire.between and not wire.inside for wire in told.wires if wire.group == "PP")
    told = predict(workload(Layout(gpus=8, pp=2), Training(), shortcut=False), machine("H100"))
    assert all(wire.inside and not wire.between for wire in told.wires if wire.group == "PP")


def test_biases_of_experts_are_added_expert_by_expert_and_unfused():
    """8192 rows of two experts: the second layer's bias moves 28 bytes an element forward and 40 backward, in fp32."""
    where = machine("GB300")
    moe, rows = Moe(experts=16, top_k=2, width=2880, bias=True), 8192

    def biases(training: Training) -> Kernel:
        (kernel,) = (
            kernel
            for kernel in Ops(workload(Layout(gpus=8, ep=8), training, False), where).experts(moe, rows, 2880)
            if kernel.part == "bias"
        )
        return kernel

    apart, fused = biases(Training()), biases(Training(fused_experts=True))
    rate = where.hardware.memory_bandwidth * where.constants.memory
    for work, each, own in ((apart.forward, 28, 2), (apart.backward, 40, 5)):
        assert work.launches == 1 + own * 2 + 2
        gaps_s = work.launches * where.constants.gap_s
        assert work.seconds - gaps_s == pytest.approx(rows * 2880 * (2 * 2 + each) / rate)
    assert fused.forward.launches == fused.backward.launches == 2
    assert fused.forward.seconds < 0.3 * apart.forward.seconds
    assert not any(
        kernel.part == "bias"
        for kernel in Ops(workload(Layout(gpus=8, ep=8), Training(), False), where).experts(MOE, rows, 2880)
    )
