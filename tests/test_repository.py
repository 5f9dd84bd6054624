"""The repository itself: documents name what exists, and imports point one way."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training import ROOT

PACKAGE = ROOT / "megatron_scmoe"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STANDARD_LIBRARY_ONLY = {"config", "plan", "solver", "spans"}

# Module -> modules of ours that it may import; docs/architecture.md draws these arrows.
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "config": {"plan"},
    "plan": set(),
    "spans": set(),
    "observe": set(),
    "solver": {"plan", "spans"},
    "gloo": set(),
    "wheel": set(),
    "cpu_backend": {"gloo", "wheel"},
    "mcore": {"config"},
    "refusals": {"config", "mcore"},
    "gating": set(),
    "norm": set(),
    "attention": set(),
    "exchange": {"observe"},
    "lsh": set(),
    "compensation": set(),
    "rate": {"lsh"},
    "lloyd": {"lsh"},
    "codec": {"compensation", "config", "exchange", "lloyd", "lsh", "mcore", "plan", "rate"},
    "dispatch": {"codec", "exchange", "mcore", "observe", "plan"},
    "router": set(),
    "layer": {"codec", "config", "dispatch", "gating", "mcore", "observe", "plan", "router"},
    "pipelined": {"codec", "config", "dispatch", "mcore", "observe", "plan"},
    "specs": {"config", "attention", "layer", "mcore", "norm", "pipelined", "router"},
    "model": {"config", "layer", "mcore", "specs"},
    "corpus": {"config"},
    "resume": {"config", "mcore"},
    "arguments": {"config", "corpus", "mcore", "refusals", "report", "resume"},
    "costs": {"observe", "plan", "solver", "spans"},
    "adaptive": {"costs", "plan", "solver"},
    "report": {"costs", "observe", "plan", "spans"},
    "scalars": {"config", "mcore"},
    "session": {"adaptive", "config", "costs", "layer", "mcore", "observe", "pipelined", "rate", "report", "scalars"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("megatron_scmoe.")}


def test_every_module_has_its_arrows():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ARROWS)


@pytest.mark.parametrize("module", ARROWS)
def test_imports_follow_the_arrows(module):
    assert own_imports(PACKAGE / f"{module}.py") <= ARROWS[module]


def test_arrows_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {module for module, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {set(ARROWS) - done}"
        done |= ready


@pytest.mark.parametrize("module", sorted(STANDARD_LIBRARY_ONLY))
def test_standard_library_only(module):
    others = {name for name in imports(PACKAGE / f"{module}.py") if not name.startswith("megatron_scmoe.")}
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names
    assert own_imports(PACKAGE / f"{module}.py") <= STANDARD_LIBRARY_ONLY


def test_private_names_of_core_stay_in_the_seam():
    """A name with an underscore from Megatron, imported or called on one of its objects, belongs into mcore.py."""
    private = re.compile(r"from megatron\.\S+ import .*\b_[a-z]|(?:dispatcher|layer|block|moe)\._[a-z]\w+")
    offenders = {path.name for path in PACKAGE.glob("*.py") if private.search(path.read_text())}
    assert offenders == {"mcore.py"}


def test_only_entry_points_and_tests_install_the_cpu_backend():
    users = [path for path in PACKAGE.glob("*.py") if "cpu_backend" in path.read_text() and path.stem != "cpu_backend"]
    assert users == []
    script = (ROOT / "pretrain_gpt_scmoe.py").read_text()
    assert "cpu_backend.install()" in script and "wheel.mend()" in script


def paths_in(text: str) -> set[str]:
    """What looks like a file of this repository in a document."""
    return set(
        re.findall(r"(?:megatron_scmoe|docs|tools|tests|examples|\.ci)/[\w./-]*\w|\b[\w-]+\.(?:txt|toml)\b", text)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document):
    named = paths_in(document.read_text())
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_a_missing_file_is_noticed():
    """Negative control of the test above."""
    assert paths_in("see `docs/nowhere.md` and tools/gone.py, requirements-no.txt") == {
        "docs/nowhere.md",
        "tools/gone.py",
        "requirements-no.txt",
    }


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_table_is_that_of_the_code():
    program = (
        "import flags_table as t; assert t.with_table(t.README.read_text()) == t.README.read_text(), 'run make docs'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "docs", check=True)


def test_refused_flags_are_those_of_the_code():
    program = "import refused_table as t; assert t.document() == t.DOCUMENT.read_text(), 'run make docs'"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "docs", check=True)


def test_timeline_is_what_its_script_draws(tmp_path):
    draw_timeline = load(ROOT / "docs" / "draw_timeline.py")
    committed = draw_timeline.SVG.read_text()
    draw_timeline.SVG = tmp_path / "timeline.svg"
    draw_timeline.draw()
    assert draw_timeline.SVG.read_text() == committed


def test_tools_that_can_be_called_are_those_with_a_first_line_for_it():
    tools = sorted((ROOT / "tools").glob("*.py"))
    called = {path.name for path in tools if path.read_bytes().startswith(b"#!")}
    assert called and called == {path.name for path in tools if path.stat().st_mode & 0o111}


def test_make_help_and_readme_agree():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("pretrain", "test", "lint", "clean"):
        assert re.search(rf"^  {target} ", printed, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert "make pretrain" in readme and "make test" in readme


def test_make_says_where_python_is_missing(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    result = subprocess.run(
        ["make", "test", "PYTHON=/bin/false"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "Python 3.12 or newer is needed" in result.stderr and "PYTHON=/path/to/python3.12" in result.stderr
