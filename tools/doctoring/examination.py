"""All checks, one after another, on all ranks: each rank looks, rank 0 judges, and all hear how it goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from doctoring.check import Check, Finding, Status, not_tried, problem
from doctoring.job import Job
from doctoring.watch import GRACE_S, Watch
from megatron_scmoe.job.beats import Beat, heard
from megatron_scmoe.job.last_words import describe
from megatron_scmoe.job.meeting import store_lives
from megatron_scmoe.job.roll_call import in_words
from megatron_scmoe.mcore.silence import silence

PATIENCE_S = 8.0
"""How long a check may go on where a rank has failed in it: collectives notice one that is gone, and none that left."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        name: of the check; ``start`` where none was under way.
        findings: of it.
        seconds: that it took.
        seen: by rank, what the ranks saw.
    """

    name: str
    findings: list[Finding]
    seconds: float = 0.0
    seen: list[Any] = field(default_factory=list)

    @property
    def status(self) -> Status:
        """That of the worst finding; not tried, where nothing was."""
        found = {finding.status for finding in self.findings}
        return next(status for status in (Status.PROBLEM, Status.OK, Status.NOT_TRIED) if status in found)


class Examination:
    """Checks on their way; every rank has one.

    Args:
        job: that is examined.
        checks: of it, in their order.
        limit_s: of each check, to which the network's time comes.

    Attributes:
        limit_s: as given.
        outcomes: of the checks that are done; on rank 0 alone.
    """

    def __init__(self, job: Job, checks: Sequence[Check], limit_s: float) -> None:
        self._job, self._checks, self.limit_s = job, checks, limit_s
        self._store: dist.Store = job.meeting.store
        self._under_way: Check | None = None
        self._failed_s: float | None = None
        self.outcomes: list[Outcome] = []

    @property
    def place(self) -> str:
        """Where it is."""
        return "between checks, or after them" if self._under_way is None else f"check {self._under_way.name}"

    def run(self, watch: Watch) -> None:
        """Go through the checks."""
        lost = ""  # why nothing more is tried, alike on all ranks
        for number, check in enumerate(self._checks, start=1):
            limit_s = self.limit_s + (self._job.network_s if check.name == "network" else 0.0)
            if lost:
                self.outcomes.append(Outcome(check.name, [not_tried(lost)]))
                continue
            if self._job.rank == 0:
                words = f"doctor.py: {number} of {len(self._checks)}: {check.name}, {limit_s:.0f} s at most"
                print(words, file=sys.stderr, flush=True)
            self._under_way = check
            with watch.limited(limit_s):
                lost = self._examine(check) or lost
            self._under_way = None

    def _examine(self, check: Check) -> str:
        """Why nothing more is tried behind this check; empty where the next one is."""
        began_s = time.monotonic()
        try:
            with silence():
                seen = {"seen": check.look(self._job)}
        except Exception as error:  # whatever it is: the others must hear of it
            seen = {"failed": describe(error)}
        with store_lives():
            if "failed" in seen:
                self._store.set(_failed(check), f"rank {self._job.rank}: {seen['failed']}")
            self._store.set(_key(check, self._job.rank), json.dumps(seen))
        return self._job.meeting.told(check.name, lambda: self._judge(check, began_s))

    def _judge(self, check: Check, began_s: float) -> str:
        """On rank 0: wait for what all have seen, and add the outcome; returns what ``_examine`` does."""
        missing = self._job.meeting.missing(lambda rank: _key(check, rank), range(self._job.world_size))
        if missing:
            lost = f"{in_words(missing)} did not answer in check {check.name}"
            self._add(check, [problem(lost, "see what it printed, and whether it is alive")], began_s, [])
            return lost
        answers = [json.loads(self._store.get(_key(check, rank))) for rank in range(self._job.world_size)]
        failed: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if "failed" in answer:
                failed.setdefault(answer["failed"], []).append(rank)
        if failed:
            found = [problem(f"{in_words(ranks)}: {why}", "mend that first") for why, ranks in failed.items()]
            self._add(check, found, began_s, answers)
            return f"check {check.name} has failed" if check.communicates else ""
        seen = [answer["seen"] for answer in answers]
        self._add(check, check.judge(self._job, seen), began_s, seen)
        return ""

    def _add(self, check: Check, findings: list[Finding], began_s: float, seen: list[Any]) -> None:
        self.outcomes.append(Outcome(check.name, findings, time.monotonic() - began_s, seen))

    def _heard(self, store: dist.Store) -> list[Beat | None]:
        return [heard(store, rank) for rank in range(self._job.world_size)]

    def lost_hope(self, store: dist.Store) -> str:
        """Why the check under way will not end: another rank has failed in it for a while. Empty where it may.

        Args:
            store: another connection to the job's.
        """
        check = self._under_way
        if check is None or not store.check([_failed(check)]):
            self._failed_s = None
            return ""
        now_s = time.monotonic()
        self._failed_s = self._failed_s or now_s
        return store.get(_failed(check)).decode() if now_s - self._failed_s > PATIENCE_S else ""

    def _who_is_late(self, check: Check, store: dist.Store) -> str:
        others = range(1, self._job.world_size)
        before = self._heard(store)
        time.sleep(GRACE_S)
        after = self._heard(store)
        if silent := [rank for rank in others if before[rank] == after[rank]]:
            return f"{in_words(silent)} said nothing more"
        late = [rank for rank in others if not store.check([_key(check, rank)])]
        return f"{in_words(late)} did not answer" if late else ""

    def cut_short(self, why: str, store: dist.Store) -> list[Outcome]:
        """The outcomes where this process ends now, for which rank 0's main thread may wait in vain.

        Args:
            why: in words.
            store: another connection to the job's.
        """
        check = self._under_way
        if check is None:
            return [*self.outcomes, Outcome("start", [problem(why, "start it again")])]
        try:
            who = self._who_is_late(check, store)
        except dist.DistError:  # torchrun, whose store it is, is gone
            who = "the job's store is gone"
        found = problem(f"{why}{': ' * bool(who)}{who}", "see what these ranks printed, and whether they are alive")
        rest = self._checks[self._checks.index(check) + 1 :]
        never = not_tried(f"check {check.name} was not over")
        return [*self.outcomes, Outcome(check.name, [found]), *(Outcome(one.name, [never]) for one in rest)]


def _key(check: Check, rank: int) -> str:
    return f"seen/{check.name}/{rank}"


def _failed(check: Check) -> str:
    return f"failed/{check.name}"
