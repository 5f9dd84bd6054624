"""Going through files, window by window, on every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from checkpoints.running.model import Model
from numpy.typing import NDArray
from preprocessing.sources import shown
from progress import Advance, progress

from scoring import output
from scoring.inputs import Tokens
from scoring.windows import Window, batches, plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Windowing:
    """How files are cut into windows.

    Attributes:
        length: tokens that a model reads at once.
        stride: tokens between the begins of two windows.
        size: windows in a micro-batch.
    """

    length: int
    stride: int
    size: int


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def score_files(
    model: Model, files: Sequence[Tokens], folder: Path, *, windowing: Windowing, columns: int
) -> list[NDArray[numpy.float32]]:
    """Score every file into a folder; every rank calls it.

    Args:
        model: this rank's part.
        files: to score.
        folder: for losses, which the first rank writes, and logits, which all write that have some.
        windowing: of each file.
        columns: of logits; 0: none are written.

    Returns:
        The loss of every token of each file.
    """
    results = []
    for number, tokens in enumerate(files):
        windows = plan(tokens.offsets, windowing.length, windowing.stride)
        path = folder / output.file_name(number, tokens, "logits.npy")
        if columns and is_first_rank():
            array = numpy.lib.format.open_memmap(path, "w+", numpy.float32, (len(tokens.ids), columns))
            array[tokens.offsets[:-1]] = numpy.nan
            del array
        model.shared(None)  # the file is there before anyone opens it
        logits = numpy.load(path, mmap_mode="r+") if columns and model.collects else None
        label = f"{number + 1} of {len(files)}: {shown(Path(tokens.name).name)}"
        with _progress(label, sum(window.length for window in windows)) as advance:
            losses = _score_file(
                model, tokens, windows, size=windowing.size, with_logits=columns > 0, logits=logits, advance=advance
            )
        if is_first_rank():
            output.write_losses(folder / output.file_name(number, tokens, "losses.npz"), tokens, losses, windows)
        results.append(losses)
    return results


def _progress(label: str, num_tokens: int) -> AbstractContextManager[Advance]:
    if not is_first_rank():
        return contextlib.nullcontext(lambda _count: None)
    return progress(label, num_tokens, in_bytes=False)


def _score_file(
    model: Model, tokens: Tokens, windows: list[Window], *, size: int, with_logits: bool, logits: Any, advance: Advance
) -> NDArray[numpy.float32]:
    """The loss of every token, NaN for the first of each document.

    Args:
        model: this rank's part.
        tokens: of the file.
        windows: over it.
        size: windows of a micro-batch.
        with_logits: whether any rank writes logits.
        logits: an array to write them into, [tokens, vocabulary]; None where this rank has none.
        advance: is told how many more tokens are done.
    """
    losses = torch.zeros(len(tokens.ids))
    for batch in batches(
        tokens.ids,
        windows,
        micro_batches=model.micro_batches,
        size=size,
        data_rank=model.data_rank,
        data_size=model.data_size,
        multiple=model.length_multiple,
    ):
        scores = model.score(batch.tokens, batch.labels, with_logits=with_logits)
        for micro_batch, row, (begin, first, end) in batch.windows if scores else ():
            its, place = scores[micro_batch], slice(first - begin - 1, end - begin - 1)
            losses[first:end] = its.losses[row, place]
            if logits is not None and its.logits is not None:
                logits[first:end] = its.logits[row, place].numpy()
        advance(batch.length)
    if logits is not None:
        logits.flush()
    result = model.summed(losses).numpy()  # when it is there, all ranks have written their logits
    result[tokens.offsets[:-1]] = numpy.nan
    return result
