"""Ranks end with torchrun, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from training import ROOT

RANK = """
import time
from megatron_scmoe.job.orphans import die_with_launcher
die_with_launcher()
print("alive", flush=True)
time.sleep(60)
"""
LAUNCHER = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {RANK!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


CHILD = """
import os, sys, time
from megatron_scmoe.job.orphans import end_with_rank
if sys.argv[1] == "watches":
    end_with_rank()
print(os.getpid(), flush=True)
time.sleep(60)
"""
BETWEEN = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}, sys.argv[1]])
"""
PARENT = f"""
import subprocess, sys
from megatron_scmoe.job.orphans import die_with_launcher
die_with_launcher()
subprocess.run([sys.executable, "-c", {BETWEEN!r}, sys.argv[1]])
"""


def outlives_its_launcher(environment: dict[str, str]) -> bool:
    """Whether a rank is there two seconds after its launcher was killed."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "alive\n"
    launcher.kill()
    launcher.wait()
    return lives_on(pid)


def lives_on(pid: int) -> bool:
    """Whether it is there two seconds later; it is no more in the end."""
    deadline_s = time.monotonic() + 2
    try:
        while time.monotonic() < deadline_s:
            os.kill(pid, 0)
            time.sleep(0.02)
        return True
    except ProcessLookupError:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_rank_ends_with_torchrun_alone(under_torchrun):
    """What a shell or Slurm has started is theirs."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    environment |= {"TORCHELASTIC_RUN_ID": "job"} if under_torchrun else {}
    assert outlives_its_launcher(environment) is not under_torchrun


@pytest.mark.parametrize("word", ["watches", "does not"])
def test_what_a_rank_has_started_ends_with_it(word):
    """Also by another process, as by a fork server."""
    rank = subprocess.Popen([sys.executable, "-c", PARENT, word], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout is not None
    pid = int(rank.stdout.readline())
    rank.kill()
    rank.wait()
    assert lives_on(pid) is (word == "does not")
