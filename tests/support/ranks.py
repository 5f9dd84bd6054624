"""Gloo ranks for tests, forked in a moment from a process that has done the slow imports.

Importing torch and Megatron takes seconds per process. ``run`` starts one *fork server* (a fresh interpreter which does
the imports with one thread) and forks the ranks of every job from it:

    results = ranks.run(module_level_function, 4, argument, layout={"expert_model_parallel_size": 4})

A rank serves one job and is killed after it: a fork takes about 30 ms, less than taking process groups down, and
nothing is left for the next job. (Reused ranks were tried: gloo leaves three threads for every group, and Megatron
makes two dozen of them, so that a long session had thousands.) Nothing here depends on pytest.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import io
import operator
import os
import pickle
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

MAX_WORLD_SIZE = 8
GRACE_S = 1.0  # how long the other ranks may still report after the first failure
START_TIMEOUT_S = 180.0
OUTPUT_CHARS = 4000
_IMPORTED_EARLY = (
    "megatron.core.parallel_state",
    "megatron.training.training",
    # What a training run imports on its way, in each rank anew unless it is there: the first optimizer,
    "torch._dynamo",
    # the first tokenizer (it reads all of transformers, half of the time of a short run), the data, the log,
    "megatron.core.tokenizers.text.models",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.mimo",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
    # and the plugin.
    "megatron_scmoe.models.gpt",
    "megatron_scmoe.training.arguments",
    "megatron_scmoe.training.session",
)
_DIED = "died: "
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
# One thread per rank: more would fight for the cores, and a process with an OpenMP or BLAS
# thread pool must not be forked.
_SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",  # a killed rank cannot flush
}


class RankError(RuntimeError):
    """A job failed; ``rank`` is the first rank that failed, died or did not return."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class _Job:
    """What one rank has to run."""

    module: str
    qualname: str
    payload: bytes  # (args, kwargs), loaded only after sys.path is set
    sys_path: list[str]
    rank: int
    world_size: int
    directory: str
    timeout_s: float
    layout: dict[str, Any] | None
    seed: int
    distributed: bool


def _dump(value: Any) -> bytes:
    """Pickle a value with its tensors' contents.

    Connection.send would use torch's reducers, which pass shared memory descriptors that die with
    the worker; plain pickle would make the parent import Megatron, which replaces torch's loader.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _load(data: bytes) -> Any:
    """Inverse of ``_dump``; tensors of a CUDA device arrive on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)


# ---- the rank processes ---------------------------------------------------------------------

_cuda_devices = 0


def prepare() -> None:
    """Do once what every job would do anew and takes seconds: imports, parsing, and what a save starts."""
    if _cuda_devices == 0:
        # Must precede the first import of Megatron, which expects a CUDA device.
        importlib.import_module("megatron_scmoe.cpu.backend").install()
    for name in _IMPORTED_EARLY:
        importlib.import_module(name)
    # Megatron reads help texts from the sources of its classes, and each parser parses whole files anew.
    factory = importlib.import_module("megatron.training.argument_utils").ArgumentGroupFactory
    read = functools.cache(functools.partial(factory._get_field_docstrings, factory.__new__(factory)))
    factory._get_field_docstrings = lambda _self, config: read(config)
    importlib.import_module("megatron.training.arguments").add_megatron_arguments(argparse.ArgumentParser())
    # What a save has written comes back through another process, which imports torch anew in every rank. Asynchronous
    # saves alone need it.
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    writer._results_queue = queue.Queue()
    # A collection in a rank would visit all that was imported, and so copy most of the server's memory.
    gc.collect()
    gc.freeze()


def _serve(control_fd: int, directory: str) -> None:
    """Fork server: fork a worker or reap one, whichever the parent asks for, until it is gone."""
    global _cuda_devices
    torch.set_num_threads(1)
    _cuda_devices = torch.cuda.device_count()  # asks NVML, which leaves CUDA uninitialised
    if _cuda_devices == 0:  # with CUDA each worker imports Megatron itself: CUDA must not be forked
        prepare()
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"cannot fork workers from a process with {threads} threads")
    control = Connection(control_fd)
    control.send("ready")
    children: set[int] = set()
    while True:
        try:
            request = control.recv()
        except EOFError:  # the parent ended, perhaps by SIGKILL
            for pid in children:
                os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(directory, ignore_errors=True)
            os._exit(0)
        if request["op"] == "reap":
            children.remove(request["pid"])
            control.send(os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1]))
            continue
        handle = reduction.recv_handle(control)
        pid = os.fork()
        if pid == 0:
            control.close()
            _work(Connection(handle), request["stack_path"])
        # Both sides set the group, so that it exists whichever runs first.
        os.setpgid(pid, pid)
        os.close(handle)
        children.add(pid)
        control.send(pid)


def _work(connection: Connection, stack_path: str) -> None:
    """Worker: run one job, then wait to be killed."""
    os.setpgid(0, 0)  # killing the group also ends what a job started, e.g. data loader workers
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive the fork server
    stack_fd = os.open(stack_path, os.O_WRONLY)
    faulthandler.register(signal.SIGUSR1, file=stack_fd, all_threads=True)
    try:
        _reply(connection, prepare if _cuda_devices else lambda: None)
        job = pickle.loads(connection.recv_bytes())
        _redirect_output(Path(job.directory, f"output-{job.rank}"))
        _reply(connection, _run_job, job)
        connection.recv_bytes()  # stay until every rank is done: others may still wait for this one's sockets
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except BaseException:  # must never return into the fork server's loop
        traceback.print_exc()
        os._exit(1)


def _reply(connection: Connection, step: Callable[..., Any], *args: Any) -> None:
    """Run one step and send its pickled result, or its traceback."""
    reply: tuple[bool, bytes | str]
    try:
        reply = True, _dump(step(*args))
    except BaseException:  # also SystemExit: Megatron calls sys.exit, the worker must report it
        reply = False, traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(pickle.dumps(reply))


def _redirect_output(path: Path) -> None:
    """Send stdout and stderr, also those of C++ code and of children, to a file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable()  # a crash in C++ leaves its Python stack in the output


def _run_job(job: _Job) -> Any:
    """Set up torch.distributed and the layout, then call the function."""
    sys.path[:] = job.sys_path
    function = operator.attrgetter(job.qualname)(importlib.import_module(job.module))
    args, kwargs = _load(job.payload)
    if not job.distributed:
        return function(*args, **kwargs)
    os.environ.update(RANK=str(job.rank), LOCAL_RANK=str(job.rank), WORLD_SIZE=str(job.world_size))
    torch.set_num_threads(1)
    random.seed(job.seed)
    numpy.random.seed(job.seed)
    torch.manual_seed(job.seed)
    if _cuda_devices:
        torch.cuda.set_device(job.rank % _cuda_devices)
    dist.init_process_group(
        "nccl" if _cuda_devices >= job.world_size else "gloo",
        store=dist.FileStore(str(Path(job.directory, "store")), job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        # Longer than the job's limit: the parent's report has the stacks, this one would not.
        timeout=timedelta(seconds=2 * job.timeout_s),
    )
    if job.layout is not None:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(**job.layout)
        model_parallel_cuda_manual_seed(job.seed)
    return function(*args, **kwargs)


# ---- the parent -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """The parent's handle of one rank process."""

    pid: int
    pidfd: int  # readable once the process ended, even if its children keep the connection open
    connection: Connection
    stack_path: Path

    def stack(self) -> str:
        """Make the live process write the Python stacks of its threads, and return them."""
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while self.stack_path.stat().st_size == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.05)  # the handler writes line by line
        return self.stack_path.read_text(errors="replace") or "(no stack: the process is stopped)"


class _Pool:
    """The fork server and its workers."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        self._forked = 0
        self._directory = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._control, server_end = Pipe()
        serve = f"_serve({server_end.fileno()}, {str(self._directory)!r})"
        # Test modules import pytest, which takes long enough to be worth forking.
        imports = f"import {__name__} as r" + ", pytest" * ("pytest" in sys.modules)
        start = f"import sys; sys.path[:] = {sys.path!r}; {imports}; r.{serve}"
        log_path = self._directory / "server.log"
        with log_path.open("wb") as log, server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                env=os.environ | _SERVER_ENV,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[server_end.fileno()],
                start_new_session=True,  # Ctrl-C reaches the parent only, which then cleans up
            )
        try:
            if not self._control.poll(START_TIMEOUT_S):
                raise TimeoutError(f"the fork server took more than {START_TIMEOUT_S} s to start")
            self._control.recv()
        except BaseException as error:
            log_tail = _tail(log_path)
            self.close()
            if isinstance(error, EOFError):
                raise RuntimeError(f"the fork server did not start:\n{log_tail}") from None
            raise

    def close(self) -> None:
        """Kill every process of the pool."""
        if os.getpid() != self._owner:  # a forked child must not end its parent's pool
            return
        self._control.close()  # the server kills its workers, waits for no one and exits
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:  # workers follow it, by their parent-death signal
            self._process.kill()
            self._process.wait()
        for worker in self._workers:
            worker.connection.close()
            os.close(worker.pidfd)
        self._workers.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def run(self, job: _Job) -> list[bytes]:
        """Run the job on ``job.world_size`` new workers, and kill them."""
        directory = Path(tempfile.mkdtemp(prefix="job-", dir=self._directory))
        try:
            for _ in range(job.world_size):
                self._fork()
            workers = dict(enumerate(self._workers))
            jobs = [replace(job, rank=rank, directory=str(directory)) for rank in workers]
            self._collect(workers, jobs[0], START_TIMEOUT_S, "starting the workers for")
            self._send(workers, [pickle.dumps(j) for j in jobs])
            return self._collect(workers, jobs[0], job.timeout_s, "running")
        finally:
            for worker in list(self._workers):
                self._reap(worker)
            shutil.rmtree(directory, ignore_errors=True)

    def _fork(self) -> None:
        """Add one worker."""
        self._forked += 1
        stack_path = self._directory / f"stack-{self._forked}"
        stack_path.touch()
        connection, worker_end = Pipe()
        with worker_end:
            self._control.send({"op": "fork", "stack_path": str(stack_path)})
            reduction.send_handle(self._control, worker_end.fileno(), self._process.pid)
            pid = self._control.recv()
        self._workers.append(_Worker(pid, os.pidfd_open(pid), connection, stack_path))

    def _reap(self, worker: _Worker) -> int:
        """Kill a worker with all it started, unless it ended already; return its exit code."""
        os.killpg(worker.pid, signal.SIGKILL)
        self._control.send({"op": "reap", "pid": worker.pid})
        exit_code = self._control.recv()
        worker.connection.close()
        os.close(worker.pidfd)
        self._workers.remove(worker)
        return exit_code

    @staticmethod
    def _send(workers: dict[int, _Worker], messages: Sequence[bytes]) -> None:
        for worker, message in zip(workers.values(), messages, strict=True):
            # If it just died, _collect sees and reports it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send_bytes(message)

    def _collect(self, workers: dict[int, _Worker], job: _Job, timeout_s: float, doing: str) -> list[bytes]:
        """Wait for the reply of every rank; raise if one fails, dies or is late."""
        deadline = time.monotonic() + timeout_s
        pending = dict(workers)
        replies: dict[int, bytes] = {}
        failures: dict[int, str] = {}  # in order of arrival: the first is the likely cause
        while pending:
            handles = [h for w in pending.values() for h in (w.connection, w.pidfd)]
            ready = wait(handles, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank, worker in list(pending.items()):
                if worker.connection not in ready and worker.pidfd not in ready:
                    continue
                del pending[rank]
                try:
                    if not worker.connection.poll():
                        raise EOFError
                    succeeded, body = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    wait([worker.pidfd], GRACE_S)  # let it end by itself, for its own exit code
                    failures[rank] = f"{_DIED}{_describe(self._reap(worker))}"
                    continue
                (replies if succeeded else failures)[rank] = body
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not pending and not failures:
            return [replies[rank] for rank in workers]
        stuck = {rank: worker.stack() for rank, worker in pending.items()}
        raise _rank_error(job, doing, timeout_s, failures, stuck)


def _rank_error(job: _Job, doing: str, timeout_s: float, failures: dict[int, str], stuck: dict[int, str]) -> RankError:
    """Describe a failed job: every rank which failed or did not return, and what it printed."""
    # A death breaks the connections of the other ranks: their errors are consequences.
    failures = dict(sorted(failures.items(), key=lambda item: not item[1].startswith(_DIED)))
    what = f"{doing} {job.module}.{job.qualname} on {job.world_size} ranks"
    if failures:
        summary = f"rank {next(iter(failures))} failed {what}"
    else:
        names = ", ".join(str(rank) for rank in stuck)
        summary = f"rank {names} did not return within {timeout_s:g} s {what}"
    reports = failures | {r: f"did not return; its stack:\n{text}" for r, text in stuck.items()}
    lines = [summary]
    for rank, report in reports.items():
        lines.append(f"---- rank {rank}: {report.rstrip()}")
        output = _tail(Path(job.directory, f"output-{rank}")).rstrip()
        lines.append(f"---- rank {rank} output:\n{output}" if output else "(no output)")
    return RankError(next(iter(reports)), "\n".join(lines))


def _describe(exit_code: int) -> str:
    if exit_code < 0:
        return f"exit code {exit_code}, killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _tail(path: Path) -> str:
    return path.read_bytes()[-OUTPUT_CHARS:].decode(errors="replace") if path.exists() else ""


_lock = threading.Lock()
_pool: _Pool | None = None


def run(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    layout: dict[str, Any] | None = None,
    seed: int = 1234,
    distributed: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """Call ``fn(*args, **kwargs)`` on ``world_size`` ranks; return their results by rank.

    ``fn`` must be importable: a module level function, in a test module or a script. It runs with
    torch.distributed initialised (NCCL if there is a CUDA device per rank, otherwise gloo) and
    Python, numpy and torch seeded with ``seed``. With ``layout``, also
    ``parallel_state.initialize_model_parallel(**layout)`` and ``model_parallel_cuda_manual_seed``
    were called. Arguments and results are copied by pickle. Without ``distributed``, nothing of that: the
    function finds a process that is fresh, but for what is imported.

    Raises ``RankError`` if a rank raises, dies, or takes more than ``timeout_s`` seconds.
    """
    global _pool
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size must be between 1 and {MAX_WORLD_SIZE}, not {world_size}")
    module = fn.__module__
    if module == "__main__":  # a worker has another main module; it imports this one by its name
        main = sys.modules["__main__"]
        module = main.__spec__.name if main.__spec__ else Path(str(main.__file__)).stem
    job = _Job(
        module=module,
        qualname=fn.__qualname__,
        payload=_dump((args, kwargs)),
        sys_path=sys.path[:],
        rank=0,
        world_size=world_size,
        directory="",
        timeout_s=timeout_s,
        layout=layout,
        seed=seed,
        distributed=distributed,
    )
    with _lock:
        if _pool is None:
            _pool = _Pool()
            atexit.register(shutdown)
        try:
            results = _pool.run(job)
        except RankError:
            raise
        except BaseException as error:  # Ctrl-C may interrupt the talk with the fork server
            shutdown()
            if isinstance(error, (EOFError, BrokenPipeError, ConnectionResetError)):
                raise RuntimeError("the fork server ended; the next job starts another") from error
            raise
    return [_load(result) for result in results]


def shutdown() -> None:
    """Kill all processes of the pool; a later ``run`` starts it again."""
    global _pool
    atexit.unregister(shutdown)
    if _pool is not None:
        _pool.close()
        _pool = None
