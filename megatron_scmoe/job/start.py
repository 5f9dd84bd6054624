"""The start of a job, and its end."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import last_words, sameness, witness, writer
from megatron_scmoe.job.hangs import HangWatch, StepLimit
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore import fault_hooks


@contextlib.contextmanager
def joined(args: Namespace, meeting: Meeting, hang_limit_s: float) -> Iterator[None]:
    """Compare the ranks of this job, be the one that writes to --save, and watch all ranks until the block ends.

    Args:
        args: Megatron's namespace, validated.
        meeting: of the ranks.
        hang_limit_s: of a training step; negative to follow what is measured, 0 to watch nothing.

    Raises:
        ConfigError: where a rank means something else or does not come, or another job writes there.
    """
    store = meeting.store  # first: nothing is written by a process that reaches no others
    sameness.check(args, meeting)
    with contextlib.ExitStack() as stack:
        if args.save:
            meeting.told("writer", lambda: stack.enter_context(writer.only_one(Path(args.save))))
        if hang_limit_s != 0 and not args.enable_ft_package:  # whose client takes the place of ours
            watch = HangWatch(args, store, StepLimit(hang_limit_s))
            fault_hooks.follow_sections(watch)
            watch.start()
            stack.callback(watch.stop)
        witness.dismiss()
        with _speaking():
            yield


@contextlib.contextmanager
def _speaking() -> Iterator[None]:
    """Let the others know where this rank ends before its job does."""
    try:
        yield
    except SystemExit as ended:
        if ended.code:
            last_words.leave(f"exit code {ended.code}")
        raise
    except BaseException as error:
        last_words.leave(last_words.describe(error), is_refusal=isinstance(error, ConfigError))
        raise
    finally:
        last_words.all_is_said()
