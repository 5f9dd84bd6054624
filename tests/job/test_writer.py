"""One job at a time writes to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import ranks
import torch.distributed as dist

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import writer

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(writer, "REFRESH_S", 0.1)
    monkeypatch.setattr(writer, "STALE_S", 0.5)


def claimed(folder: Path) -> str:
    """What this process is told."""
    try:
        with writer.only_one(folder):
            return ""
    except ConfigError as error:
        return str(error)


def write_until_killed(folder: Path, host: str, has_locks: bool, is_heard: bool) -> None:
    writer.REFRESH_S = 0.1
    writer.socket.gethostname = lambda: host  # type: ignore[assignment]
    if not has_locks:
        fcntl.lockf = without_locks  # type: ignore[assignment]
    if not is_heard:
        writer._keep = lambda _file, ended: ended.wait()
    with writer.only_one(folder):
        (folder / "writes").touch()
        time.sleep(60)


def without_locks(*_args: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@contextlib.contextmanager
def other_job(folder: Path, host: str, has_locks: bool = True, is_heard: bool = True):
    process = FORK.Process(target=write_until_killed, args=(folder, host, has_locks, is_heard))
    process.start()
    while not (folder / "writes").exists():
        time.sleep(0.01)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def in_a_fork(case: str, folder: Path) -> tuple[str, float]:
    """What a second job is told, and after how many seconds, in a process whose threads are its own."""
    dist.destroy_process_group()
    writer.REFRESH_S, writer.STALE_S = 0.1, 2.0
    host = "elsewhere" if "elsewhere" in case else writer.socket.gethostname()
    with other_job(folder, host, "no locks" not in case, "silent" not in case) as process:
        if "dead" in case:
            process.kill()
            process.join()
        if "no locks" in case:
            fcntl.lockf = without_locks  # type: ignore[assignment]
        began_s = time.monotonic()
        return claimed(folder), time.monotonic() - began_s


@pytest.mark.parametrize(
    ("case", "is_refused"),
    [
        ("alive here", True),
        ("alive elsewhere", True),
        ("alive elsewhere, no locks", True),
        ("alive here, no locks", True),
        ("dead here", False),
        ("dead elsewhere", False),
        ("dead elsewhere, no locks", False),
        ("silent here", True),
    ],
)
def test_a_second_job_is_refused_while_the_first_one_lives(case, is_refused, tmp_path):
    (found,) = ranks.run(in_a_fork, 1, case, tmp_path)
    line, seconds = found
    assert bool(line) is is_refused, line
    if is_refused:
        assert "one job at a time writes" in line and "process " in line and " minutes); stop it" in line
    assert (seconds > 1.9) is (case.startswith("dead elsewhere"))  # it waits where the dead cannot be told


def test_a_file_that_is_locked_and_never_written_is_refused_in_the_end(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "_lock", lambda _file: "theirs")
    assert "locked by a process that writes nothing" in claimed(tmp_path)


def test_a_folder_is_free_again(quick, tmp_path):
    assert claimed(tmp_path / "new") == claimed(tmp_path / "new") == ""
    assert (tmp_path / "new" / writer.NAME).read_bytes() == b""


def test_the_writer_says_that_it_lives(quick, tmp_path):
    with writer.only_one(tmp_path):
        first = json.loads((tmp_path / writer.NAME).read_text())
        deadline_s = time.monotonic() + 10
        second = first
        while second == first and time.monotonic() < deadline_s:
            time.sleep(0.05)
            second = json.loads((tmp_path / writer.NAME).read_text())
    assert first["pid"] == second["pid"] == os.getpid() and second["said"] > first["said"]


def test_where_no_file_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "--save is" in claimed(tmp_path / "file") and "Not a directory" in claimed(tmp_path / "file" / "below")
