#!/usr/bin/env python3
"""Write docs/flags.md, our flags, from ``megatron_scmoe.config``; a test compares the two."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_scmoe.training.arguments import add_scmoe_arguments

DOCUMENT = Path(__file__).resolve().parent / "flags.md"
HEAD = """\
# Flags

Written by `make docs` from the package's settings; do not edit. Megatron's flags keep their meaning: `--num-layers`
counts blocks, `--moe-router-topk` the experts of a token (ScMoE: 1, "ScMoE-2": 2), and so on. `--moe-layer-freq` and
`--moe-shared-expert-gate` are set for you. `docs/refused.md` lists those that are refused.

"""
WORDS = {
    "expert_slot": "2, or 1,3 for chunks",
    "a2a_weights_apart_above": "a number",
    "overlap_report": "a folder",
    "lsh_target_rate": "a number below 1",
    "hang_limit": "a number",
}
SEVERAL = {"fp8_transfers": " (one or more)"}


def document() -> str:
    """The head and a table: flag, values, default, meaning."""
    parser = add_scmoe_arguments(argparse.ArgumentParser(add_help=False))
    rows = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for action in parser._actions:
        values = ", ".join(map(str, action.choices)) if action.choices else WORDS.get(action.dest, "a whole number")
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        several = SEVERAL.get(action.dest, " (one, or one per group)") if action.nargs == "+" else ""
        rows.append(f"| `{action.option_strings[0]}` | {values}{several} | {default or '-'} | {action.help} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"wrote {DOCUMENT}")
