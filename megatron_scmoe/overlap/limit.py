"""What no schedule of a group's ops beats, by which every plan is judged. Pure, standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from megatron_scmoe.contracts import GroupShape
from megatron_scmoe.overlap.solver import GroupCosts, PassCosts


def limit_s(shape: GroupShape, costs: GroupCosts, *, forward_only: bool = False) -> float:
    """What no schedule of these ops on two lanes beats, whatever its chunks and wherever its experts run.

    Only the work of the flights may be cut, as finely as one likes; an op of the dense stream is one piece. Cutting
    makes no op cheaper in all. :func:`_pass_limit_s` says why nothing is faster. A schedule of the backward pass, read
    from its end, is one of the forward pass with backward's costs, and so both have the same limit.

    Args:
        shape: the group.
        costs: what the group costs uncut, at one chunk.
        forward_only: leave backward out.
    """
    forward_s = _pass_limit_s(shape, costs.forward)
    return forward_s if forward_only else costs.training_s(forward_s, _pass_limit_s(shape, costs.backward))


def _pass_limit_s(shape: GroupShape, costs: PassCosts) -> float:
    """Limit of one pass: the head, the longest of the bounds below, and the tail.

    The head is the dense ops before the tap and the route. No flight starts before its end, and the tail waits for all.
    The ops behind the tap follow; dgmoe's second route is the last of them, and all of the second flight is behind it.
    Between head and tail

    * the compute lane has the ops behind the tap and all encoding, experts and decoding to do;
    * the communication lane has all dispatches and combines to carry;
    * and in dgmoe the second flight is carried after all ops behind the tap.

    * Each op behind the tap splits time in two: some part X of the (first) flight's tokens have passed their experts
      when it starts. They were dispatched by then, and encoded and computed beside the ops before this one. The rest
      passes its experts, is combined and decoded when the op has ended, as does all of a second flight. So each lane
      bounds the time before the op and the time behind it by a linear function of X, and the op costs at least the
      smallest sum over X. This is why a single long op cannot hide dispatch and combine both.
    """
    flights = 2 if shape.second_gate else 1
    flight_compute = costs.encode + costs.experts + costs.decode
    flight_communication = costs.dispatch + costs.combine
    second_compute, second_communication = flight_compute * (flights - 1), flight_communication * (flights - 1)
    ops = [*costs.dense[shape.tap :], *([costs.route] if shape.second_gate else [])]

    bounds = [sum(ops) + flights * flight_compute, flights * flight_communication]
    if shape.second_gate:
        bounds.append(sum(ops) + flight_communication)
    for index, op in enumerate(ops):
        ops_before, ops_behind = sum(ops[:index]), sum(ops[index + 1 :])
        before = [(ops_before, costs.encode + costs.experts), (0.0, costs.dispatch)]
        rest_compute = costs.experts + costs.decode
        behind = [
            (ops_behind + second_compute + rest_compute, -rest_compute),
            (second_communication + costs.combine, -costs.combine),
            (ops_behind + second_communication, 0.0),
        ]
        sums = [(a + c, b + d) for a, b in before for c, d in behind]
        bounds.append(op + _lowest_maximum(sums))
    return sum(costs.dense[: shape.tap]) + costs.route + max(bounds) + costs.tail


def _lowest_maximum(lines: Sequence[tuple[float, float]]) -> float:
    """Smallest value over X in [0, 1] of the largest of the lines ``a + b X``: at an end or where two of them cross."""
    crossings = [(c - a) / (b - d) for (a, b), (c, d) in combinations(lines, 2) if b != d]
    candidates = [0.0, 1.0, *(x for x in crossings if 0 < x < 1)]
    return min(max(a + b * x for a, b in lines) for x in candidates)
