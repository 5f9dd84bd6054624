"""Numbers of parameters and of floating-point operations, from sizes alone."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from planning.workload import Attention, Embedding, GroupEnd, Mamba, Mlp, Moe, Op, Output, Single, Span, Workload


class Parameters(NamedTuple):
    """Numbers of parameters.

    Attributes:
        dense: of what all data parallel ranks share.
        expert: of routed experts.
    """

    dense: float = 0.0
    expert: float = 0.0

    def __add__(self, other: Parameters) -> Parameters:  # type: ignore[override]
        return Parameters(self.dense + other.dense, self.expert + other.expert)

    def times(self, count: float) -> Parameters:
        """As often."""
        return Parameters(self.dense * count, self.expert * count)


def parameters(op: Op | GroupEnd, workload: Workload) -> Parameters:
    """Of one op, in the whole model; norms are left out. Of what several ops share each has its part."""
    if isinstance(op, Span):
        return sum((parameters(part, workload) for part in (*op.ops, *op.calls)), Parameters())
    return _read(op, workload).times(1 / op.owners if isinstance(op, Mlp | Moe) else 1)


def _read(op: Single, workload: Workload) -> Parameters:  # noqa: PLR0911 (a case for each kind)
    """That one op multiplies with, whoever else does."""
    hidden = workload.hidden
    match op:
        case Attention():
            return Parameters(_attention(op, hidden))
        case Mamba():
            inner, shared = op.heads * op.head_dim, 2 * op.groups * op.state
            made = hidden * (2 * inner + shared + op.heads)
            return Parameters(made + (inner + shared) * op.kernel + inner * hidden)
        case Mlp():
            return Parameters(_mlp(op, hidden))
        case Moe():
            width = op.latent or hidden
            dense = hidden * op.experts + 2 * hidden * op.latent + (_mlp(op.shared, hidden) if op.shared else 0)
            return Parameters(dense, op.experts * width * op.width * (2 + op.gated))
        case Embedding():
            return Parameters(workload.vocabulary * hidden)
        case Output():
            return Parameters(0 if workload.tied or not op.own else workload.vocabulary * hidden)
        case GroupEnd():
            return Parameters()


def model_flops(workload: Workload) -> float:
    """Of a step, as Megatron counts them: three times forward's products, half of causal scores, no recomputation."""
    tokens = workload.global_batch * workload.seq_length
    counted = Counter(op for stage in workload.stages for op in stage)
    return 3 * tokens * sum(_flops(op, workload) * count for op, count in counted.items())


def _mlp(op: Mlp, hidden: int) -> int:
    return hidden * op.width * (2 + op.gated)


def _attention(op: Attention, hidden: int) -> int:
    value = op.value_dim or op.head_dim
    query = op.head_dim + op.rope_dim
    made = op.heads * query * (1 + op.gated)
    count = hidden * op.q_latent + op.q_latent * made if op.q_latent else hidden * made
    if op.kv_latent:
        count += hidden * (op.kv_latent + op.rope_dim) + op.kv_latent * op.kv_heads * (op.head_dim + value)
    else:
        count += hidden * op.kv_heads * (query if op.shared_kv else query + value)
    if op.out_latent:
        return count + op.heads * value * op.out_latent + op.out_latent * op.out_groups * hidden
    return count + op.heads * value * hidden


def _flops(op: Op | GroupEnd, workload: Workload) -> float:  # noqa: PLR0911 (as above)
    """Of a token forward."""
    match op:
        case Attention():
            seen = workload.seq_length / 2
            seen = min(op.window, seen) if op.window else seen
            return 2 * _read(op, workload).dense + 2 * op.heads * seen * (
                op.head_dim + op.rope_dim + (op.value_dim or op.head_dim)
            )
        case Mamba():
            return 2 * _read(op, workload).dense + 7 * op.heads * op.head_dim * op.state
        case Moe():
            counted = _read(op, workload)
            return 2 * (counted.dense + counted.expert * op.top_k / op.experts)
        case Embedding():
            return 0.0
        case Output():
            return 2.0 * workload.vocabulary * workload.hidden
        case Span():
            return sum(_flops(part, workload) for part in (*op.ops, *op.calls))
        case _:
            return 2 * _read(op, workload).dense
