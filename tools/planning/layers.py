"""One MoE layer on eight H100, forward and backward, as Megatron-LM's functional tests time it.

Figures: NVIDIA/Megatron-LM at d98e8a64, tests/functional_tests/test_cases/common/moe_perf/baseline.json. Expert
parallelism over 8 GPUs, sequences of 4096 tokens, one on each rank, routing forced to balance.

What runs is what the test builds (its ``_build_transformer_config``), not the models that it names: it sets neither
``gated_linear_unit`` nor ``moe_shared_expert_intermediate_size``, so experts are two products with a GELU between, and
there is no shared expert. There is no norm around the layer. ``bias_activation_fusion`` is off, so weights in fp32
multiply the activation in kernels of their own (:func:`_weighing`; Core's ``TEGroupedMLP.forward``). In 8 bits rows are
copied to be padded and back, but with HybridEP, which pads as it dispatches (Core's ``skip_routed_expert_padding``).
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from planning.hardware import Machine
from planning.judging import Judged
from planning.kernels import Kernel
from planning.ops import BF16, Ops
from planning.passes import Pricing
from planning.training import Dispatcher, Precision, Training
from planning.workload import Layout, Moe, Workload

_SHAPES = {
    "Mixtral": (4096, Moe(experts=8, top_k=2, width=14336, gated=False)),
    "DeepSeek": (7168, Moe(experts=32, top_k=8, width=2048, gated=False, limited=0.5)),
}
_MS = {
    ("Mixtral", "alltoall", "bf16"): (4.327, 7.684),
    ("Mixtral", "deepep", "bf16"): (4.636, 7.854),
    ("Mixtral", "hybridep", "bf16"): (4.343, 7.741),
    ("Mixtral", "alltoall", "fp8-blockwise"): (3.788, 6.618),
    ("Mixtral", "deepep", "fp8-blockwise"): (4.101, 6.827),
    ("Mixtral", "hybridep", "fp8-blockwise"): (3.701, 6.572),
    ("DeepSeek", "alltoall", "bf16"): (7.119, 10.483),
    ("DeepSeek", "deepep", "bf16"): (5.682, 9.055),
    ("DeepSeek", "hybridep", "bf16"): (5.391, 8.795),
    ("DeepSeek", "alltoall", "fp8-blockwise"): (7.609, 10.126),
    ("DeepSeek", "deepep", "fp8-blockwise"): (6.035, 8.602),
    ("DeepSeek", "hybridep", "fp8-blockwise"): (5.143, 7.687),
}
"""Milliseconds forward and backward."""


def judged(machine: Machine) -> list[Judged]:
    """Each case forward, and backward, in seconds."""
    figures = []
    for (model, dispatcher, precision), measured_ms in _MS.items():
        hidden, moe = _SHAPES[model]
        workload = Workload(
            stages=((moe,),),
            hidden=hidden,
            vocabulary=0,
            seq_length=4096,
            micro_batch=1,
            global_batch=8,
            layout=Layout(gpus=8, ep=8),
            training=Training(precision=Precision(precision), dispatcher=Dispatcher(dispatcher)),
        )
        words = f"{model}, {dispatcher}, {precision}"
        for kind, ms, seconds in zip(
            ("forward", "backward"), measured_ms, _layer_s(moe, workload, machine), strict=True
        ):
            figures.append(Judged(what=f"{words}, {kind}", measured=ms / 1000, predicted=seconds, group=model))
    return figures


def causes(figures: list[Judged]) -> Iterator[str]:
    """What is missing of the cases of each model and precision, in words."""
    for model in _SHAPES:
        for precision in dict.fromkeys(precision for _, _, precision in _MS):
            for way in ("forward", "backward"):
                named = [one for one in figures if one.group == model and f"{precision}, {way}" in one.what]
                short_ms = [1000 * (one.measured - one.predicted) for one in named]
                yield (
                    f"{model}, {precision}, {way}: {fmean(short_ms):.2f} ms too short ({min(short_ms):.2f} to "
                    f"{max(short_ms):.2f}) of {1000 * fmean(one.measured for one in named):.2f}"
                )


def by_others(figures: list[Judged]) -> str:
    """How far off the figures are by the constants that were fitted to whole steps, in words."""
    errors = [one.error for one in figures]
    return (
        f"by constants that were fitted to whole steps each case would be off by {min(errors):+.0%} to "
        f"{max(errors):+.0%}: they stand for what a step has besides"
    )


def _layer_s(moe: Moe, workload: Workload, machine: Machine) -> tuple[float, float]:
    """Seconds forward and backward."""
    pricing = Pricing(workload, machine)
    ops = pricing.ops
    flights = pricing.groups.flights(moe, ops.own_tokens).values()
    passes = pricing.computing([ops.route(moe), *ops.flight(moe), _weighing(moe, ops), *_padding(moe, ops)])
    sent_s = (sum(flight[way].seconds for flight in flights) for way in (0, 1))
    forward_s, backward_s = (
        sum(seconds.values()) + its_s for seconds, its_s in zip((passes.forward, passes.backward), sent_s, strict=True)
    )
    return forward_s, backward_s


def _weighing(moe: Moe, ops: Ops) -> Kernel:
    """Weights in fp32 times an activation in bf16: a product in fp32, then a cast.

    Bytes of each element forward: 2 read, 4 written; 4 read, 2 written. Backward: the gradient cast to fp32 (6), times
    the weights (8), cast (6), times the activation (10), and that summed for the gradient of the weights (4).
    """
    elements = ops.own_tokens * moe.top_k * moe.width
    return Kernel("experts", "weights", ops.plain.moving(12 * elements, 2), ops.plain.moving(34 * elements, 5))


def _padding(moe: Moe, ops: Ops) -> Iterator[Kernel]:
    """Rows copied to be padded before the experts, and back behind them; backward their gradients, the same way."""
    training = ops.training
    if training.precision is not Precision.BF16 and training.dispatcher is not Dispatcher.HYBRIDEP:
        copied = ops.plain.moving(4 * ops.own_tokens * moe.top_k * ops.workload.hidden * BF16, 2)
        yield Kernel("permute", "pad", copied, copied)
