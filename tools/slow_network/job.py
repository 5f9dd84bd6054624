"""One command on every rank: started together, watched, and stopped together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

from slow_network.network import SlowNetwork

OUTPUTS = ("all", "prefix", "rank0")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_BYTES = 4000  # of a hidden rank's output, shown when the job fails
_PATIENCE_S = 5.0  # for killed processes to end


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its exit code, that of each rank (None: never seen to end), bytes on the wire and seconds."""

    exit_code: int
    rank_exit_codes: list[int | None]
    bytes_sent: list[int]
    seconds: float


@contextlib.contextmanager
def signals() -> Iterator[socket.socket]:
    """Yield a socket on which each SIGINT, SIGTERM or SIGHUP arrives as one byte, instead of ending the process."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        caught = [number for number in _SIGNALS if number != signal.SIGHUP or not under_nohup]
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in caught}
        old_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)


class Job:
    """A command on every rank of a network; see `run`.

    Args:
        network: An entered network.
        argv: The command.
        output: 'all' hands the ranks this process's stdout and stderr, 'prefix' puts the rank before every line,
            'rank0' keeps the other ranks' output back unless the job fails.
        grace_s: How long ranks have between SIGTERM and SIGKILL.
    """

    def __init__(self, network: SlowNetwork, argv: list[str], *, output: str, grace_s: float):
        self._network = network
        # A rank dies with this process, even if that is killed; what a rank has started, the next start removes.
        self._argv = ["setpriv", "--pdeathsig", "KILL", "--", *argv]
        self._output = output
        self._grace_s = grace_s
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen[Any]] = []
        self._hidden: dict[int, IO[bytes]] = {}
        self._lines: list[_PrefixedLines] = []
        self._exit_codes: list[int | None] = [None] * network.num_ranks
        self._exit_code: int | None = None  # set by what ended the job early
        self._deadline_s: float | None = None

    def run(self, stops: socket.socket) -> Outcome:
        """Run the command on all ranks; return when none is left. `stops` is what `signals` yields."""
        start_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._selector)
            self._selector.register(stops, selectors.EVENT_READ, lambda: self._on_signal(stops))
            for rank in range(self._network.num_ranks):
                self._start(rank, stack)
            self._watch()
            seconds = time.monotonic() - start_s
            bytes_sent = self._network.bytes_sent()
            self._network.kill()  # what the ranks have started and left
            for lines in self._lines:
                lines.finish()
            if self._exit_code is not None:
                self._show_hidden()
        return Outcome(self._exit_code or 0, self._exit_codes, bytes_sent, seconds)

    def _start(self, rank: int, stack: contextlib.ExitStack) -> None:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL}
        if self._output == "prefix":
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
        elif self._output == "rank0" and rank > 0:
            file: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - it is one
            self._hidden[rank] = file
            options |= {"stdout": file, "stderr": subprocess.STDOUT}
        process = self._network.popen(rank, self._argv, **options)
        self._processes.append(process)
        pidfd = os.pidfd_open(process.pid)
        stack.callback(os.close, pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(rank, pidfd))
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if source is not None:
                stack.enter_context(source)
                lines = _PrefixedLines(source.fileno(), target.buffer, f"[rank {rank}] ".encode())
                self._lines.append(lines)
                self._selector.register(source, selectors.EVENT_READ, self._reading(source, lines))

    def _reading(self, source: IO[bytes], lines: _PrefixedLines) -> Callable[[], None]:
        def on_readable() -> None:
            if not lines.read():
                self._selector.unregister(source)

        return on_readable

    def _watch(self) -> None:
        is_killed = False
        while None in self._exit_codes:
            left_s = None if self._deadline_s is None else self._deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                if is_killed:
                    return  # it sleeps in the kernel
                self._network.kill()
                self._deadline_s, is_killed = time.monotonic() + _PATIENCE_S, True
                continue
            for key, _ in self._selector.select(left_s):
                key.data()

    def _on_exit(self, rank: int, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        code = self._processes[rank].wait()
        self._exit_codes[rank] = code if code >= 0 else 128 - code
        if code and self._exit_code is None:
            how = f"exited with {code}" if code > 0 else f"was killed by {_signal_name(-code)}"
            self._stop(self._exit_codes[rank] or 1, f"rank {rank} {how}")

    def _on_signal(self, stops: socket.socket) -> None:
        for number in stops.recv(64):
            if number not in _SIGNALS:
                continue
            if self._exit_code is None:
                self._stop(128 + number, f"stopped by {_signal_name(number)}")
            else:
                self._deadline_s = time.monotonic()  # asked twice

    def _stop(self, exit_code: int, reason: str) -> None:
        self._exit_code = exit_code
        self._deadline_s = time.monotonic() + self._grace_s
        others = "; ending the other ranks" if None in self._exit_codes else ""
        print(f"slow_link: {reason}{others}", file=sys.stderr, flush=True)
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    def _show_hidden(self) -> None:
        for rank, file in self._hidden.items():
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            text = file.read().decode(errors="replace").rstrip()
            print(f"slow_link: the last output of rank {rank}:{'' if text else ' none'}", file=sys.stderr)
            if text:
                print(text, file=sys.stderr)


class _PrefixedLines:
    """Hands whole lines from a pipe to a stream, each with a prefix."""

    def __init__(self, fd: int, target: BinaryIO, prefix: bytes):
        self._fd, self._target, self._prefix = fd, target, prefix
        self._rest = b""
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Hand on what is there; return whether more may come."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._write(lines)
        return bool(data)

    def finish(self) -> None:
        """Hand on all that is left, a last line without an end, too."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 1 << 16):
                self._rest += data
        if self._rest:
            self._write(self._rest.removesuffix(b"\n").split(b"\n"))

    def _write(self, lines: list[bytes]) -> None:
        if lines:
            self._target.write(b"".join(self._prefix + line + b"\n" for line in lines))
            self._target.flush()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
