"""What belongs to whom: names that carry their owner's process, the processes in a namespace, and how both go away."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

NAMESPACES = Path("/run/netns")  # where `ip netns` keeps its names
FOLDERS = Path("/run")  # of the control sockets; their paths must stay short
_NAME = re.compile(r"(slow-link-([0-9]+)-([0-9]+)-[0-9]+)(?:-bridge|-rank[0-9]+)?")
_serial = itertools.count()


def start_ticks(pid: int | str) -> int | None:
    """Return when a running process has started, in clock ticks since boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def new_name() -> str:
    """Return a name for a network of this process. Process ids come back, so it has the starting time, too."""
    return f"slow-link-{os.getpid()}-{start_ticks(os.getpid())}-{next(_serial)}"


def find_leftovers(names: Iterable[str]) -> dict[str, list[str]]:
    """Return, per network whose owner has ended, those of `names` that belong to it."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match and start_ticks(match[2]) != int(match[3]):
            found.setdefault(match[1], []).append(name)
    return found


def remove_leftovers() -> list[str]:
    """Remove the networks of owners that were killed, with their processes; return a line about each."""
    folders = [NAMESPACES, FOLDERS]
    names = {path.name for folder in folders if folder.is_dir() for path in folder.glob("slow-link-*")}
    lines = []
    for network, parts in find_leftovers(names).items():
        num_killed = remove(network, [part for part in parts if part != network])
        owner = network.split("-")[2]
        lines.append(f"removed {network}, left by process {owner}, which was killed ({num_killed} of its ranks ran on)")
    return lines


def members(namespaces: Iterable[str]) -> set[int]:
    """Return the processes that run in network namespaces, whoever started them."""
    keys = {_key(NAMESPACES / name) for name in namespaces} - {None}
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if keys and _key(path / "ns" / "net") in keys}


def kill_members(namespaces: list[str], patience_s: float = 5.0) -> int:
    """Kill all processes in the namespaces, also those that they start meanwhile; return how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + patience_s
    while (pids := members(namespaces)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= pids
        time.sleep(0.01)
    return len(killed)


def remove(network: str, namespaces: list[str]) -> int:
    """Kill what runs in the namespaces, remove them and the control folder; return how many processes there were.

    The veth pairs and the bridge go with the namespaces: nothing of them is outside.
    """
    num_killed = kill_members(namespaces)
    for name in namespaces:
        # Another start may remove the same leftovers at this moment.
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, start_new_session=True)
    shutil.rmtree(FOLDERS / network, ignore_errors=True)
    if kept := [name for name in namespaces if (NAMESPACES / name).exists()]:
        print(f"slow_link: could not remove the namespaces {' '.join(kept)}; try: ip netns delete", file=sys.stderr)
    return num_killed


def _key(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
