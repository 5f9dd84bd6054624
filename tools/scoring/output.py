"""What a scoring run writes: losses and, if asked for, logits of each file, and one summary."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from preprocessing.sources import UserError, shown

from scoring.inputs import Tokens
from scoring.windows import Window

SUMMARY = "summary.json"


def file_name(number: int, tokens: Tokens, kind: str) -> str:
    """Name of a result of file ``number``, such as 000-book.losses.npz."""
    stem = re.sub(r"[^\w-]", "_", Path(tokens.name).stem, flags=re.ASCII)[:60]
    return f"{number:03}-{stem}.{kind}"


def check_room(folder: Path, files: Sequence[Tokens], columns: int) -> int:
    """Bytes that the logits of all files take, as float32; UserError where the disk lacks that room."""
    needed = sum(4 * columns * len(tokens.ids) for tokens in files)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        raise UserError(
            f"--logits: {needed / 1e9:.1f} GB of logits do not fit on the disk of {shown(folder)}, which has "
            f"{free / 1e9:.1f} GB left; score less at a time, or name another --output"
        )
    return needed


def write_losses(path: Path, tokens: Tokens, losses: NDArray[numpy.float32], windows: Sequence[Window]) -> None:
    """Write the arrays of one file.

    ids, losses: of every token; the first of a document has no loss, which is NaN. offsets: where documents begin, and
    the end. windows: begin, first scored and end of each.
    """
    numpy.savez(
        path,
        ids=tokens.ids,
        losses=losses,
        offsets=tokens.offsets,
        windows=numpy.array(windows, dtype=numpy.int64).reshape(-1, 3),
    )


def results(files: Sequence[Tokens], losses: Sequence[NDArray[numpy.float32]]) -> dict[str, Any]:
    """Figures of each file, and of all together."""
    each = [
        {"name": tokens.name, "sha256": tokens.sha256, **_figures([tokens], [its])}
        for tokens, its in zip(files, losses, strict=True)
    ]
    return {"files": each, "total": _figures(files, losses)}


def _figures(files: Sequence[Tokens], losses: Sequence[NDArray[numpy.float32]]) -> dict[str, Any]:
    """Loss and perplexity of files taken together; null where they are not finite, or bytes are unknown."""
    total = sum(float(numpy.nansum(its, dtype=numpy.float64)) for its in losses)
    scored = sum(tokens.num_scored for tokens in files)
    # The first token of a document has no loss; a loss that is missing elsewhere is a fault of the model.
    finite = sum(int(numpy.isfinite(its).sum()) for its in losses)
    sizes = [tokens.num_bytes for tokens in files]
    mean = total / scored if finite == scored else None
    num_bytes = sum(size for size in sizes if size) if None not in sizes else None
    return {
        "documents": sum(len(tokens.offsets) - 1 for tokens in files),
        "tokens": sum(len(tokens.ids) for tokens in files),
        "scored_tokens": scored,
        "not_finite": scored - finite,
        "loss": mean,
        "perplexity": math.exp(mean) if mean is not None and mean < 700 else None,
        "bytes": num_bytes,
        "bits_per_byte": total / math.log(2) / num_bytes if num_bytes and mean is not None else None,
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
