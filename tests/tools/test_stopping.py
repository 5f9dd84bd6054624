"""^C and SIGTERM at any moment of a tool or the entry script: its exit code, one line at most, nothing half-written.

In the middle of work, where a tool has something to finish or to remove, they are stopped by the tests of each tool.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import ROOT, SCMOE

TOOLS = ROOT / "tools"
LIGHT = {
    "convert_checkpoint.py": ("argparse", "command_line"),
    "preprocess_data.py": ("json", "preprocessing.encoding"),
    "trace.py": ("json", "megatron_scmoe.overlap.plan"),
    "slow_link.py": ("json", "slow_network.network"),
    "ablate_codec.py": ("json", "codec_study.jobs"),
    "ablate_overlap.py": ("json", "studies.request"),
}
"""Tools, and modules that each imports in its first moments."""
WITHOUT_ARGUMENTS = 2
"""The exit code of each of them, started without any."""
HEAVY = {
    "tools/score.py": "numpy",
    "tools/inspect_checkpoint.py": "numpy",
    "pretrain_gpt_scmoe.py": "numpy",
}
"""What imports for seconds, and what each imports soon."""


def started(script: Path, *words: object) -> subprocess.Popen[str]:
    """A process as a user starts it, which says on stderr what it imports."""
    command = [sys.executable, "-X", "importtime", script, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)


def heeds_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore


def wait_for_import(process: subprocess.Popen[str], module: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import time:") and line.split("|")[-1].strip() == module:
            return
    raise AssertionError(f"{module} was not imported; exit code {process.wait()}")


def said(process: subprocess.Popen[str]) -> list[str]:
    """What it says until its end, but for imports."""
    out, err = process.communicate(timeout=60)
    return [*out.splitlines(), *(line for line in err.splitlines() if not line.startswith("import time:"))]


def assert_stopped(process: subprocess.Popen[str], lines: list[str], number: signal.Signals) -> None:
    """By the signal itself, or with the exit code that a shell makes of it."""
    assert process.returncode in (-number, 128 + number) and len(lines) <= 1, (process.returncode, lines[-5:])


def assert_stops(script: Path, module: str, number: signal.Signals) -> None:
    """In a moment so short that the process may have ended by itself; then another is stopped."""
    for _ in range(10):
        process = started(script)
        wait_for_import(process, module)
        process.send_signal(number)
        lines = said(process)
        if process.returncode != WITHOUT_ARGUMENTS:
            return assert_stopped(process, lines, number)
    raise AssertionError(f"{script.name} always ended before {number.name} reached it")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", LIGHT)
def test_it_stops_at_its_start(name, number):
    for module in LIGHT[name]:
        assert_stops(TOOLS / name, module, number)


@pytest.mark.parametrize("name", HEAVY)
def test_it_stops_while_it_imports_for_seconds(name):
    assert_stops(ROOT / name, HEAVY[name], signal.SIGINT)


def test_a_traceback_would_be_noticed(tmp_path):
    """Negative control: what Python does by itself."""
    script = tmp_path / "script.py"
    script.write_text("import sys, time\nprint('import time: | ready', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    process = started(script)
    wait_for_import(process, "ready")
    process.send_signal(signal.SIGINT)
    assert len(said(process)) > 1


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", [*HEAVY, *(f"tools/{name}" for name in LIGHT)])
def test_it_stops_at_any_moment(name, number, tmp_path):
    """Behind its first line; a process that ended before was not in time."""
    generator, words = random.Random(name), SCMOE if name.startswith("pretrain") else ["--help"]
    for delay_s in sorted(generator.uniform(0.0, 4.0 if name in HEAVY else 0.1) for _ in range(4)):
        process = started(ROOT / name, *words)
        wait_for_import(process, "argparse")
        time.sleep(delay_s)
        process.send_signal(number)
        code, lines = process.poll(), said(process)
        assert code is not None or process.returncode in (0, -number, 128 + number), (delay_s, lines[-5:])
        assert not any("Traceback" in line for line in lines), (delay_s, lines[-5:])
