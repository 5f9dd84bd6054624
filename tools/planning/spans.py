"""What a span takes: costs of its ops for the project's solver, which says where experts run, and how long it is."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_scmoe.config.overlap import Overlap
from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.limit import limit_s
from megatron_scmoe.overlap.plan import even_plan, sequential_plan
from megatron_scmoe.overlap.solver import (
    CallCosts,
    PassCosts,
    Solution,
    SpanCosts,
    predicted_hidden_share,
    predicted_s,
    schedule,
    solve,
)
from planning.kernels import Kernel
from planning.passes import Passes, Pricing
from planning.prediction import SpanTime
from planning.workload import Moe, Span

_OF_PART = {"route": "route", "encode": "encode", "decode": "decode"}
"""Cost of a call to which a kernel belongs, by its part; what is left are its experts."""


class SpanPricing:
    """Spans of one workload on one machine.

    Args:
        pricing: of ops.
    """

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self._forward_only = pricing.forward_only

    def time(self, span: Span, count: int) -> SpanTime:
        """The span under the plan that it would get.

        Args:
            span: what runs.
            count: how many of them the model has.
        """
        counts = span.chunks if span.plan is None else (span.plan.chunks,)
        costs = {chunks: self.costs(span, chunks) for chunks in counts}
        solution = self._solution(span, costs)
        whole = costs[1] if 1 in costs else self.costs(span, 1)
        return SpanTime(
            span=span,
            count=count,
            costs=costs,
            solution=solution,
            sequential_s=predicted_s(span.shape, whole, sequential_plan(span.shape), forward_only=self._forward_only),
            limit_s=limit_s(span.shape, whole, forward_only=self._forward_only),
        )

    def costs(self, span: Span, chunks: int) -> SpanCosts:
        """Of one span at one number of chunks."""
        ops = [self._pricing.op_once(op) for op in span.ops]
        calls = [self._call(call, chunks) for call in span.calls]
        forward, backward = (
            PassCosts(
                ops=tuple(sum(getattr(op, way).values()) for op in ops), calls=tuple(call[number] for call in calls)
            )
            for number, way in enumerate(("forward", "backward"))
        )
        return SpanCosts(forward=forward, backward=backward, forward_runs=1 + self._pricing.runs_again)

    def passes(self, time: SpanTime) -> Passes:
        """Forward and backward under the chosen plan, which holds for what full recomputation runs again, too."""
        passes = self._played(time)
        if self._pricing.runs_again:
            passes.again(SpanPricing(self._pricing.forward)._played(time), self._pricing.runs_again)
        return passes

    def _played(self, time: SpanTime) -> Passes:
        """The passes of a span once: what computes by kind, and the rest as exposed communication."""
        span, plan = time.span, time.solution.plan
        passes = Passes()
        for op in span.ops:
            passes.add(self._pricing.op_once(op))
        for call in span.calls:
            for name, part in self._parts(call, plan.chunks).items():
                passes.add(part, 1 if name == "route" else plan.chunks)
        costs = time.costs[plan.chunks]
        ends = []
        for seconds, its in ((passes.forward, costs.forward), (passes.backward, costs.backward)):
            if seconds is passes.backward and self._forward_only:
                continue
            played = schedule(span.shape, its, plan, backward=seconds is passes.backward)
            ends.append(max(one.end_s for one in played))
            seconds["exposed EP"] += max(0.0, ends[-1] - sum(seconds.values()))
        self._wires(span, passes)
        return passes

    def _solution(self, span: Span, costs: Mapping[int, SpanCosts]) -> Solution:
        if span.overlap is Overlap.ADAPTIVE and span.plan is None:
            return solve(span.shape, costs, forward_only=self._forward_only)
        chunks = min(costs)
        plan = span.plan or even_plan(span.shape, chunks)
        if span.overlap is Overlap.OFF:
            plan = Plan(((1,) * chunks,) * len(span.calls), blocking=True)
        told = {"forward_only": self._forward_only}
        return Solution(
            plan,
            predicted_s(span.shape, costs[chunks], plan, **told),
            predicted_hidden_share(span.shape, costs[chunks], plan, **told),
            exact=True,
        )

    def _parts(self, call: Moe, chunks: int) -> dict[str, Passes]:
        """What a call computes by cost of the solver's: routing all tokens, and the rest of one chunk."""
        ops = self._pricing.ops
        parts: dict[str, list[Kernel]] = {"route": [], "encode": [], "experts": [], "decode": []}
        for kernel in (ops.route(call), *ops.flight(call, chunks)):
            parts[_OF_PART.get(kernel.part, "experts")].append(kernel)
        return {name: self._pricing.computing(its) for name, its in parts.items()}

    def _call(self, call: Moe, chunks: int) -> tuple[CallCosts, CallCosts]:
        """Costs of one call, forward and backward."""
        ops, groups = self._pricing.ops, self._pricing.groups
        flights = groups.flights(call, ops.own_tokens / chunks, self._pricing.recomputes_experts())
        priced = self._parts(call, chunks)
        forward = {name: sum(its.forward.values()) for name, its in priced.items()}
        backward = {name: sum(its.backward.values()) for name, its in priced.items()}
        there, back = ({kind: sent[way].seconds for kind, sent in flights.items()} for way in (0, 1))
        return CallCosts(**forward, **there), CallCosts(**backward, **back)

    def _wires(self, span: Span, passes: Passes) -> None:
        ops, groups = self._pricing.ops, self._pricing.groups
        exposed_s = passes.forward["exposed EP"] + passes.backward["exposed EP"]
        sent = [
            (kind, forward if self._forward_only else forward.then(backward))
            for call in span.calls
            for kind, (forward, backward) in groups.flights(
                call, ops.own_tokens, self._pricing.recomputes_experts()
            ).items()
        ]
        total_s = sum(one.seconds for _, one in sent)
        for kind, one in sent:
            passes.wire("EP", kind, one, exposed_s * one.seconds / total_s if total_s else 0.0)
