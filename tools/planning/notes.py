"""Figures in what docs/planner.md says of published steps, computed."""

from __future__ import annotations

from collections.abc import Sequence

from planning.counts import model_flops
from planning.fit import SPREAD
from planning.judging import Judged
from planning.published import steps

AGREED = 0.015
"""Model FLOP of a token that differ by less agree with a table."""


def of_published(figures: Sequence[Judged]) -> dict[str, str]:
    """By name, what the note of published steps has in the place of names."""
    return {
        "steps": str(len(figures)),
        "families": str(len({figure.group for figure in figures})),
        "shared": str(len(SPREAD)),
        "agreed": f"{AGREED:.1%}",
        "otherwise": "; ".join(f"{family} {words}" for family, words in otherwise_counted().items()),
    }


def otherwise_counted() -> dict[str, str]:
    """Families whose tables count other model FLOP of a token than their shapes have, with what these have more."""
    errors: dict[str, list[float]] = {}
    for step in steps():
        found = model_flops(step.workload) / (step.workload.global_batch * step.workload.seq_length)
        errors.setdefault(step.family, []).append(found / step.flops - 1)
    return {
        family: " to ".join(dict.fromkeys(f"{error:+.1%}" for error in (min(its), max(its))))
        for family, its in errors.items()
        if max(map(abs, its)) > AGREED
    }
