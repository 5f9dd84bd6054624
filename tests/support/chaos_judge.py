"""What a training that was struck may not do: lose a checkpoint, continue with another loss, leave processes behind."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from obstacles import KILLS, STOP

NOTHING = "nothing"
"""The obstacle of a job that came to its end."""


@dataclass(kw_only=True)
class Run:
    """One job of a training.

    Attributes:
        number: from 1.
        way: in which it wrote checkpoints.
        promised: newest step whose checkpoint was whole before it; 0 for none.
        began_from: the step that it continued from; None where it did not come so far.
        losses: its steps and their losses, as hexadecimal floats.
        kind: of obstacle, or ``NOTHING``.
        moment: in which the obstacle struck: in a step or a save.
        words: what was done.
        exit_code: of torchrun; None where it had to be killed.
        seconds: from the strike to the end of the last process.
        orphans: processes that did not end.
        damage: what the job said of a damaged checkpoint, or nothing.
        hang: what it said of a hang, or nothing.
        repeated: steps that it did again.
        log: its name.
    """

    number: int
    way: str = "sync"
    promised: int = 0
    began_from: int | None = None
    losses: list[tuple[int, str]] = field(default_factory=list)
    kind: str = NOTHING
    moment: str = ""
    words: str = ""
    exit_code: int | None = 0
    seconds: float = 0.0
    orphans: list[str] = field(default_factory=list)
    damage: str = ""
    hang: str = ""
    repeated: int = 0
    log: str = ""


def written(said: set[int], before: int | None, after: int | None) -> set[int]:
    """Steps whose checkpoints a job has written: those that it ``said``, and what Megatron's tracker names behind it.

    A job may be killed between the two. A tracker that names the same as ``before`` may do so since another job, whose
    checkpoint has been damaged.
    """
    return said | ({after} if after is not None and after != before else set())


def faults(run: Run, truth: Mapping[int, str]) -> list[str]:
    """What is wrong with a run.

    Args:
        run: which has ended.
        truth: the losses of the uninterrupted training.
    """
    found = [f"a process stayed: {command}" for command in run.orphans]
    if run.began_from is None:
        return [*found, f"it did not start: exit code {run.exit_code}"]
    if run.began_from < run.promised:
        found.append(f"a checkpoint was lost: {run.promised} was whole, and it continued from {run.began_from}")
    steps = [step for step, _ in run.losses]
    if steps != list(range(run.began_from + 1, run.began_from + 1 + len(steps))):
        found.append(f"its steps are {steps} and it continued from {run.began_from}")
    found += [
        f"the loss of step {step} is {loss} and was {truth.get(step)}"
        for step, loss in run.losses
        if loss != truth.get(step)
    ]
    if run.kind == NOTHING:
        if run.exit_code != 0:
            found.append(f"it ended by itself: exit code {run.exit_code}")
        elif steps and steps[-1] != max(truth):
            found.append(f"it ended with step {steps[-1]} of {max(truth)}")
        return found
    if run.exit_code is None:
        found.append(f"it did not end: {run.words}")
    if run.kind == STOP and not re.search(rf"hang: {run.words.split(' of ')[-1]}: ", run.hang):
        found.append(f"the hang has no line that names it: {run.words}, {run.hang!r}")
    return found


def summary(runs: Sequence[Run], found: Iterable[str], seconds: float) -> dict[str, Any]:
    """Figures of a campaign; ``found``: what ``faults`` said of all ``runs``."""
    struck = [run for run in runs if run.kind != NOTHING]
    faulty = list(found)
    counts = Counter((run.kind, run.moment) for run in struck)
    return {
        "kills": sum(run.kind in KILLS for run in struck),
        "obstacles": {f"{kind}, in a {moment}": count for (kind, moment), count in sorted(counts.items())},
        "seconds from strike to end, median and longest": {
            kind: _median_and_longest([run.seconds for run in struck if f"{run.kind}, in a {run.moment}" == kind])
            for kind in (f"{kind}, in a {moment}" for kind, moment in sorted(counts))
        },
        "jobs": len(runs),
        "jobs by way of saving": dict(Counter(run.way for run in runs)),
        "jobs that continued from a checkpoint": sum(bool(run.began_from) for run in runs),
        "damaged checkpoints replaced by an older whole one": sum(bool(run.damage) for run in runs),
        "losses compared": sum(len(run.losses) for run in runs),
        "steps repeated": sum(run.repeated for run in runs),
        "checkpoints lost": sum("a checkpoint was lost" in one for one in faulty),
        "losses that differ": sum("the loss of step" in one for one in faulty),
        "processes that stayed": sum("a process stayed" in one for one in faulty),
        "faults": faulty,
        "minutes": round(seconds / 60, 1),
    }


def _median_and_longest(seconds: list[float]) -> list[float]:
    return [round(statistics.median(seconds), 1), round(max(seconds), 1)]


def in_markdown(figures: Mapping[str, Any]) -> str:
    """A list of ``summary``, nested where it is."""
    lines = []
    for name, value in figures.items():
        nested = value.items() if isinstance(value, Mapping) else ()
        lines.append(f"* {name}:" + ("" if nested else f" {value}"))
        lines += [f"    * {key}: {one}" for key, one in nested]
    return "\n".join(lines) + "\n"
