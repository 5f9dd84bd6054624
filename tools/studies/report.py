"""Reports of a study: pages and sections from templates, and the files of a folder that show what it holds."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import atomic
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
REPORT = "report.html"


def rendered(template: Path, **values: Any) -> str:
    """A template with ``values`` in it; HTML loads nothing from anywhere, and may include report.css."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, HERE]),
        autoescape=template.suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values).rstrip()


def write(folder: Path, rows: Sequence[Mapping[str, Any]], html: str) -> None:
    """Write what people read of a study into its folder: result.csv, whose rows have the same columns, and a page."""
    with atomic.written(folder / "result.csv") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    atomic.write_text(folder / REPORT, html)


def origin(meta: Mapping[str, Any], *, also: str = "", computing: str) -> dict[str, str]:
    """When a result was measured, and with what, by heading.

    Args:
        meta: of the result; with what ``provenance`` says.
        also: stands behind the commit.
        computing: stands behind the cores.
    """
    hardware = meta["hardware"]
    changed = f", with {meta['changed_files']} changed files" if meta["changed_files"] else ""
    return {
        "measured": str(meta["time"]),
        "commit": f"{meta['commit']}{changed}{also}",
        "versions": ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        "hardware": f"{hardware['device']}, {hardware['cores']} cores{computing}",
    }
