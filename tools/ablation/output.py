"""Writing what was measured: JSON, CSV, HTML, and the table on the terminal; all of it anew after each link rate."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ablation import analysis, render
from ablation.arms import BASELINE

ROOT = Path(__file__).resolve().parent.parent.parent


def write_results(args: argparse.Namespace, sizes: Any, ranks: int, points: list[dict[str, Any]]) -> None:
    """Write what is there so far: JSON, CSV, HTML; and print the table of the newest link rate."""
    result = {"meta": _meta(args, sizes, ranks), "points": points}
    rows = analysis.rows(points, BASELINE)
    args.output.mkdir(parents=True, exist_ok=True)
    _replace(args.output / "result.json", json.dumps(result, indent=1) + "\n")
    table = [_flat(row) for row in rows]
    with (args.output / ".result.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (args.output / ".result.csv").replace(args.output / "result.csv")
    _replace(args.output / "report.html", render.html(result))
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


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _meta(args: argparse.Namespace, sizes: Any, ranks: int) -> dict[str, Any]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed_files": len(git("status", "--porcelain").splitlines()),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        },
        "hardware": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "ranks": ranks,
        "threads": args.threads,
        "burst": args.burst,
        "repetitions": args.repetitions,
        "sizes": asdict(sizes),
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown CPU"
