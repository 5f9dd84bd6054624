#!/usr/bin/env python3
"""Write docs/refused.md, Megatron's flags that are refused, from the refusals' tables; a test compares both."""

from __future__ import annotations

from pathlib import Path

from megatron_scmoe.training import refused_flags, unread_flags

DOCUMENT = Path(__file__).resolve().parent / "refused.md"
HEAD = """\
# Megatron's flags that are refused

Written by `make docs` from the package's refusals; do not edit. These are the flags that are refused whatever
else is set; where no allowed value is named, leave the flag out. Rules that join several settings are in
`docs/parallelism.md` (recomputation, stages of a pipeline, parallelism, formats of optimizer checkpoints) or in the
errors alone (what a shortcut asks for, such as `--disable-bias-linear` and a shared expert; which balancing goes with
which router): each says the rule, the values and the fix.
"""
SECTIONS = {
    "Always": refused_flags.HOOK_REFUSALS,
    "With `--shortcut scmoe` or `dgmoe`": refused_flags.REFUSALS,
    "With `--shortcut dgmoe`, also": refused_flags.TWO_GATES_REFUSALS,
    "With `--router longcat`, also": refused_flags.LONGCAT_REFUSALS,
    "With `--shortcut none` and `--overlap-chunks` above 1, `--a2a-codec` or `--a2a-unique rank`": (
        refused_flags.PIPELINED_REFUSALS
    ),
    "With `--a2a-codec lsh`, also": refused_flags.CODEC_REFUSALS,
}


def document() -> str:
    """A table for each section: flag, values that are allowed (none but the default for nothing), why."""
    parts = [HEAD]
    for title, rules in SECTIONS.items():
        rows = [f"| `{rule.flag}` | {_allowed(rule)} | {rule.reason} |" for rule in rules]
        parts.append("\n".join([f"## {title}\n", "| flag | allowed values | why |", "|---|---|---|", *rows, ""]))
    return "\n".join([*parts, _without_effect()])


def _without_effect() -> str:
    programs = ", ".join(unread_flags.OTHER_PROGRAMS.values())
    kept = ", ".join(f"`{flag}`" for flag in unread_flags.READ_ALL_THE_SAME.values())
    rows = [f"| `--{name.replace('_', '-')}` | {reason} |" for name, reason in unread_flags.LEFTOVERS.items()]
    head = (
        "## Without effect\n\nMegatron's parser takes the flags of other programs, which its wheel lacks: all flags\n"
        f"of its groups for {programs} (but for {kept}).\n"
        "They are refused where they are not at their default, as are\n"
    )
    begins = {f"--{begin.replace('_', '-')}...": why for begin, (_, why) in unread_flags.OF_REFUSED.items()}
    rows += [f"| `{begin}` | {why} |" for begin, why in begins.items()]
    tail = ["", "and, without another flag,", "", "| flag | without |", "|---|---|"]
    tail += [
        f"| `--{name.replace('_', '-')}` | `{one.needed}` |" for one in unread_flags.COMPANIONS for name in one.names
    ]
    return "\n".join([head, "| flag | why |", "|---|---|", *rows, *tail, ""])


def _allowed(rule: refused_flags.Refusal) -> str:
    values = [f"`{value}`" for value in rule.allowed if value not in (None, False)]
    return ", ".join(values)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"wrote {DOCUMENT}")
