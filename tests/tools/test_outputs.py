"""Every path that a tool writes to, and everything that can stand in its way: refused in one line, nothing changed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import commands
import numpy
import pytest
import small_checkpoints
from training import ROOT

TOOLS = ROOT / "tools"


class Output(NamedTuple):
    """A path that a tool writes.

    Attributes:
        script: of the tool.
        words: the rest of its command line; those that begin with @ are paths in the folder of inputs.
        source: a folder that it reads, and another tool might damage.
        is_folder: what is written.
    """

    script: str
    flag: str
    words: tuple[str, ...]
    source: str
    is_folder: bool


CONVERT = ("--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change", "--load", "@dense")
OUTPUTS = {
    "convert": Output("convert_checkpoint.py", "--save", CONVERT, "dense", True),
    "score": Output("score.py", "--output", ("--load", "@made", "--input", "@ids.npy"), "made", True),
    "preprocess": Output(
        "preprocess_data.py", "--output", ("--input", "@texts", "--vocab-size", "400", "--workers", "1"), "texts", True
    ),
    "ablate codec": Output("ablate_codec.py", "--output", ("--arms", "none"), "", True),
    "ablate overlap": Output("ablate_overlap.py", "--output", (), "", True),
    "inspect": Output("inspect_checkpoint.py", "--json", ("@dense",), "dense", False),
    "trace": Output("trace.py", "--output", ("@report",), "report", False),
    "slow link": Output("slow_link.py", "--json", ("--ranks", "1"), "", False),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What the tools read."""
    home = tmp_path_factory.mktemp("inputs")
    small_checkpoints.dense(home / "dense")
    words = ("--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change", "--load", home / "dense")
    assert commands.run(TOOLS / "convert_checkpoint.py", *words, "--save", home / "made").returncode == 0
    numpy.save(home / "ids.npy", numpy.arange(20) % 7)
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text((TOOLS / "convert_checkpoint.py").read_text())
    (home / "report").mkdir()
    span = {"name": "attention", "lane": "compute", "start_s": 0.0, "end_s": 1.0, "backward": False, "at": 0}
    of_pass = {"group": 0, "backward": False, "total_s": 1.0, "sent_bytes": 0, "idle": None}
    one = of_pass | {"spans": [span | {"call": None}]}
    line = {"iteration": 1, "rank": 0, "groups": [], "passes": [one]}
    (home / "report" / "rank00000.jsonl").write_text(json.dumps(line) + "\n")
    return home


def run(output: Output, inputs: Path, target: object, *more: str) -> subprocess.CompletedProcess[str]:
    words = [str(inputs / word[1:]) if word.startswith("@") else word for word in output.words]
    tail = ("--", "true") if output.script == "slow_link.py" else ()
    return commands.run(TOOLS / output.script, *words, output.flag, target, *more, *tail, timeout_s=20)


def state(*folders: Path) -> dict[str, object]:
    """What is there, down to inodes."""
    found: dict[str, object] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            info = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            found[str(path)] = (info.st_mode, info.st_ino, info.st_rdev, content)
    return found


# --- what stands in the way -------------------------------------------------------------------------------------------


def _mine(home: Path) -> Path:
    (home / "mine").write_text("mine")
    return home / "mine"


def _device(home: Path) -> Path:
    os.mknod(home / "device", 0o20666, os.makedev(1, 3))
    return home / "device"


def _fifo(home: Path) -> Path:
    os.mkfifo(home / "fifo")
    return home / "fifo"


def _link(home: Path, target: Path) -> Path:
    (home / "link").symlink_to(target)
    return home / "link"


def _folder(home: Path) -> Path:
    (home / "folder").mkdir()
    (home / "folder" / "mine").write_text("mine")
    return home / "folder"


OBSTACLES: dict[str, Callable[[Path], Path]] = {
    "a device": _device,
    "a fifo": _fifo,
    "a link to a file": lambda home: _link(home, _mine(home)),
    "a link to nothing": lambda home: _link(home, home / "nothing"),
    "a loop of links": lambda home: _link(home, home / "link"),
    "below a file": lambda home: _mine(home) / "new",
    "a name of 300 letters": lambda home: home / ("a" * 300),
    "a name too long for its hidden beginning": lambda home: home / ("a" * 250),
    "a folder of others": _folder,
    "a place that takes nothing": lambda home: Path("/proc/new"),
}


NO_OBSTACLE = {("ablate codec", "a folder of others"), ("preprocess", "a link to nothing")}
"""A second call goes on in the folder of the first; data are written to where a link leads."""


@pytest.mark.parametrize(
    ("name", "obstacle"), [pair for pair in itertools.product(OUTPUTS, OBSTACLES) if pair not in NO_OBSTACLE]
)
def test_what_stands_in_the_way_stays(name, obstacle, inputs, tmp_path):
    output = OUTPUTS[name]
    target = OBSTACLES[obstacle](tmp_path)
    before = state(tmp_path, inputs)
    done = run(output, inputs, target)
    assert done.returncode == 2, (done.returncode, done.stderr[-600:])
    assert len(done.stderr.splitlines()) == 1 and target.name[:40] in done.stderr, done.stderr[-600:]
    assert done.stdout == "" and state(tmp_path, inputs) == before


@pytest.mark.parametrize(("name", "target"), [("convert", "new"), ("score", "new"), ("preprocess", "new")])
def test_nothing_is_written_into_what_is_read(name, target, inputs):
    output = OUTPUTS[name]
    before = state(inputs)
    for inside in (inputs / output.source / "deep" / target, inputs / output.source / ".." / output.source / target):
        done = run(output, inputs, inside)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr[-600:]
        assert str(inputs / output.source) in done.stderr and state(inputs) == before


@pytest.mark.parametrize("name", ["inspect", "trace"])
def test_no_file_that_is_read_is_replaced(name, inputs):
    output = OUTPUTS[name]
    before = state(inputs)
    for file in (inputs / output.source).iterdir():
        done = run(output, inputs, file, *["--overwrite"] * (name == "trace"))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and file.name in done.stderr
    assert state(inputs) == before


def test_a_trace_that_is_there_is_replaced_where_asked(inputs, tmp_path):
    mine = _mine(tmp_path)
    done = run(OUTPUTS["trace"], inputs, mine)
    assert done.returncode == 2 and "add --overwrite" in done.stderr and mine.read_text() == "mine"
    assert run(OUTPUTS["trace"], inputs, mine, "--overwrite").returncode == 0
    assert json.loads(mine.read_text())["traceEvents"]


# --- disks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A disk of its own, by the options of a tmpfs. Skips where nothing may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_cannot_be_written(name, inputs, tmp_path):
    with disk(tmp_path / "disk", "ro") as folder:
        done = run(OUTPUTS[name], inputs, folder / "new")
        assert done.returncode == 2, done.stderr[-600:]
        assert len(done.stderr.splitlines()) == 1 and f"{folder} is not writable" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["convert", "score", "preprocess", "inspect", "trace"])
def test_a_disk_that_is_full(name, inputs, tmp_path):
    """What is begun fails, and leaves nothing."""
    with disk(tmp_path / "disk", "size=64k") as folder:
        (folder / "mine").write_bytes(bytes(64 << 10))
        done = run(OUTPUTS[name], inputs, folder / "new")
        lines = [line for line in done.stderr.splitlines() if " error: " in line]
        assert done.returncode in (1, 2) and len(lines) == 1, done.stderr[-600:]
        assert "No space left" in lines[0] or "too little room" in lines[0], lines
        assert "Traceback" not in done.stderr
        assert [path.name for path in folder.iterdir()] == ["mine"], list(folder.iterdir())
