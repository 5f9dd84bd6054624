"""Commands on damaged input: each in a process of its own, and what a user could complain of, by name."""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import commands
from damage import MOVED, Damage, damages
from hypothesis import HealthCheck, given, seed, settings

INPUT, MADE = "in", "out"
"""Of the folder that a command runs in: what is the user's, and what a command that succeeds may make."""
MEMORY_BYTES = 256 << 20
"""That a command may take for small input, what was imported before not counted."""
CPU_S, PATIENCE_S = 30, 400
"""How long a command may compute, and how long one may wait, on a machine that has other work too."""
LONGEST_LINE = 3000
_ADDRESSES_BYTES = 2 << 30  # beyond, allocations fail instead of taking the machine's memory


class Case(NamedTuple):
    """A command and the input that it reads.

    Attributes:
        tool: file name of the script.
        words: its arguments, with paths from the folder that it runs in.
        damaged: what happens to files below these folders or files, from ``INPUT``.
        beside: more of the input that is there, undamaged.
        proof: what is in ``MADE`` when the command was successful: a file of it, or "" for ``MADE`` as a file.
        replaced: files of the input that a successful call writes anew.
        chatter: what else may stand on stderr before a refusal.
        imported: modules that the tool imports late.
        finds: whether exit code 1 may come with a result, in which something is found.
        codes: exit codes that are right.
    """

    tool: str
    words: str
    damaged: tuple[str, ...]
    beside: tuple[str, ...] = ()
    proof: str | None = None
    replaced: tuple[str, ...] = ()
    chatter: str = r"(?!)"
    imported: tuple[str, ...] = ()
    finds: bool = False
    codes: tuple[int, ...] = (0, 1, 2)


class Ended(NamedTuple):
    """How a command ended: ``exit_code`` is negative for a signal that killed it."""

    exit_code: int
    stdout: str
    stderr: str
    memory_bytes: int


def files(pristine: Path, case: Case) -> list[str]:
    """What can be damaged, by names below the folder that a command runs in."""
    roots = [pristine / name for name in case.damaged]
    paths = [path for root in roots for path in (root, *sorted(root.rglob("*"))) if path.is_file()]
    return [f"{INPUT}/{path.relative_to(pristine)}" for path in paths]


def draw(script: Path, pristine: Path, case: Case, count: int, number: int) -> None:
    """Give a command ``count`` damaged inputs, the same ones for the same ``number``.

    Raises AssertionError at the first fault, and where it has one without any damage.
    """
    sys.path.insert(0, str(script.parent))
    for module in (script.stem, *case.imported):
        importlib.import_module(module)  # once instead of in each process

    assert faults(script, pristine, case._replace(codes=(0,)), []) == [], "of input that is right"

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damages(files(pristine, case)))
    def is_right_or_refused(found: list[Damage]) -> None:
        assert faults(script, pristine, case, found) == []

    is_right_or_refused()


def faults_of_each(scripts: Sequence[Path], pristine: Path, cases: Sequence[Case]) -> list[list[str]]:
    """Of commands whose input is right."""
    return [faults(script, pristine, case, []) for script, case in zip(scripts, cases, strict=True)]


def faults(script: Path, pristine: Path, case: Case, damages: Sequence[Damage]) -> list[str]:
    """Give a command a damaged copy of its input, and return what is wrong with how it ends."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as name:
        home = Path(name)
        for part in (*case.damaged, *case.beside):
            _copy(pristine / part, home / INPUT / part)
        for one in damages:
            one.happen(home)
        place = next((one.value for one in damages if one.way == MOVED), INPUT)
        (home / INPUT).rename(home / place)
        before = snapshot(home)
        words = [re.sub(rf"^{INPUT}/", lambda _: f"{place}/", word) for word in case.words.split()]
        return _judged(case, run(script, words, home), before, home, place)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)


# --- running --------------------------------------------------------------------------------------------------------


def run(script: Path, words: Sequence[str], home: Path) -> Ended:
    """``script`` in a fork of this process, which has to be free of threads."""
    with tempfile.TemporaryFile() as reply:
        pid = os.fork()
        if pid == 0:
            _child([str(script), *words], home, reply.fileno())
        _, status, usage = os.wait4(pid, 0)
        _end_group(pid)
        reply.seek(0)
        data = reply.read()
    code, out, err = pickle.loads(data) if data else (os.waitstatus_to_exitcode(status), "", "")
    return Ended(code, out, err, max(0, usage.ru_maxrss * 1024 - _resident_bytes()))


def _child(argv: list[str], home: Path, reply: int) -> None:
    try:
        os.setpgid(0, 0)
        limit = _status_bytes("VmSize") + _ADDRESSES_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        signal.alarm(PATIENCE_S)
        os.write(reply, pickle.dumps(commands.called(argv, {}, str(home), "")))
    finally:  # never back into the caller
        os._exit(0)


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _status_bytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


# --- judging --------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind and mode, and where it is a file or a link what it holds."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            status = path.lstat()
            mark: object = None
            if stat.S_ISLNK(status.st_mode):
                mark = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                mark = status.st_ino, hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = status.st_mode, mark
    return found


def _judged(case: Case, ended: Ended, before: Mapping[str, object], home: Path, place: str) -> list[str]:
    """What is wrong, each as ``name: words``."""
    after = snapshot(home)
    said = ended.stderr.splitlines()
    found = []
    if ended.exit_code not in case.codes:
        return [f"exit code: {ended.exit_code}, {ended.stderr[-300:]!a}"]
    for text in (ended.stdout, ended.stderr):
        if "Traceback (most recent call last)" in text:
            found.append(f"traceback: {text[-1500:]}")
        elif odd := [line for line in text.splitlines() if not line.isprintable()]:
            found.append(f"terminal: {odd[0]!a}")
    is_found = case.finds and ended.exit_code == 1 and _proof(case) in after
    if ended.exit_code and not (is_found and not said) and not any(one.startswith("traceback") for one in found):
        extra = [line for line in said[:-1] if not re.match(case.chatter, line)]
        is_line = said and said[-1].startswith(f"{case.tool}: error: ") and len(said[-1]) < LONGEST_LINE
        if extra or not is_line:
            found.append(f"one line: {ended.exit_code} {ended.stderr[-1500:]!a}")
    if ended.memory_bytes > MEMORY_BYTES:
        found.append(f"memory: {ended.memory_bytes >> 20} MiB")
    return found + _judged_files(case, before, after, place, is_success=is_found or ended.exit_code == 0)


def _proof(case: Case) -> str:
    return str(Path(MADE, case.proof or ""))


def _judged_files(
    case: Case, before: Mapping[str, object], after: Mapping[str, object], place: str, *, is_success: bool
) -> list[str]:
    may_make = is_success and case.proof is not None
    may_replace = {f"{place}/{name}" for name in case.replaced if is_success}
    changed = [name for name in before if before[name] != after.get(name) and name not in may_replace]
    left = [name for name in after if name not in before and not (may_make and name.split("/")[0] == MADE)]
    found = []
    if changed:
        found.append(f"changed: {changed[0]!a}")
    if left := sorted(set(left) - may_replace):
        found.append(f"left over: {left[0]!a}")
    if may_make and _proof(case) not in after:
        found.append(f"half written: {_proof(case)} is missing")
    return found
