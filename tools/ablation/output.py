"""Writing what was measured: JSON, CSV, HTML, and the table on the terminal; all of it anew after each link rate."""

from __future__ import annotations

import argparse
import csv
import json
import os
from dataclasses import asdict, fields
from typing import Any

import atomic
import provenance
import torch

from ablation import analysis, render
from ablation.arms import BASELINE


def write_results(args: argparse.Namespace, meta: dict[str, Any], points: list[dict[str, Any]]) -> None:
    """Write what is there so far: JSON, CSV, HTML; and print the table of the newest link rate."""
    meta["hardware"]["load"] = os.getloadavg()[0]
    result = {"meta": meta, "points": points}
    rows = analysis.rows(points, BASELINE)
    args.output.mkdir(parents=True, exist_ok=True)
    atomic.write_text(args.output / "result.json", json.dumps(result, indent=1) + "\n")
    table = [_flat(row) for row in rows]
    with atomic.written(args.output / "result.csv") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    atomic.write_text(args.output / "report.html", render.html(result))
    render.print_table(result, len(points) - 1)


def _flat(row: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if "Estimate" not in str(field.type):
            flat[field.name] = value
            continue
        # The same columns in every row: Megatron's own layers lack some estimates.
        for part, column in (("value", ""), ("low", "_low"), ("high", "_high")):
            flat[field.name + column] = getattr(value, part) if value else None
    return flat


def meta_of(args: argparse.Namespace, sizes: Any, ranks: int) -> dict[str, Any]:
    """Where results come from. Ask when the job begins: the repository may change while it runs."""
    return {
        **provenance.provenance(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "seed": args.seed,
        "ranks": ranks,
        "threads": args.threads,
        "burst": args.burst,
        "repetitions": args.repetitions,
        "sizes": asdict(sizes),
    }
