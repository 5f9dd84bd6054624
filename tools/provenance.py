"""Where a result comes from: commit, versions, machine. Ask when a job begins: the repository may change later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def commit() -> dict[str, Any]:
    """The commit of this repository, and how many of its files are changed."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # there is no git
            return ""
        return done.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed_files": len(git("status", "--porcelain").splitlines()),
    }


def provenance(device: str | None = None) -> dict[str, Any]:
    """What every result file says of itself.

    Args:
        device: what computed; the CPU if not given.
    """
    return {
        **commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "megatron-core")},
        },
        "hardware": {"device": device or _cpu_name(), "cores": os.cpu_count()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """What decides how a CPU rounds, as far as Linux says it: libraries choose their kernels by the model."""
    known = {name: value for name in ("cpu family", "model", "stepping") if (value := _of_cpu(name))}
    return ", ".join([_cpu_name(), *(f"{name} {value}" for name, value in known.items())])


def _cpu_name() -> str:
    return _of_cpu("model name") or "unknown CPU"


def _of_cpu(name: str) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    values = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == name]
    return values[0] if values else ""
