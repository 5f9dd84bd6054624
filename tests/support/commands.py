"""Our command lines without their start-up: run in a process forked from one that has done the slow imports.

What differs from a command line that a user gives: torch, Megatron and transformers are imported, and the CPU backend
is in place where there is no GPU. Each tool is also run as a user does it, by a test of its own.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path

import ranks


def run(
    script: Path,
    *words: object,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str = "",
    timeout_s: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """``python script words...``, with ``env`` added to the environment; returns what it printed and its exit code."""
    argv = [str(script), *map(str, words)]
    (done,) = ranks.run(
        called, 1, argv, dict(env or {}), str(cwd or Path.cwd()), stdin, distributed=False, timeout_s=timeout_s
    )
    return subprocess.CompletedProcess(argv, *done)


def called(argv: list[str], env: dict[str, str], cwd: str, stdin: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script, with what its children and C++ code print; to be called in a fork."""
    for number in range(3):
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), number)
    os.pwrite(0, stdin.encode(), 0)
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:] = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    out, err = (os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace") for number in (1, 2))
    return int(code or 0), out, err
