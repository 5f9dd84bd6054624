#!/usr/bin/env python3
"""Write docs/gpu.md and the paragraph of README.md that say what has run on a GPU; a test compares both.

`make test-gpu` on a GPU writes the results, docs/results/gpu.json. Where there is no such file nothing has run on one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "gpu.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- written by make docs from what make test-gpu found -->\n", "<!-- end -->\n"
WIDTH = 118

HEAD = """\
# What has run on a GPU

Written by `make docs` (`docs/gpu_results.py`) from what `make test-gpu` found; do not edit.

```
make test-gpu                                         # one H100 or H200: at most 400 s; more GPUs: more parts
make test-gpu ARGS='--only late_wire,work_nccl --limit-s 120'
```

It needs torch, this package and a megatron-core wheel. Each part is a process of its own with a time limit and prints a
JSON line. Its checks have negative controls, mutants, which have to fail. On a machine without CUDA it is a dry run of
the parts that have stand-ins (`make test` has it too), says so, and writes nothing.

"""
NOTHING = (
    "**Nothing here has run on a GPU yet**: not NCCL, not CUDA streams, not Transformer Engine's modules in a forward "
    "pass, not `torch.compile`. `make test-gpu` tries them on one GPU in at most 400 s, and more of NCCL on several; "
    "what it finds is written here and in [docs/gpu.md](docs/gpu.md)."
)


def runner() -> ModuleType:
    """tests/gpu/run_parts.py, which knows the parts and where their results are."""
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run_parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def found() -> dict[str, Any] | None:
    """The results; None where there are none."""
    path = runner().RESULTS
    return json.loads(path.read_text()) if path.exists() else None


def document(results: dict[str, Any] | None = None) -> str:
    """docs/gpu.md of these results; without any, of those that there are."""
    results = results or found()
    run = runner()
    by_name = {result["part"]: result for result in results["parts"]} if results else {}
    text = HEAD + (f"{where(results)}\n" if results else "No results: nothing has run on a GPU.\n")
    rows = ["| part | what it proves once it has passed | result | checks passed | mutants noticed |", "|---" * 5 + "|"]
    for part in (*run.PARTS, *run.EXTRA_PARTS):
        result = by_name.get(part.name, {"status": run.NOT_RUN})
        status = result["status"] + (f": {result['reason']}" if "reason" in result else "")
        rows.append(f"| `{part.name}` | {part.proves} | {status} | {' | '.join(counts(result))} |")
    text += "\n".join(["", *rows, "", "No part proves:", "", *(f"* {line}" for line in run.NEVER), ""])
    for result in by_name.values():
        if result.get("figures"):
            lines = [f"| {name} | {shown(value)} |" for name, value in result["figures"].items()]
            text += "\n".join(["", f"## Figures of {result['part']}", "", "| | |", "|---|---|", *lines, ""])
    return text


def counts(result: dict[str, Any]) -> tuple[str, str]:
    """Checks that passed, of all; and mutants."""
    checks = result.get("checks", {})
    mutants = {name: outcome for name, outcome in checks.items() if name.startswith("mutant: ")}
    others = {name: outcome for name, outcome in checks.items() if name not in mutants}
    one, other = (f"{list(some.values()).count('passed')} of {len(some)}" for some in (others, mutants))
    return one, other


def shown(value: Any) -> str:
    """A figure in a table."""
    return ", ".join(f"{key}: {one}" for key, one in value.items()) if isinstance(value, dict) else str(value)


def where(results: dict[str, Any]) -> str:
    """On what the parts ran."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    devices = f"{results['devices']} x {results['device']}"
    return f"On {devices}, {results['date']}, with {versions}; commit {results['commit']}."


def paragraph(results: dict[str, Any] | None) -> str:
    """What README.md says."""
    if results is None:
        return wrapped(NOTHING)
    by_status: dict[str, list[str]] = {}
    for result in results["parts"]:
        by_status.setdefault(result["status"], []).append(f"`{result['part']}`")
    parts = "; ".join(f"{status}: {', '.join(names)}" for status, names in by_status.items())
    return wrapped(f"{where(results)} {parts}. [docs/gpu.md](docs/gpu.md) says what each proves, and what none does.")


def wrapped(text: str) -> str:
    """Lines that break between words alone."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines) + "\n"


def readme(text: str, results: dict[str, Any] | None) -> str:
    """README.md with the paragraph of these results."""
    replaced, number = re.subn(
        re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: BEGIN + paragraph(results) + END, text, flags=re.DOTALL
    )
    assert number == 1, f"README.md has no place for it: {BEGIN.strip()} ... {END.strip()}"
    return replaced


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    README.write_text(readme(README.read_text(), found()))
    print(f"wrote {DOCUMENT} and a paragraph of {README}")
