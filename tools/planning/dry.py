"""Dry runs of command lines, each in a process of its own: Megatron's settings are those of a process.

What the entry script would refuse is refused by the entry script's own code.
"""
# ruff: noqa: PLC0415 - Megatron takes seconds to import, for which a refusal of this tool's need not wait

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from command_line import UserError, one_line

from planning.flags import not_priced
from planning.unpriced import refuse

if TYPE_CHECKING:
    from megatron_scmoe.dry_run.stages import Stage

ENTRY_SCRIPT = "pretrain_gpt_scmoe.py"
_LAST_WORDS = 2000
"""Characters of stderr that are searched for a refusal."""


@dataclass(frozen=True)
class DryRun:
    """What the entry script says of a command line.

    Attributes:
        args: Megatron's namespace, validated; also what a machine without a GPU builds no model with.
        stages: of the pipeline, with parameters and memory.
        report: what ``DRY_RUN=1`` prints.
        not_priced: what of the command line a prediction leaves out, in words.
    """

    args: Namespace
    stages: list[Stage]
    report: str
    not_priced: list[str]


def dry_run(flags: Sequence[str], gpus: int, environment: Mapping[str, str] | None = None) -> DryRun:
    """The dry run of the entry script's ``flags`` on so many GPUs.

    Args:
        flags: of pretrain_gpt_scmoe.py.
        gpus: of the job.
        environment: added to this process's.

    Raises:
        UserError: with the entry script's own words, where it refuses; and for flags that no plan has a price for.
    """
    refuse(flags)
    load()
    ours, its = Pipe(duplex=False)
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        sys.stderr.flush()
        if not (pid := os.fork()):
            _be_the_entry_script(list(flags), gpus, dict(environment or {}), its, said.fileno())
        its.close()
        found = None
        try:
            found = ours.recv()
        except EOFError:
            pass
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if found is None:
            raise UserError(_refusal(said.fileno(), code))
    return found


def load() -> None:
    """Import the dry run here, once: the processes that do one inherit it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it says the same on every machine
    logging.disable(logging.WARNING)  # which packages a machine without a GPU does not have
    from megatron_scmoe.cpu import backend

    backend.install()  # before any import of Megatron, which decides at import time what it finds
    import megatron_scmoe.dry_run.run
    import megatron_scmoe.models.gpt
    import megatron_scmoe.models.hybrid  # noqa: F401 (for all of them)

    logging.disable(logging.NOTSET)


def _be_the_entry_script(
    flags: list[str], gpus: int, environment: dict[str, str], answer: Connection, said: int
) -> None:
    """Answer with a DryRun, or end with the entry script's exit code and words; never returns."""
    code: Any = 1
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(said, 2)
        # Megatron insists on one queue for tensor and context parallelism up to Hopper; where the run has more, the
        # entry script speaks for itself.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        os.environ.update(environment, RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(gpus))
        sys.argv[:] = [ENTRY_SCRIPT, *flags]
        answer.send(_found())
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _found() -> DryRun:
    from megatron_scmoe.config import ConfigError
    from megatron_scmoe.dry_run import local_spec, report, run
    from megatron_scmoe.training.arguments import refuse

    try:
        args, stages, gone = run.estimate()
    except ConfigError as error:
        refuse(str(error))
    text = report.text(args, stages, local_spec.flags_of(gone))
    asked = Namespace(**{**vars(args), **gone})
    return DryRun(asked, stages, text, not_priced(asked, sys.argv[1:]))


def _refusal(said: int, code: int) -> str:
    """The entry script's line, from all that it wrote to stderr."""
    size = os.fstat(said).st_size
    text = os.pread(said, _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace")
    lines = text.strip().splitlines() or [f"it ended with code {code} and without a word"]
    line = re.sub(rf"^{re.escape(ENTRY_SCRIPT)}: (refused|error): ", "", lines[-1])
    return f"{ENTRY_SCRIPT} refuses: {one_line(line)}"
