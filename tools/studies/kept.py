"""What a study keeps: JSON objects in files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import atomic


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object, whole or not at all."""
    atomic.write_text(path, json.dumps(value, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read an object. Raises OSError, ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object")
    return found
