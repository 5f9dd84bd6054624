"""What travels to experts and back: how many rows, and how many bytes each. The one place that says it."""

from __future__ import annotations

from enum import Enum

from planning.workload import Moe, Training

BF16 = 2


class Leg(Enum):
    """One of the four transfers of a routed call, in their order."""

    DISPATCH = "tokens to experts"
    COMBINE = "outputs back"
    COMBINE_BACKWARD = "gradients of outputs to experts"
    DISPATCH_BACKWARD = "gradients of tokens back"


def travelling(op: Moe, tokens: float, training: Training) -> float:
    """Rows that ``tokens`` of one rank make, those for its own experts included."""
    if op.once is not None:  # what only fills an expert up does not travel
        return tokens * op.top_k * op.sent * op.once
    return tokens * op.top_k * op.sent * training.expert_rows


def computed(op: Moe, tokens: float, training: Training) -> float:
    """Rows that experts compute for them."""
    return tokens * op.top_k * op.sent * training.expert_rows


def nbytes(op: Moe, hidden: int, leg: Leg) -> float:
    """Of one row."""
    beside = {Leg.DISPATCH: op.beside, Leg.DISPATCH_BACKWARD: op.beside_back}
    return ((op.latent or hidden) * BF16 + beside.get(leg, 0.0)) * op.carried
