"""A training that is killed at random moments loses nothing, and who says so notices when it does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from chaos_judge import NOTHING, Run, faults, summary, written
from obstacles import DISK, KILLS, KINDS, LAUNCHER, RANK, SAVE, STEP, STOP, Disk, obstacles
from training import ROOT

TRUTH = {step: (4.0 / step).hex() for step in range(1, 9)}
STRUCK = Run(
    number=2,
    promised=4,
    began_from=4,
    losses=[(step, TRUTH[step]) for step in (5, 6)],
    kind=RANK,
    moment=SAVE,
    words="kill -9 of rank 1",
    exit_code=1,
    seconds=1.5,
)
STOPPED = replace(STRUCK, kind=STOP, words="SIGSTOP of rank 1", hang="x.py: hang: rank 1: silent for 26 s")
COMPLETE = replace(STRUCK, kind=NOTHING, exit_code=0, losses=[(step, TRUTH[step]) for step in (5, 6, 7, 8)])


@pytest.mark.parametrize(
    "run", [STRUCK, STOPPED, COMPLETE, replace(STRUCK, promised=2), replace(STRUCK, losses=[])], ids=lambda _: ""
)
def test_what_is_right_is_no_fault(run):
    assert faults(run, TRUTH) == []


def an_ulp_more(loss: str) -> str:
    return math.nextafter(float.fromhex(loss), math.inf).hex()


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (replace(STRUCK, losses=[(5, TRUTH[5]), (6, an_ulp_more(TRUTH[6]))]), "the loss of step 6 is 0x1.55"),
        (replace(STRUCK, promised=6), "a checkpoint was lost: 6 was whole, and it continued from 4"),
        (replace(STRUCK, losses=[(6, TRUTH[6])]), "its steps are [6] and it continued from 4"),
        (replace(STRUCK, orphans=["71 python"]), "a process stayed: 71 python"),
        (replace(STRUCK, exit_code=None), "it did not end: kill -9 of rank 1"),
        (replace(STRUCK, began_from=None, losses=[]), "it did not start: exit code 1"),
        (replace(STOPPED, hang="x.py: hang: rank 0: silent for 26 s"), "the hang has no line that names it"),
        (replace(STOPPED, hang=""), "the hang has no line that names it"),
        (replace(COMPLETE, exit_code=1), "it ended by itself: exit code 1"),
        (replace(COMPLETE, losses=STRUCK.losses), "it ended with step 6 of 8"),
    ],
)
def test_each_fault_is_noticed(run, words):
    (fault,) = faults(run, TRUTH)
    assert fault.startswith(words)


def test_what_a_job_has_written():
    assert written({2, 4}, None, 4) == written({2, 4}, 12, 4) == {2, 4}
    assert written({2}, None, 4) == written({2}, 2, 4) == {2, 4}
    assert written(set(), 12, 12) == written(set(), 12, None) == set()


def test_figures():
    runs = [STRUCK, replace(STRUCK, seconds=0.5, repeated=2, damage="is damaged: x"), STOPPED, COMPLETE]
    figures = summary(runs, ["job 3: a checkpoint was lost: 6 was whole", "job 3: the loss of step 5 is"], 90.0)
    assert figures["kills"] == 2 and figures["jobs"] == 4 and figures["minutes"] == 1.5
    assert figures["obstacles"] == {f"{STOP}, in a {SAVE}": 1, f"{RANK}, in a {SAVE}": 2}
    assert figures["seconds from strike to end, median and longest"][f"{RANK}, in a {SAVE}"] == [1.0, 1.5]
    assert figures["losses compared"] == 10 and figures["steps repeated"] == 2
    assert figures["checkpoints lost"] == figures["losses that differ"] == 1
    assert figures["damaged checkpoints replaced by an older whole one"] == 1


def test_every_kind_comes_in_its_turn():
    found = obstacles(100, Random(0))
    assert sum(kind in KILLS for kind, _ in found) == 100
    assert {(kind, moment) for kind, moment in found if kind != DISK} == {
        (kind, moment) for kind in KINDS if kind != DISK for moment in (STEP, SAVE)
    }
    assert {kind for kind, _ in obstacles(8, Random(1))} == set(KINDS)
    assert found == obstacles(100, Random(0)) != obstacles(100, Random(1))


WRITER = """
import sys
input()
open(sys.argv[1], "wb").write(bytes(1_000_000))
"""


def said_by_a_writer(path: Path, disk: Disk) -> str:
    """What a process says that writes a megabyte to a disk that is full meanwhile."""
    command = [sys.executable, "-c", WRITER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        disk.fill(50_000, process.pid)
        _, said = process.communicate("now\n")
    disk.free()
    return said


@pytest.mark.parametrize("is_mounted", [True, False])
def test_a_full_disk_is_full(tmp_path, is_mounted):
    disk = Disk(tmp_path / "disk")
    try:
        if is_mounted and not disk.is_mounted:
            pytest.skip("a tmpfs can be mounted by root alone")
        disk.is_mounted = is_mounted
        assert ("No space left" if is_mounted else "File too large") in said_by_a_writer(disk.folder / "file", disk)
        (disk.folder / "file").write_bytes(bytes(1_000_000))
    finally:
        disk.release()


@pytest.mark.full
@pytest.mark.alone
def test_a_training_that_is_struck_loses_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "tests/support/chaos.py", "--kills", "8", "--seed", "1", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert figures["kills"] == 8 and figures["faults"] == []
    assert {name.split(", in")[0] for name in figures["obstacles"]} == set(KINDS)
    assert figures["losses compared"] > 24 and figures["jobs that continued from a checkpoint"] > 0
    assert figures["seconds from strike to end, median and longest"].keys() == figures["obstacles"].keys()
    assert any(name.startswith(LAUNCHER) for name in figures["obstacles"])
