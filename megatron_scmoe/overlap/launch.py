"""What the launch of a call's dispatches costs, before the op at its tap or behind it. Standard library only.

Before a call's first launch the host waits for its counts, and on a GPU the compute lane has nothing to do (*wait*). Or
the host enqueues the op at the tap first, which takes it a while (*enqueue*): then the lane is busy, but dispatches are
launched that much later, and what comes behind that op is enqueued when they are::

    host                 | wait | enqueue op 0                    | enqueue op 0 | wait |
    compute       encode |      | op 0 .............       encode | op 0 .............
    communication               | dispatch                                              | dispatch

Where an op takes the host as long as the lane, as on a CPU, nothing is won.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_scmoe.contracts import SpanShape

if TYPE_CHECKING:
    from megatron_scmoe.overlap.solver import PassCosts

ONCE = ("route", "wait", "enqueue")
"""Costs of a call that do not depend on the number of its chunks."""


def with_launches(costs: PassCosts, shape: SpanShape, behind: Collection[int]) -> PassCosts:
    """Costs of a forward pass, in whose ops and routes are those of its launches.

    Args:
        costs: of the pass.
        shape: of the span.
        behind: numbers of the calls that are launched behind the op at their tap.
    """
    ops, calls = list(costs.ops), list(costs.calls)
    for number, call in enumerate(costs.calls):
        if number in behind:
            tap = shape.calls[number].tap
            ops[tap] = max(ops[tap], call.launched_behind)
        else:
            calls[number] = replace(call, route=call.route + call.wait)
    return replace(costs, ops=tuple(ops), calls=tuple(calls))


def gained_behind_s(costs: PassCosts, shape: SpanShape) -> float:
    """What launches behind ops win at most in a forward pass: waits, as far as the compute lane is busy meanwhile."""
    calls = ((shape.calls[number].tap, costs.calls[number]) for number in shape.may_launch_behind)
    return sum(max(0.0, min(call.wait, costs.ops[tap] - call.enqueue)) for tap, call in calls)
