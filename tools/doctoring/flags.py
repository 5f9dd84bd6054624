"""The flags behind ``--``: whether the entry script takes them, and what Megatron makes of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.training.arguments import parse_args

from doctoring.check import Finding, by_ranks, not_tried, ok, problem
from doctoring.job import Changes, Flags, Job
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import sameness
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore.silence import silence
from megatron_scmoe.training.arguments import add_scmoe_arguments, validated_args

SCRIPT = "pretrain_gpt_scmoe.py"
SHOWN = 8  # values that follow from others, in one line
_OF_THE_START = ("rank", "world_size", "local_rank")


def read(given: list[str], meeting: Meeting) -> Flags:
    """What the entry script makes of the flags ``given``; all ranks call this, and Megatron's global ones are set."""
    before: dict[str, Any] = {}

    def meet(args: Namespace) -> Meeting:
        before.update(copy.deepcopy(vars(args)))
        return meeting

    refused, validated = _spoken(given, lambda: validated_args(meet))
    if validated is None:
        return Flags(given, refused)
    args, scmoe, _ = validated
    _, defaults = _spoken([], lambda: parse_args(add_scmoe_arguments))
    assert defaults is not None
    requested = {name: value for name, value in before.items() if value != getattr(defaults, name, None)}
    changed = changes(requested, before, args)
    return Flags(given, "", requested, changed, _meant(args), args, scmoe)


def agreed(flags: Flags, meeting: Meeting) -> Flags:
    """The flags, or, where ranks have others or some refuse, these without what process groups could be made by.

    All ranks call this: groups by flags that differ would wait for one another for ever.
    """

    def key(rank: int) -> str:
        return f"flags of {rank}"

    def are_alike() -> bool:
        everyone = range(meeting.world_size)
        return not meeting.missing(key, everyone) and len({meeting.store.get(key(rank)) for rank in everyone}) == 1

    meeting.store.set(key(meeting.rank), json.dumps(flags.meant, sort_keys=True))
    return flags if meeting.told("flags alike", are_alike) else replace(flags, args=None, scmoe=None)


def _meant(args: Namespace) -> dict[str, str]:
    """Flags in effect, and data as this rank sees them; what of these differs ends a training at its start."""
    of_others = sameness.versions() | sameness.environment()  # which are checks of their own
    return {name: value for name, value in sameness.meant(args).items() if name not in of_others}


def _spoken[T](given: list[str], ask: Callable[[], T]) -> tuple[str, T | None]:
    """What ``ask`` returns on the command line of the script, or why it refuses; in silence."""
    argv, errors = sys.argv, io.StringIO()
    sys.argv = [SCRIPT, *given]
    try:
        with silence(), contextlib.redirect_stderr(errors):
            return "", ask()
    except ConfigError as error:
        return str(error), None
    except SystemExit:  # of argparse, which has said why behind its usage
        return (errors.getvalue().splitlines() or ["no reason given"])[-1].removeprefix(f"{SCRIPT}: error: "), None
    finally:
        sys.argv = argv


def changes(requested: Mapping[str, Any], before: Mapping[str, Any], args: Namespace) -> tuple[Changes, Changes]:
    """Values before and behind validation where they differ: of flags that were given, and of others that had one."""
    given, other = {}, {}
    for name, value in before.items():
        after = getattr(args, name, None)
        if value == after or name in _OF_THE_START:
            continue
        if name in requested:
            given[name] = value, after
        elif value is not None:
            other[name] = value, after
    return given, other


def judged(given: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> list[Finding]:
    """What there is to say of ``changes``."""
    found = [
        ok(f"{_flag(name)}: {before} is requested, {after} is in effect") for name, (before, after) in given.items()
    ]
    if other:
        shown = [f"{_flag(name)} {before} -> {after}" for name, (before, after) in list(other.items())[:SHOWN]]
        more = f", and {len(other) - SHOWN} more (--json has all)" if len(other) > SHOWN else ""
        found.append(ok(f"Megatron changes defaults that no flag gave: {', '.join(shown)}{more}"))
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class FlagsCheck:
    """See ``CATALOG``."""

    name, communicates = "flags", False

    def look(self, job: Job) -> dict[str, Any]:
        """Why they are refused, or what changes."""
        if job.flags is None:
            return {"none": True}
        if job.flags.refused:
            return {"refused": job.flags.refused}
        given, other = job.flags.changes
        words = ({name: list(map(str, values)) for name, values in one.items()} for one in (given, other))
        changed = dict(zip(("given", "other"), words, strict=True))
        return changed | {"number": len(job.flags.requested), "meant": job.flags.meant}

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Differences between ranks, and then each rank by itself."""
        meant = [one.pop("meant", None) for one in seen]  # long, and in no report
        valid = [one for one in meant if one is not None]
        difference = sameness.difference(meant) if len(valid) == len(meant) else ""
        found = [problem(difference, "start every node with the same command line and data")] if difference else []
        return found + by_ranks([_of_rank(one) for one in seen])


def _of_rank(seen: Mapping[str, Any]) -> list[Finding]:
    if "none" in seen:
        return [not_tried(f"no flags were given; add -- and those of {SCRIPT}")]
    if "refused" in seen:
        rule, _, fix = seen["refused"].rpartition("; ")
        return [problem(f"{SCRIPT} refuses: {rule or fix}", fix if rule else "see its --help")]
    return [
        ok(f"{SCRIPT} takes them; {seen['number']} values are not the defaults"),
        *judged(seen["given"], seen["other"]),
    ]
