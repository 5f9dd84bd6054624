"""What travels to experts and back: how many rows, and how many bytes each. The one place that says it."""

from __future__ import annotations

from math import ceil

from megatron_scmoe.contracts import TransferName
from planning.training import Training
from planning.workload import Moe

BF16 = 2
FP8_BLOCK = 128
"""Values that share a scale, whose exponent is a byte (``codec/rounding.py``)."""


def travelling(op: Moe, tokens: float, training: Training) -> float:
    """Rows that ``tokens`` of one rank make, those for its own experts included."""
    if op.once is not None:  # what only fills an expert up does not travel
        return tokens * op.top_k * op.sent * op.once
    return tokens * op.top_k * op.sent * training.expert_rows


def computed(op: Moe, tokens: float, training: Training) -> float:
    """Rows that experts compute for them."""
    return tokens * op.top_k * op.sent * training.expert_rows


def nbytes(op: Moe, hidden: int, transfer: TransferName) -> float:
    """Of one row between expert-parallel ranks."""
    return (values(op, hidden, transfer) + _beside(op, transfer)) * op.carried


def nbytes_gathered(op: Moe, hidden: int, transfer: TransferName) -> float:
    """Of one row between expert-tensor-parallel ranks, which have it as it was before it was rounded."""
    return ((op.latent or hidden) * BF16 + _beside(op, transfer)) * op.carried


def values(op: Moe, hidden: int, transfer: TransferName) -> float:
    """Bytes of a row's values alone: in 16 bits, or in 8 with their scales' exponents."""
    width = op.latent or hidden
    return width + ceil(width / FP8_BLOCK) if transfer in op.rounded else width * BF16


def _beside(op: Moe, transfer: TransferName) -> float:
    beside = {TransferName.DISPATCH_FORWARD: op.beside, TransferName.DISPATCH_BACKWARD: op.beside_back}
    return beside.get(transfer, 0.0)
