#!/usr/bin/env python3
"""Write the README's table of flags from ``megatron_scmoe.config``; a test compares the two."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_scmoe.training.arguments import add_scmoe_arguments

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- flags: written by docs/flags_table.py -->\n"
END = "<!-- end of flags -->\n"
WORDS = {"expert_slot": "2, or 1,3 for chunks", "overlap_report": "a folder", "lsh_target_rate": "a number below 1"}


def flags_table() -> str:
    """A Markdown table: flag, values, default, meaning."""
    parser = add_scmoe_arguments(argparse.ArgumentParser(add_help=False))
    rows = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for action in parser._actions:
        values = ", ".join(map(str, action.choices)) if action.choices else WORDS.get(action.dest, "a whole number")
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        several = " (one, or one per group)" if action.nargs == "+" else ""
        rows.append(f"| `{action.option_strings[0]}` | {values}{several} | {default or '-'} | {action.help} |")
    return "\n".join(rows) + "\n"


def with_table(readme: str) -> str:
    """``readme`` with the table between its two markers renewed."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + flags_table() + END + after


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
    print(f"wrote the table of flags in {README}")
