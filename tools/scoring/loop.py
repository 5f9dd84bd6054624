"""Going through files, window by window, on every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import torch
from checkpoints.running.scores import Model
from numpy.typing import NDArray
from preprocessing.sources import shown
from progress import Advance, progress

from scoring import output
from scoring.inputs import Tokens
from scoring.windows import Window, batches, plan


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def score_files(
    model: Model, files: Sequence[Tokens], folder: Path, *, length: int, stride: int, size: int, columns: int
) -> list[NDArray[numpy.float32]]:
    """Score every file into a folder; every rank calls it. Returns the loss of every token of each file.

    The first rank writes losses; logits are written by all that have some, unless ``columns`` of them is 0. ``size``
    windows are in a micro-batch; they are those of ``windows.plan``.
    """
    results = []
    for number, tokens in enumerate(files):
        windows = plan(tokens.offsets, length, stride)
        path = folder / output.file_name(number, tokens, "logits.npy")
        if columns and is_first_rank():
            array = numpy.lib.format.open_memmap(path, "w+", numpy.float32, (len(tokens.ids), columns))
            array[tokens.offsets[:-1]] = numpy.nan
            del array
        model.shared(None)  # the file is there before anyone opens it
        logits = numpy.load(path, mmap_mode="r+") if columns and model.collects else None
        bar: AbstractContextManager[Advance] = contextlib.nullcontext(lambda _count: None)
        if is_first_rank():
            label = f"{number + 1} of {len(files)}: {shown(Path(tokens.name).name)}"
            bar = progress(label, sum(window.length for window in windows), in_bytes=False)
        with bar as advance:
            rows = min(size, len(windows))  # those without a window would be padding, and memory
            losses = _score_file(
                model, tokens, windows, size=rows, with_logits=columns > 0, logits=logits, advance=advance
            )
        if is_first_rank():
            output.write_losses(folder / output.file_name(number, tokens, "losses.npz"), tokens, losses, windows)
        results.append(losses)
    return results


def _score_file(
    model: Model, tokens: Tokens, windows: list[Window], *, size: int, with_logits: bool, logits: Any, advance: Advance
) -> NDArray[numpy.float32]:
    """The loss of every token, NaN for the first of each document.

    ``logits`` is an array to write them into, [tokens, vocabulary]; None where this rank has none, though others may.
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
