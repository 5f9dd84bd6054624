"""Writing what was measured: JSON, CSV, HTML, and the table on the terminal; all of it anew after each link rate."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, fields
from typing import Any

import provenance
import torch
from studies import report

from ablation import analysis, render


def write_results(args: argparse.Namespace, meta: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """Write what is there so far: JSON, CSV, HTML; and print the table of the newest link rate."""
    meta["hardware"]["load"] = os.getloadavg()[0]
    result = {"meta": meta, "points": points}
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [_flat(row) for row in analysis.rows(points)]
    report.write(args.output, ("result.json", result), rows, render.html(result))
    render.print_table(result, len(points) - 1)


def _flat(row: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if "Figure" not in str(field.type):
            flat[field.name] = value
            continue
        # The same columns in every row: Megatron's own layers lack some figures.
        for part, column in (("value", ""), ("low", "_low"), ("high", "_high")):
            flat[field.name + column] = getattr(value, part) if value else None
    return flat


def meta_of(args: argparse.Namespace, sizes: Any, ranks: int) -> dict[str, Any]:
    """Where results come from. Ask when the job begins: the repository may change while it runs."""
    return {
        **provenance.provenance(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        **{name: getattr(args, name) for name in ("seed", "threads", "burst", "repetitions")},
        "ranks": ranks,
        "sizes": asdict(sizes),
    }
