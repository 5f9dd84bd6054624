"""What a launch of a call's dispatches costs: before the op at its tap, within or behind it. Standard library only.

Before a call's first launch the host waits for its counts, and on a GPU the compute lane has nothing to do (*wait*). Or
the host enqueues the op at the tap first, which takes it a while (*enqueue*): then the lane is busy, but dispatches are
launched that much later, and what comes behind that op is enqueued when they are::

    host                 | wait | enqueue op 0                    | enqueue op 0 | wait |
    compute       encode |      | op 0 .............       encode | op 0 .............
    communication               | dispatch                                              | dispatch

An attention may be enqueued up to its core attention alone, which then comes behind the launch. Where an op takes the
host as long as the lane, as on a CPU, nothing is won.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_scmoe.contracts import Launch, SpanShape

if TYPE_CHECKING:
    from megatron_scmoe.overlap.solver import PassCosts

ONCE = ("route", "wait", "enqueue", "enqueue_core")
"""Costs of a call that do not depend on the number of its chunks."""


def launched_s(costs: PassCosts, shape: SpanShape, launch: Launch) -> dict[int, float]:
    """From the begin of the op at its tap to the launch of each call that is not launched before the op, in seconds."""
    aside = shape.launched_aside(launch)
    return {number: _enqueue_s(costs, number, launch) + costs.calls[number].wait for number in aside}


def with_launches(costs: PassCosts, shape: SpanShape, launch: Launch) -> PassCosts:
    """Costs of a forward pass, in whose ops and routes are those of its launches.

    Args:
        costs: of the pass.
        shape: of the span.
        launch: where dispatches are launched, where that can be.
    """
    aside = launched_s(costs, shape, launch)
    ops, calls = list(costs.ops), list(costs.calls)
    for number, call in enumerate(costs.calls):
        if number in aside:
            tap = shape.calls[number].tap
            ops[tap] += max(0.0, aside[number] - _busy_s(costs, tap, launch))
        else:
            calls[number] = replace(call, route=call.route + call.wait)
    return replace(costs, ops=tuple(ops), calls=tuple(calls))


def gained_s(costs: PassCosts, shape: SpanShape, launch: Launch) -> float:
    """What launches aside win at most in a forward pass: waits, as far as the compute lane is busy meanwhile."""
    gains = []
    for number in shape.launched_aside(launch):
        ahead_s = _busy_s(costs, shape.calls[number].tap, launch) - _enqueue_s(costs, number, launch)
        gains.append(min(costs.calls[number].wait, ahead_s))
    return sum(max(0.0, gain) for gain in gains)


def _busy_s(costs: PassCosts, tap: int, launch: Launch) -> float:
    """For how long what is enqueued before a launch aside keeps the compute lane busy."""
    return costs.ops[tap] - (costs.cores.get(tap, 0.0) if launch is Launch.WITHIN else 0.0)


def _enqueue_s(costs: PassCosts, number: int, launch: Launch) -> float:
    """What the host takes to enqueue that."""
    call = costs.calls[number]
    return call.enqueue - (call.enqueue_core if launch is Launch.WITHIN else 0.0)
