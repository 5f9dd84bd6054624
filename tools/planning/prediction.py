"""What the model of time says of a step: ``planning.step.predict(workload, machine)`` returns a :class:`Prediction`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_scmoe.contracts import SpanShape
from megatron_scmoe.overlap.solver import Solution, SpanCosts
from planning.workload import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """What one kind of op takes of a stage and micro-batch, in seconds, recomputation within backward.

    Attributes:
        forward_s: of all ops of the kind together.
        backward_s: as long.
    """

    forward_s: float
    backward_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What one rank of the busiest stage sends in a step for one purpose.

    Attributes:
        group: EP, TP, CP, PP, DP (of what is no expert) or EDP (of experts).
        kind: dispatch, combine, all-gather, reduce-scatter, all-reduce or point-to-point.
        inside: bytes over the links of the domain.
        between: bytes over the network.
        seconds: on the wire.
        exposed_s: of these, what no computation hides.
    """

    group: str
    kind: str
    inside: float
    between: float
    seconds: float
    exposed_s: float

    def plus(self, other: Wire) -> Wire:
        """Both, of the same group and kind."""
        return replace(
            self,
            inside=self.inside + other.inside,
            between=self.between + other.between,
            seconds=self.seconds + other.seconds,
            exposed_s=self.exposed_s + other.exposed_s,
        )

    def exposing(self, part: float) -> Wire:
        """With so much of its time exposed."""
        return replace(self, exposed_s=self.exposed_s * part)

    def times(self, count: float) -> Wire:
        """So many of them."""
        return replace(
            self,
            inside=self.inside * count,
            between=self.between * count,
            seconds=self.seconds * count,
            exposed_s=self.exposed_s * count,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """One pipeline stage, for a micro-batch.

    Attributes:
        forward_s: all of it.
        backward_s: all of it, recomputation included.
        ops: computation by kind: attention, mamba, mlp, shared expert, router, permute, experts, embedding, output.
        exposed_s: communication that the stage waits for, by group, forward and backward together.
    """

    forward_s: float
    backward_s: float
    ops: Mapping[str, OpTime]
    exposed_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTime:
    """One kind of span, as the project's solver sees it.

    Attributes:
        span: what runs.
        count: how many of them the model has.
        costs: by number of chunks.
        solution: the chosen plan, its predicted time and hidden share.
        sequential_s: time of the same passes with every collective waited for.
        limit_s: what no schedule beats.
    """

    span: Span
    count: int
    costs: Mapping[int, SpanCosts]
    solution: Solution
    sequential_s: float
    limit_s: float

    @property
    def shape(self) -> SpanShape:
        """Ops and calls."""
        return self.span.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A step's time.

    Attributes:
        step_s: the step.
        parts: what it is made of, by name, on the slowest stage; the sum is ``step_s``. Computation by kind of op,
            ``exposed <group>`` communication, ``pipeline bubble``, ``optimizer``.
        stages: of the pipeline.
        wires: what is sent.
        spans: where experts run beside dense ops.
        tokens_per_s: of one GPU.
        model_flops: FLOP/s of one GPU that the model needs (Megatron's count: no recomputation, half of causal scores).
        a2a_s: seconds of the all-to-all on the slowest stage in a step, hidden or not.
    """

    step_s: float
    parts: Mapping[str, float]
    stages: tuple[StageTime, ...]
    wires: tuple[Wire, ...]
    spans: tuple[SpanTime, ...]
    tokens_per_s: float
    model_flops: float
    a2a_s: float

    @property
    def a2a_share(self) -> float:
        """Of the step, the all-to-all's seconds, hidden or not."""
        return self.a2a_s / self.step_s
