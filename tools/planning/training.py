"""How a training step runs, beside what it computes and its layout: precision, dispatcher, graphs, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """What linear layers multiply in (--bf16, --fp8-recipe, --fp4-format); all else runs in bf16."""

    BF16 = "bf16"
    FP8 = "fp8"  # one scale for a tensor
    FP8_BLOCKWISE = "fp8-blockwise"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


class Dispatcher(StrEnum):
    """What carries tokens to experts (--moe-token-dispatcher-type, --moe-flex-dispatcher-backend)."""

    ALLTOALL = "alltoall"
    DEEPEP = "deepep"
    HYBRIDEP = "hybridep"


class Graphs(StrEnum):
    """What CUDA graphs hold (--cuda-graph-impl, --cuda-graph-scope)."""

    NONE = "none"
    PARTIAL = "partial"  # attention, router and what else is not of routed experts
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a step runs, beside its layout; the names are Megatron's flags.

    Attributes:
        precision: of linear layers.
        dispatcher: of tokens.
        recompute: modules of --recompute-modules; ``full`` for whole layers.
        recomputed_layers: part of the layers of which ``recompute`` is true.
        overlap_moe: --overlap-moe-expert-parallel-comm: two micro-batches run interleaved, one's all-to-all beside the
            other's computation. Of stock layers.
        overlap_grad_reduce, overlap_param_gather: beside the last backward, and the first forward.
        grad_bytes, param_bytes: of a gradient as it is reduced (--grad-reduce-in-bf16: 2), of a parameter gathered.
        sequence_parallel: whether tensor parallel ranks share tokens where they share no heads or widths.
        update_bytes: that an optimizer moves for each parameter that it updates. Adam's, in fp32: gradient read twice,
            once for its norm; parameter and two moments read and written; and bf16 written.
        distributed_optimizer: whether the optimizer's states are shared by the data parallel ranks.
        cuda_graphs: what is replayed, so that the launches of the host cost nothing.
        fused_experts: the experts of a rank are one kernel for each product, with activation and quantization in it.
        fp8_attention: core attention in 8 bits (--fp8-dot-product-attention).
        expert_rows: rows that experts compute for each routed one: the capacity factor, or 1.
    """

    precision: Precision = Precision.BF16
    dispatcher: Dispatcher = Dispatcher.ALLTOALL
    recompute: frozenset[str] = frozenset()
    recomputed_layers: float = 1.0
    overlap_moe: bool = False
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    grad_bytes: int = 4
    param_bytes: int = 2
    sequence_parallel: bool = True
    update_bytes: int = 34
    distributed_optimizer: bool = True
    cuda_graphs: Graphs = Graphs.NONE
    fused_experts: bool = False
    fp8_attention: bool = False
    expert_rows: float = 1.0
