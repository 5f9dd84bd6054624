"""The repository itself: documents name what exists, and imports point one way."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import ranks
from training import ROOT

PACKAGE = ROOT / "megatron_scmoe"
DOCUMENTS = [path for place in ("*.md", "docs/**/*.md", ".github/**/*.md") for path in sorted(ROOT.glob(place))]
STANDARD_LIBRARY_ONLY = ("config", "overlap/plan", "overlap/solver", "overlap/spans")

# Room -> rooms that it may import, from the ground up; docs/architecture.md draws these arrows.
ARROWS: dict[str, set[str]] = {
    "contracts": set(),
    "overlap": {"contracts"},
    "config": {"contracts", "overlap"},
    "mcore": {"config"},
    "cpu": {"mcore"},
    "job": {"config", "mcore"},
    "dispatch": {"contracts", "mcore", "overlap"},
    "report": {"config", "contracts", "mcore", "overlap"},
    "codec": {"config", "contracts", "dispatch", "mcore", "overlap"},
    "layers": {"codec", "config", "contracts", "dispatch", "mcore", "overlap"},
    "models": {"config", "layers", "mcore"},
    "training": {"codec", "config", "job", "layers", "mcore", "overlap", "report"},
    "dry_run": {"config", "dispatch", "layers", "mcore", "models", "training"},
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


def rooms(package: Path) -> dict[str, list[Path]]:
    """The files of each room, which is a folder of the package or a file beside the folders."""
    found = {path.name: sorted(path.glob("*.py")) for path in package.iterdir() if any(path.glob("*.py"))}
    return found | {path.stem: [path] for path in package.glob("*.py") if path.stem != "__init__"}


def own_imports(files: Iterable[Path]) -> set[str]:
    """Rooms that files import."""
    return {name.split(".")[1] for path in files for name in imports(path) if name.startswith("megatron_scmoe.")}


def pointing_up(package: Path, arrows: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Arrows of the code that the table does not have."""
    return {
        (room, target)
        for room, files in rooms(package).items()
        for target in own_imports(files) - {room} - arrows.get(room, set())
    }


def without_circles(arrows: dict[str, set[str]]) -> bool:
    """Whether every room stands above all that it imports; the table is written from the ground up."""
    below: set[str] = set()
    for room, targets in arrows.items():
        if not targets <= below:
            return False
        below.add(room)
    return True


def test_every_room_has_its_arrows():
    assert set(rooms(PACKAGE)) == set(ARROWS)


def test_imports_follow_the_arrows():
    assert pointing_up(PACKAGE, ARROWS) == set()


def test_arrows_have_no_circle():
    assert without_circles(ARROWS)


def test_an_arrow_that_points_up_is_noticed(tmp_path):
    """Negative control of the three tests above."""
    (tmp_path / "ground").mkdir()
    (tmp_path / "ground" / "below.py").write_text("from megatron_scmoe.roof import above\n")
    (tmp_path / "roof.py").write_text("from megatron_scmoe.ground import below\n")
    assert pointing_up(tmp_path, {"ground": set(), "roof": {"ground"}}) == {("ground", "roof")}
    assert not without_circles({"ground": {"roof"}, "roof": {"ground"}})


def drawn_arrows(text: str) -> dict[str, set[str]]:
    """Rooms and what they import as a document draws them, a line each, from the ground up."""
    lines = re.findall(r"^(\w+) .*-> ([\w, ]+)$", text, re.MULTILINE)
    return {room: set(targets.split(", ")) - {"nothing"} for room, targets in reversed(lines)}


def test_architecture_draws_the_arrows():
    drawn = drawn_arrows((ROOT / "docs" / "architecture.md").read_text())
    assert drawn == ARROWS and without_circles(drawn)


def test_another_drawing_is_noticed():
    """Negative control of the test above."""
    assert drawn_arrows("roof  on top -> ground, walls\nground  below -> nothing") == {
        "ground": set(),
        "roof": {"ground", "walls"},
    }


def too_long(package: Path, file_lines: int, function_lines: int) -> dict[str, int]:
    """Files and functions above these numbers of lines."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        if (lines := text.count("\n")) > file_lines:
            found[path.name] = lines
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > function_lines:
                    found[f"{path.name}:{node.name}"] = lines
    return found


def test_files_and_functions_are_one_idea_each():
    assert too_long(PACKAGE, file_lines=300, function_lines=50) == {}
    assert too_long(PACKAGE, file_lines=150, function_lines=30)  # negative control: there is something to measure


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ONLY)
def test_standard_library_only(module):
    """Nothing of torch or Megatron is loaded, by whatever it imports."""
    program = f"import sys, megatron_scmoe.{module.replace('/', '.')}; print(*{{n.split('.')[0] for n in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "megatron_scmoe" in loaded.split() and not {"torch", "megatron", "numpy"} & set(loaded.split())


def test_private_names_of_core_stay_in_the_seam():
    """A name with an underscore from Megatron, imported or called on one of its objects, belongs into mcore/."""
    private = re.compile(r"from megatron\.\S+ import .*\b_[a-z]|(?:dispatcher|layer|block|moe)\._[a-z]\w+")
    offenders = {room for room, files in rooms(PACKAGE).items() for path in files if private.search(path.read_text())}
    assert offenders == {"mcore"}


def test_only_entry_points_and_tests_install_the_cpu_backend():
    users = {room for room, files in rooms(PACKAGE).items() if room != "cpu" and "cpu" in own_imports(files)}
    assert users == set()
    script = (ROOT / "pretrain_gpt_scmoe.py").read_text()
    assert "cpu_backend.install()" in script and "wheel.mend()" in script


def paths_in(text: str) -> set[str]:
    """What looks like a file of this repository in a document."""
    return set(
        re.findall(r"(?:megatron_scmoe|docs|tools|tests|examples|\.ci)/[\w./-]*\w|\b[\w-]+\.(?:txt|toml)\b", text)
    ) | {f"megatron_scmoe/{path}" for path in re.findall(rf"`((?:{'|'.join(ARROWS)})/\w+\.py)", text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_files_that_exist(document):
    named = paths_in(document.read_text())
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_a_missing_file_is_noticed():
    """Negative control of the test above."""
    assert paths_in("see `docs/nowhere.md`, `mcore/none.py` and tools/gone.py, requirements-no.txt") == {
        "docs/nowhere.md",
        "megatron_scmoe/mcore/none.py",
        "tools/gone.py",
        "requirements-no.txt",
    }


def links_in(document: Path) -> set[Path]:
    """Files that a document links to."""
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    return {(document.parent / target).resolve() for target in targets}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert {link for link in links_in(document) if not link.exists()} == set()


def not_linked(folder: Path) -> set[Path]:
    """Documents in a folder and below it that its index has no link to; a folder with an index of its own is one."""
    nearest = {path for path in folder.glob("*.md") if path.name != "README.md"} | set(folder.glob("*/README.md"))
    return nearest - links_in(folder / "README.md")


@pytest.mark.parametrize("folder", ["docs", "docs/results"])
def test_every_document_is_in_the_index(folder):
    assert not_linked(ROOT / folder) == set()


def test_a_document_that_no_index_has_is_noticed(tmp_path):
    """Negative control of the two tests above."""
    (tmp_path / "README.md").write_text("[one](one.md), [gone](gone.md), [far](https://a.b/c)")
    for name in ("one.md", "two.md"):
        (tmp_path / name).write_text("")
    assert not_linked(tmp_path) == {tmp_path / "two.md"}
    assert links_in(tmp_path / "README.md") == {tmp_path / "one.md", tmp_path / "gone.md"}


@pytest.mark.parametrize("document, most", [("README.md", 150), ("docs/architecture.md", 120)])
def test_documents_that_people_finish(document, most):
    lines = (ROOT / document).read_text().splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 120


def named_tests(text: str) -> set[str]:
    """What a document says is a test."""
    return set(re.findall(r"`(test_\w+)`", text))


@pytest.mark.parametrize("document", ["parallelism.md", "tests.md"])
def test_documents_name_tests_that_exist(document):
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = named_tests((ROOT / "docs" / document).read_text())
    assert named and {name for name in named if f"\ndef {name}(" not in code} == set()


def test_a_missing_test_is_noticed():
    """Negative control of the test above."""
    assert named_tests("`test_of_nothing` and `tests/test_nowhere.py`") == {"test_of_nothing"}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written_and_found(script: str) -> tuple[str, str]:
    """The document that a script of docs/ would write, and the one that is there."""
    made = load(ROOT / "docs" / script)
    return made.document(), made.DOCUMENT.read_text()


def test_flags_table_is_that_of_the_code():
    ((written, found),) = ranks.run(written_and_found, 1, "flags_table.py", distributed=False)
    assert written == found, "run make docs"


def test_refused_flags_are_those_of_the_code():
    ((written, found),) = ranks.run(written_and_found, 1, "refused_table.py", distributed=False)
    assert written == found, "run make docs"


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
