"""docs/planner.md: each goal with its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from planning.judging import Goal, Judged, middle_error
from planning.notes import of_published

HEAD = """\
# How near the planner comes

Written by `tools/planning/check.py`; do not edit. What the planner predicts beside what others published and what this
project measured. Nothing here ran on a GPU of ours.

"""
NOTES = {
    "published steps": """\
{steps} steps of {families} families of models from NVIDIA's tables of Megatron-Bridge
(`tools/planning/published_steps.csv`; settings that the tables leave out are those of the recipes of each release,
`published_settings.csv`). Each family is predicted by constants that were fitted without it: {shared} that all share,
one factor for each GPU and one for each release (`tools/planning/fit.py`). Model FLOP of a token agree with the
published ones to {agreed}, but for {otherwise}.

Only constants were held out: which kernels there are, what is expected of them and how settings are read was settled
while these errors were seen. Fitted constants stand for what is left out, too: a `memory` far below what kernels reach
alone and a `link` near its peak say that passes over memory are counted too low and exchanges too high. What is farther
off: GPT-OSS (the clamps of its activation, kernels of their own, are left out; 26.06.01 is a regression by the source's
own footnote), Qwen3-30B on H100 with micro-batches interleaved (the host is slower than the model has it), its first
release with dropped tokens, Nemotron 3 Nano on H100 (recomputation), DeepSeek-V4 (hyper-connections and the indexer
are left out).
""",
    "one layer on H100": """\
Megatron-LM's own functional test, at d98e8a64: one MoE layer on eight H100, nothing beside it: experts without a gate,
no shared expert, whatever models it is named for (`tools/planning/layers.py` says what runs, with its sources). Nothing
was fitted to these. Constants are those of kernels alone (`Constants()` in `tools/planning/hardware.py`: four fifths of
each peak). What is missing is much the same for all dispatchers; forward the host waits for the counts in the midst of
the layer, and what it launches then is not hidden behind anything, which the model of time leaves out. Products in 8
bits have the rate that is published for large ones; for most others the same source promises less.
""",
    "ScMoE's speed-ups": """\
arXiv 2404.05019. The paper gives no rate of a link and no batch of its language models: links have the rate at which
the all-to-all has the part of the top-2 layer's time that the paper states, and a GPU computes four sequences.
Nothing was fitted to the speed-ups. The paper says neither which precision nor what of Tutel's gate and encoding was
timed; what x% faster means in figure 8 is taken from beside table 1. Below is what the published speed-ups ask for by
arithmetic alone: where that is more than the stated part of the MoE layers' time can be, what was hidden is more than
the all-to-all, and no model of the stated all-to-all gives it.
""",
    "arms on the slow link": """\
Arms of `tools/ablate_overlap.py` whose result is kept (the folders of docs/results): the solver's schedule on measured
ops, beside the median of the timed steps. What ops cost is the median of three recorded steps in which everything waits
for everything, at each number of chunks that the plan could have; the timed steps are others, later, without marks, and
overlapped. Megatron's own layers make no marks: theirs are the ops of our layer in their place. Sending costs the
rank's own core, which the schedule leaves to the dense ops.
""",
}


class Section(NamedTuple):
    """One goal with its figures.

    Attributes:
        goal: what is wanted.
        figures: what is found.
        causes: of what is missed, in words and figures.
    """

    goal: Goal
    figures: tuple[Judged, ...]
    causes: tuple[str, ...] = ()


def page(sections: Sequence[Section], constants: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The whole page."""
    parts = [HEAD, _summary(sections)]
    for section in sections:
        parts += [f"\n## {_heading(section.goal.name)}\n\n", _note(section), "\n"]
        parts += [f"* {cause}\n" for cause in section.causes] + ["\n"] * bool(section.causes)
        parts += [_groups(section), "\n", _figures(section)]
    return "".join([*parts, "\n## Constants\n\n", _constants(constants)])


def _note(section: Section) -> str:
    note = NOTES[section.goal.name]
    return note.format(**of_published(section.figures)) if section.goal.name == "published steps" else note


def _summary(sections: Sequence[Section]) -> str:
    lines = ["| what | goal | found | |\n|---|---|---|---|\n"]
    for goal, figures, _ in sections:
        wanted = f"{_words(goal.part)} within {goal.each:.0%}"
        found = f"{goal.within(figures)} of {len(figures)} within {goal.each:.0%}, median {middle_error(figures):.1%}"
        if goal.middle is not None:
            wanted += f", median at most {goal.middle:.0%}"
        verdict = "met" if goal.met(figures) else "**missed**"
        lines.append(f"| {goal.name} | {wanted} | {found} | {verdict} |\n")
    return "".join(lines)


def _heading(name: str) -> str:
    return name[0].upper() + name[1:]


def _words(part: float) -> str:
    return "all" if part == 1 else f"{part:.0%}"


def _groups(section: Section) -> str:
    lines = [f"| | figures | median error | within {section.goal.each:.0%} |\n|---|---|---|---|\n"]
    for name in dict.fromkeys(figure.group for figure in section.figures):
        own = [figure for figure in section.figures if figure.group == name]
        lines.append(f"| {name} | {len(own)} | {middle_error(own):.1%} | {section.goal.within(own)} |\n")
    return "".join(lines)


def _figures(section: Section) -> str:
    unit = section.goal.unit
    lines = [f"| | measured ({unit}) | predicted ({unit}) | error |\n|---|---|---|---|\n"]
    lines += [
        f"| {one.what} | {one.measured:.4g} | {one.predicted:.4g} | {one.error:+.0%} |\n" for one in section.figures
    ]
    return "".join(lines)


def _constants(constants: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    names = list(next(iter(next(iter(constants.values())).values())))
    lines = [f"| GPU | release | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}\n"]
    for gpu, releases in constants.items():
        for release, values in releases.items():
            cells = (f"{values[name] * 1e6:.2f} us" if name.endswith("_s") else f"{values[name]:.2f}" for name in names)
            lines.append(f"| {gpu} | {release} | {' | '.join(cells)} |\n")
    return "".join(lines)
