"""A training under torchrun that can be struck: its processes, its losses to the last bit, what it has saved."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import runpy
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import psutil
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training import MODEL, PLAIN, ROOT

STEPS, INTERVAL, RANKS = 24, 2, 2
"""Of a training; steps from a checkpoint to the next; processes."""
_TRAINING = f"""--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant --train-iters {STEPS}
 --eval-iters 1 --eval-interval 1000 --log-interval 1 --num-workers 0 --no-create-attention-mask-in-dataloader
 --split 90,10,0 --tokenizer-type SentencePieceTokenizer --expert-model-parallel-size 2 --shortcut scmoe
 --save-interval {INTERVAL} --wandb-project chaos --wandb-exp-name chaos"""
WAYS = {
    "sync": "",
    "async": "--async-save --use-persistent-ckpt-worker --async-strategy mcore",
}
"""In which checkpoints are written."""
SCRIPT = "pretrain_gpt_scmoe.py"
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def prepare(folder: Path) -> None:
    """Write the data that ``Job`` trains on: this project's documents."""
    words = ["tools/preprocess_data.py", "--input", "docs", "--vocab-size", "512", "--output", str(folder / "data")]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


def flags(folder: Path, save: Path, way: str) -> list[str]:
    """Of a training with data of ``prepare(folder)``, which continues from what is in ``save``."""
    data = f"--data-path {folder}/data/text_document --tokenizer-model {folder}/data/tokenizer.model"
    places = f"--save {save} --load {save} --tensorboard-dir {folder}/tensorboard --wandb-save-dir {folder}/wandb"
    return f"{PLAIN} {MODEL} {_TRAINING} {data} {places} {WAYS[way]}".split()


class Ended(NamedTuple):
    """How a job ended.

    Attributes:
        exit_code: of the launcher, negative for a signal; None for one that had to be killed.
        seconds: until its last process was gone, or was found to stay.
        orphans: processes that stayed, in words.
    """

    exit_code: int | None
    seconds: float
    orphans: list[str]


class Job:
    """A launcher and its ranks; all are descendants of this process, which has no other ones, whatever happens to them.

    Args:
        flags: of the entry script.
        log: file for what they print.
        losses: file for the loss of each step.
        is_forked: launcher and ranks are forked from this process, which has imported what is slow, and torchrun's
            agent runs the entry script in them; else a torchrun is started as users do.
    """

    def __init__(self, flags: list[str], log: Path, losses: Path, *, is_forked: bool) -> None:
        self.log, self._losses = log, losses
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _become_launcher(flags, log, losses, is_forked)

    def losses(self) -> list[tuple[int, str]]:
        """Steps of this job and their losses, as hexadecimal floats."""
        if not self._losses.exists():
            return []
        lines = self._losses.read_text().splitlines()
        return [(int(step), loss) for step, loss in (line.split() for line in lines)]

    def launcher(self) -> int:
        """Its process."""
        return self._pid

    def ranks(self) -> list[int]:
        """Their processes, in order, of those that run the script; none where it has ended."""
        try:
            pids = sorted(child.pid for child in psutil.Process(self._pid).children())
        except psutil.NoSuchProcess:
            return []
        return [pid for pid in pids if not Path(_ended(str(self._losses), pid)).exists()]

    def exit_code(self) -> int | None:
        """Of the launcher; None while it lives."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait_until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """Whether it came to hold in time, and before the job ended."""
        deadline_s = time.monotonic() + limit_s
        while not holds():
            if self.exit_code() is not None or time.monotonic() > deadline_s:
                return False
            time.sleep(0.002)
        return True

    def wait_for_end(self, limit_s: float, alone_s: float = 10.0) -> Ended:
        """How it ends: the launcher in ``limit_s``, all others ``alone_s`` later. Whatever stays is killed."""
        began_s = time.monotonic()
        has_ended = self.wait_until(lambda: self.exit_code() is not None, limit_s) or self.exit_code() is not None
        deadline_s = time.monotonic() + alone_s
        while (left := _descendants()) and has_ended and time.monotonic() < deadline_s:
            time.sleep(0.05)
        seconds = time.monotonic() - began_s
        orphans = [f"{process.pid} {' '.join(process.cmdline())[:200]}" for process in left] if has_ended else []
        code = self.exit_code() if has_ended else None
        self.kill()
        return Ended(code, seconds, orphans)

    def kill(self) -> None:
        """All that live."""
        while left := _descendants():
            for process in left:
                process.kill()
            time.sleep(0.01)
        self.exit_code()

    def printed(self) -> str:
        """By all ranks and the launcher."""
        return self.log.read_text(errors="replace")


def adopt_orphans() -> None:
    """Let processes that lose their parents become children of this one; to be called once."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _descendants() -> list[psutil.Process]:
    """All that live; those that have ended are reaped, but for the launcher, whose exit code is asked for."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _become_launcher(flags: list[str], log: Path, losses: Path, is_forked: bool) -> NoReturn:
    """In the child; never returns."""
    code = 1
    try:
        for number, path in enumerate([os.devnull, log, log]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        stand_in = str(Path(__file__).parent / "exact_losses")
        os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "EXACT_LOSSES": str(losses)}
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), stand_in])
        os.chdir(ROOT)
        if not is_forked:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
            os.execv(sys.executable, [sys.executable, *torchrun, SCRIPT, *flags])
        sys.path[:0] = [str(ROOT), stand_in]
        elastic_launch(LAUNCH, _rank)(flags)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:  # never back into the caller
        os._exit(code)


LAUNCH = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=RANKS,
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    start_method="fork",
    max_restarts=0,
)
"""torchrun --standalone, but for processes that are forked."""


def _rank(flags: list[str]) -> None:
    """The entry script in a forked process."""
    torch.set_num_threads(1)
    sys.argv[:] = [SCRIPT, *flags]
    try:
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    finally:
        # Behind it a rank waits for an event of torch's launcher of functions, which waits for ever in turn where one
        # is killed there (its own comment says so). torchrun starts programs, and has no such event.
        Path(_ended(os.environ["EXACT_LOSSES"], os.getpid())).touch()


def _ended(losses: str, pid: int) -> str:
    """A file that is there when a rank's script has ended."""
    return f"{losses}.{pid}"


def tracker(save: Path) -> int | None:
    """The step that Megatron's tracker names; None where it names none."""
    try:
        return int((save / "latest_checkpointed_iteration.txt").read_text())
    except (OSError, ValueError):
        return None


def steps_saved(printed: str) -> set[int]:
    """Steps of which a log says that their checkpoints were written."""
    return {int(step) for step in re.findall(r"successfully saved checkpoint from iteration +(\d+)", printed)}


def continued_from(printed: str) -> int | None:
    """The step that a log says was loaded; 0 for a start without one, None where it does not come so far."""
    if found := re.search(r"successfully loaded checkpoint from .* at iteration (\d+)", printed):
        return int(found[1])
    return 0 if "will not load any checkpoints and will start from random" in printed else None
