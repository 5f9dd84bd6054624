"""Which step does this run continue from? The newest whose checkpoint is whole, whatever happened to the last save."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore import whole


def choose_step(args: Namespace, meeting: Meeting) -> None:
    """Set --ckpt-step to the newest whole checkpoint in --load, where the newest of all is damaged, and say so.

    Where Core's tracker is torn or gone, with which Core would end or begin with step 1, it is written anew.

    Raises:
        ConfigError: where none is whole, or the one that --ckpt-step names is not.
    """
    if args.load is None or args.ckpt_format != "torch_dist" or not os.path.isdir(args.load):  # noqa: PTH112 (never raises)
        return
    step, line = meeting.told("checkpoint", lambda: _whole_step(Path(args.load), args.ckpt_step))
    if line:
        args.ckpt_step = step
        if args.rank == 0:
            print(f" > {line}", flush=True)


def _whole_step(load: Path, asked: int | None) -> tuple[int | None, str]:
    """--ckpt-step as it is to be, and a line that says what was wrong."""
    line = _mend_tracker(load)
    newest = asked or whole.newest_iteration(load)
    if newest is None or not (flaw := whole.flaw(whole.folder_of(load, newest))):
        return asked, line
    damaged = f"the checkpoint of step {newest} in {load} is damaged: {flaw}"
    if asked:
        raise ConfigError(f"{damaged}; give another --ckpt-step, or none for the newest")
    for step in whole.whole_iterations(load, before=newest):
        return step, f"{damaged}; continuing from step {step}, the newest whole one"
    raise ConfigError(f"{damaged}, and no older one is whole; give another --load")


def _mend_tracker(load: Path) -> str:
    """Let Core's tracker name the newest whole step where it names none, and return a line that says so.

    Core writes it in place, so that a full disk or a crash may leave it empty. It reads it whatever --ckpt-step is.
    """
    says = whole.tracker_says(load)
    if says == "release" or whole.newest_iteration(load) is not None:
        return ""
    torn = f"{whole.TRACKER} in {load} " + ("is missing" if says is None else f"is damaged: it says {says!r}, no step")
    for step in whole.whole_iterations(load):
        try:
            whole.write_tracker(load, step)
        except OSError as error:
            raise ConfigError(f"{torn}, and cannot be written ({error.strerror}); write {step} in it") from error
        return f"{torn}; now it says {step}, the newest whole one"
    if says is None:
        return ""  # nothing was saved so far
    raise ConfigError(f"{torn}, and no checkpoint is whole; give another --load")
