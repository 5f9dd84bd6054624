"""One MoE layer on eight H100, forward and backward, as Megatron-LM's functional tests time it.

Figures: NVIDIA/Megatron-LM at d98e8a64, tests/functional_tests/test_cases/common/moe_perf/baseline.json. Expert
parallelism over 8 GPUs, sequences of 4096 tokens, one on each rank.
"""

from __future__ import annotations

from planning.hardware import Machine
from planning.judging import Judged
from planning.step import predict
from planning.training import Dispatcher, Precision, Training
from planning.workload import Layout, Mlp, Moe, Workload

_SHAPES = {
    "Mixtral": (4096, Moe(experts=8, top_k=2, width=14336)),
    "DeepSeek": (7168, Moe(experts=32, top_k=8, width=2048, shared=Mlp(width=2048), limited=0.5)),
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
    """Each case forward, and forward with backward, in seconds."""
    figures = []
    for (model, dispatcher, precision), (forward_ms, backward_ms) in _MS.items():
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
        (stage,) = predict(workload, machine).stages
        words = f"{model}, {dispatcher}, {precision}"
        for kind, measured_ms, predicted_s in (
            ("forward", forward_ms, stage.forward_s),
            ("backward", backward_ms, stage.backward_s),
        ):
            figures.append(
                Judged(what=f"{words}, {kind}", measured=measured_ms / 1000, predicted=predicted_s, group=model)
            )
    return figures
