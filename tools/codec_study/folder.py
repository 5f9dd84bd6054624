"""What all runs of a folder share: its data and its settings."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import atomic

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFEST = "manifest.json"
SETTINGS = "settings.json"
VOCABULARY = 1024


def made_data(folder: Path) -> Path:
    """``folder`` with the standard library's source in it, made unless it is there; its tool says what goes wrong."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", "stdlib", "--output", str(folder)]
    done = subprocess.run([*command, "--vocab-size", str(VOCABULARY), "--document-kib", "4"], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return folder


def described_data(folder: Path) -> dict[str, Any]:
    """What the data are, by their manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {
        "tokens": manifest["totals"]["tokens"],
        "vocabulary": manifest["vocabulary"]["size"],
        "sha256": manifest["outputs"]["text_document.bin"]["sha256"],
    }


def settings_difference(folder: Path, wanted: Mapping[str, Any]) -> str:
    """How the settings of the runs in ``folder`` differ from those wanted; '' if they do not.

    The first call writes them down.
    """
    path = folder / SETTINGS
    if not path.exists():
        atomic.write_text(path, json.dumps(wanted, indent=1) + "\n")
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            return f"another --{name.replace('_', '-')} ({found.get(name)}, now {value})"
    return ""
