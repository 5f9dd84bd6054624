"""One command on every rank: started together, watched, and stopped together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
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


class Job:
    """A command on every rank of a network; see `run`.

    Args:
        network: An entered network, by the time that it runs.
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
        self._processes: list[subprocess.Popen[Any]] = []
        self._hidden: dict[int, IO[bytes]] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._exit_codes: list[int | None] = [None] * network.num_ranks
        self._exit_code: int | None = None  # set by what ended the job early
        self._ended = asyncio.Event()
        self._limit = asyncio.timeout(None)

    def catch_signals(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP end the job, when it runs, and not the process."""
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in _SIGNALS:
            if number != signal.SIGHUP or not under_nohup:
                asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    async def run(self) -> Outcome:
        """Run the command on all ranks; return when none is left."""
        start_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            for rank in range(self._network.num_ranks):
                self._start(rank, stack)
            await self._watch()
            seconds = time.monotonic() - start_s
            bytes_sent = self._network.bytes_sent()
            self._network.kill()  # what the ranks have started and left
            if self._readers:
                await asyncio.wait(self._readers, timeout=_PATIENCE_S)
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
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit, rank, pidfd)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if source is not None:
                self._readers.append(asyncio.create_task(_hand_on(source, target.buffer, f"[rank {rank}] ".encode())))

    async def _watch(self) -> None:
        """Wait until all ranks have ended, or do not end though they were killed: then one sleeps in the kernel."""
        for patience_s in (None, _PATIENCE_S):
            self._limit = asyncio.timeout(patience_s)
            with contextlib.suppress(TimeoutError):
                async with self._limit:
                    await self._ended.wait()
                return
            self._network.kill()
        self._ended.set()

    def _end_in(self, seconds: float) -> None:
        self._limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def _on_exit(self, rank: int, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        code = self._processes[rank].wait()
        self._exit_codes[rank] = code if code >= 0 else 128 - code
        if code and self._exit_code is None:
            how = f"exited with {code}" if code > 0 else f"was killed by {_signal_name(-code)}"
            self._stop(self._exit_codes[rank] or 1, f"rank {rank} {how}")
        if None not in self._exit_codes:
            self._ended.set()

    def _on_signal(self, number: int) -> None:
        if self._ended.is_set():
            return
        if self._exit_code is None:
            self._stop(128 + number, f"stopped by {_signal_name(number)}")
        else:
            self._end_in(0)  # asked twice

    def _stop(self, exit_code: int, reason: str) -> None:
        self._exit_code = exit_code
        self._end_in(self._grace_s)
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


async def _hand_on(source: IO[bytes], target: BinaryIO, prefix: bytes) -> None:
    """Hand whole lines from a pipe to a stream, each with a prefix; at its end a last line without an end, too."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    rest = b""
    while data := await reader.read(1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        target.write(b"".join(prefix + line + b"\n" for line in lines))
        target.flush()
    if rest:
        target.write(prefix + rest + b"\n")
        target.flush()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
