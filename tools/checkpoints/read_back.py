"""Is what was written what was read? For conversions that change no tensor: compared bit for bit, piece by piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.engine import MismatchError
from checkpoints.plan import Conversion
from checkpoints.tensors import Checkpoint, CheckpointError


def compare(conversion: Conversion, source: Checkpoint, folder: Path) -> dict[str, Any]:
    """Compare what is in ``folder`` with what ``source`` becomes: how many tensors it has, and which differ."""
    target = MegatronCheckpoint(folder, as_saved=True)
    differing = dict.fromkeys(conversion.expected.keys() ^ target.infos.keys())
    for piece in () if differing else conversion.pieces:
        rows = target.read(piece.name, piece.row, piece.row + piece.info.num_rows)
        if not _same_bits(piece.make(*(source.read(*read) for read in piece.reads)), rows):
            differing[piece.name] = None
    return {"tensors": len(target.infos), "differing": list(differing), "passed": not differing}


def verify(conversion: Conversion, source: Checkpoint, folder: Path, *, kept: str) -> dict[str, Any]:
    """Figures of ``compare``; raises MismatchError, ending with ``kept``, where a tensor differs or is not readable."""
    try:
        figures = compare(conversion, source, folder)
    except CheckpointError as error:
        raise MismatchError(f"{error}; {kept}") from None
    if not figures["passed"]:
        raise MismatchError(f"{figures['differing'][0]} differs from what was read; {kept}")
    return figures


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """``torch.equal`` for tensors that may have NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))
