"""HTML reports: one page that loads nothing from anywhere, from a template and the style that all of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent


def page(folder: Path, **values: Any) -> str:
    """``template.html`` of ``folder`` with ``values`` in it; it may include report.css."""
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(**values)
