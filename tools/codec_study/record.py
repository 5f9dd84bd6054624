"""What one run leaves of itself: losses, rate, residual and seconds, read from its TensorBoard scalars and reports."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from codec_study.arms import LOG_EVERY, Run, Settings

LOG = "log.txt"
TOKENS_LOSS = "lm loss validation of tokens"
"""TensorBoard scalar of a run that compresses: loss of the last evaluations with tokens in the place of centroids."""
FINAL_SHARE = 0.1
"""Last part of the steps whose mean rate and residual are the final ones."""

type Curve = list[tuple[int, float]]
"""Steps, and a figure of each."""


def read_run(run: Run, settings: Settings, folder: Path) -> dict[str, Any]:
    """Read the folder of a training that ended well.

    The validation loss of a step is the mean of all evaluations at it: Megatron makes another one, of other sequences,
    when training is over. The loss of tokens is that of the last step with tokens in the place of centroids. A rate is
    that of both MoE layers, rows sent over rows routed; bytes are what the first rank sends to others in a step. The
    settings are those of the study.

    Raises:
        ValueError, KeyError, OSError: where something is missing.
    """
    settings = settings.of(run.arm)
    names = ["lm loss", "lm loss validation", "iteration-time", *([TOKENS_LOSS] if run.arm.compresses else [])]
    scalars = _scalars(folder / "tensorboard", names)
    validation = _by_step(scalars["lm loss validation"])
    if not validation or validation[-1][0] != settings.iterations:
        raise ValueError(f"no validation loss at step {settings.iterations}")
    report = (folder / "report" / "rank00000.jsonl").read_text(encoding="utf-8")
    lines = map(json.loads, report.splitlines())
    groups = [(line["iteration"], line["groups"]) for line in lines if line["groups"]]
    rate = [(step, fmean(row["sent_rate"] for row in rows)) for step, rows in groups]
    residual = [(step, fmean(row["residual"] for row in rows)) for step, rows in groups]
    sent_bytes = [(step, sum(row["sent_bytes"] for row in rows)) for step, rows in groups]
    return {
        "model": run.model,
        "arm": run.arm.name,
        "seed": run.seed,
        "tokens_per_step": settings.tokens(run.model),
        "validation": validation,
        "train": _thinned(_by_step(scalars["lm loss"])),
        "rate": _thinned(rate),
        "residual": _thinned(residual),
        "final_validation": validation[-1][1],
        "final_validation_of_tokens": scalars[TOKENS_LOSS][-1][1] if run.arm.compresses else validation[-1][1],
        "final_rate": _final(rate, settings.iterations),
        "final_residual": _final(residual, settings.iterations),
        "final_bytes": _final(sent_bytes, settings.iterations),
        "seconds_per_step": median(value for _, value in scalars["iteration-time"]),
    }


def steps_done(folder: Path) -> int:
    """How far a training is that still runs, by its log."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20000))
            text = file.read().decode(errors="replace")
    except OSError:
        return 0
    found = re.findall(r"iteration +(\d+)/ *\d+ \|", text)
    return int(found[-1]) if found else 0


def _scalars(folder: Path, names: Iterable[str]) -> dict[str, Curve]:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped] # noqa: PLC0415

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def _by_step(curve: Curve) -> Curve:
    values: dict[int, list[float]] = defaultdict(list)
    for step, value in curve:
        values[step].append(value)
    return [(step, fmean(values[step])) for step in sorted(values)]


def _thinned(curve: Curve) -> Curve:
    """Means of ``LOG_EVERY`` steps, at the last one of them."""
    parts: dict[int, Curve] = defaultdict(list)
    for step, value in curve:
        parts[(step - 1) // LOG_EVERY].append((step, value))
    return [(part[-1][0], fmean(value for _, value in part)) for _, part in sorted(parts.items())]


def _final(curve: Curve, iterations: int) -> float:
    return fmean(value for step, value in curve if step > iterations * (1 - FINAL_SHARE))
