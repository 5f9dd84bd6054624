"""Pytest set-up: importable test modules, the markers, several workers, the end of the rank pool."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent
# Test modules import what is in support/ and one another, and the rank processes import them, by their plain names.
sys.path[:0] = [str(folder) for folder in sorted(_TESTS.iterdir()) if any(folder.glob("*.py"))]
sys.path.append(str(_TESTS.parent))  # last, so that an installed megatron_scmoe is preferred

import alone  # noqa: E402
import ranks  # noqa: E402

_PLACES = "TEST_PLACES"  # environment variable: a folder that all workers of a run share

_executed: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: of make test-full alone, left out unless -m is given")
    config.addinivalue_line("markers", "alone: measures time or uses the machine's links; nothing runs beside it")
    if not config.option.markexpr:
        config.option.markexpr = "not full"
    if not hasattr(config, "workerinput"):
        os.environ[_PLACES] = tempfile.mkdtemp(prefix="places-")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with alone.place(Path(os.environ[_PLACES]), alone=item.get_closest_marker("alone") is not None):
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # An expected failure is reported as skipped, but it did run.
    if report.when == "call" and (not report.skipped or hasattr(report, "wasxfail")):
        _executed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    ranks.shutdown()
    if not hasattr(session.config, "workerinput"):
        shutil.rmtree(os.environ[_PLACES])
    passed = session.exitstatus == pytest.ExitCode.OK
    if passed and not _executed and not session.config.option.collectonly:
        # All skipped is no evidence that anything works.
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    if not _executed and not config.option.collectonly:
        terminalreporter.write_line("no test was executed: this run counts as failed", red=True)
