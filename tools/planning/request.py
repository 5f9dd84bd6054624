"""What of plan.py's command line goes together, and which files it would destroy: refused before any work."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from itertools import combinations
from os.path import realpath

import atomic
from command_line import UserError

from planning import recipe, settings
from planning.hardware import CONSTANTS_FILE, HARDWARE

_OUTPUTS = ("json", "html", "write_recipe", "calibrate")
_OF_A_SEARCH = ("write_recipe", "keep", "top")


def check(args: Namespace) -> None:
    """Raise UserError for what cannot be done, before anything is."""
    given = [name for name, value in vars(args).items() if value not in (None, False, [])]
    for work, goes_with in (("calibrate", "gpu"), ("check", "")):
        if work in given and (others := [name for name in given if name not in (work, goes_with)]):
            raise UserError(f"{_flag(work)} is work of its own and has no use for {_flag(others[0])}; drop one of them")
    _check_outputs(args)
    if args.calibrate or args.check:
        return
    if not args.recipe and not args.flags:
        raise UserError("there is nothing to plan: give --recipe NAME, or flags of pretrain_gpt_scmoe.py behind --")
    if not args.recipe and not args.gpus:
        raise UserError("flags do not say on how many GPUs: give --gpus N")
    if bool(args.gpu) == bool(args.machine):
        raise UserError(f"a plan is for one kind of GPU: give --gpu, one of {', '.join(HARDWARE)}, or --machine FILE")
    if args.release and args.machine:
        raise UserError("--release chooses among the constants of a --gpu, and a --machine has its own; drop one")
    if args.network and args.machine:
        raise UserError(
            "--network is the port of a --gpu, and a --machine has the rate that was measured, or its own; drop one"
        )
    if unused := [name for name in _OF_A_SEARCH if name in given and not args.search]:
        raise UserError(f"{_flag(unused[0])} is for a search: add --search")


def _check_outputs(args: Namespace) -> None:
    """That each file can be written, and is neither another one nor read."""
    sources = [*(recipe.files(args.recipe) if args.recipe else []), *([args.machine] if args.machine else [])]
    outputs = [(_flag(name), path) for name in _OUTPUTS if (path := getattr(args, name))]
    if args.check:
        from planning.check import PAGE  # noqa: PLC0415 - reads tables

        outputs += [("--check's", PAGE), ("--check's", CONSTANTS_FILE)]
    for flag, path in outputs:
        if reason := atomic.obstacle_of_file(path, *sources):
            raise UserError(f"{flag} {path} cannot be written: {reason}; name another")
    for (first, path), (second, other) in combinations(outputs, 2):
        if realpath(path) == realpath(other):
            raise UserError(f"{first} and {second} are both {path}; name two files")


def gpus_instead(refusal: str, flags: Sequence[str], gpus: int) -> str:
    """What to add to Megatron's refusal of a number of GPUs that it cannot split; empty for what else it refuses.

    Args:
        refusal: in the entry script's words.
        flags: of the entry script.
        gpus: of the job.
    """
    if "Megatron's own rule" not in refusal or "divisible" not in refusal:
        return ""
    try:
        tp, cp, pp, ep, micro = (
            settings.whole_of(flags, name, "1")
            for name in (
                *("--tensor-model-parallel-size", "--context-parallel-size", "--pipeline-model-parallel-size"),
                *("--expert-model-parallel-size", "--micro-batch-size"),
            )
        )
        etp = settings.whole_of(flags, "--expert-tensor-parallel-size", str(tp))
        batch = settings.whole_of(flags, "--global-batch-size")
    except UserError:
        return ""  # the layout is not known by these flags
    replica, experts = tp * cp * pp, ep * etp * pp
    good = [
        replica * data
        for data in range(1, batch // micro + 1)
        if batch % (micro * data) == 0 and replica * data % experts == 0
    ]
    if gpus in good or not good:
        return ""
    nearest = [max((one for one in good if one < gpus), default=0), min((one for one in good if one > gpus), default=0)]
    return f"; this layout and batch take --gpus {' or '.join(str(one) for one in nearest if one)}, or give other sizes"


def _flag(name: str) -> str:
    return "flags behind --" if name == "flags" else f"--{name.replace('_', '-')}"
