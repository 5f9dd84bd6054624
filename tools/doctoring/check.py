"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from megatron_scmoe.job.roll_call import in_words

if TYPE_CHECKING:
    from doctoring.job import Job


class Status(StrEnum):
    """Of a finding."""

    OK = "ok"
    PROBLEM = "problem"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found.

    Attributes:
        status: of it.
        text: in one line, with the values.
        fix: of a problem.
    """

    status: Status
    text: str
    fix: str = ""

    def in_words(self) -> str:
        """On one line."""
        return f"{self.text}; {self.fix}" if self.fix else self.text


def ok(text: str) -> Finding:
    """As it should be."""
    return Finding(Status.OK, text)


def problem(text: str, fix: str) -> Finding:
    """Something to mend."""
    return Finding(Status.PROBLEM, text, fix)


def not_tried(text: str) -> Finding:
    """What this machine, or this request, has no means to try: it proves nothing."""
    return Finding(Status.NOT_TRIED, text)


class Check(Protocol):
    """One subject. Every rank looks; rank 0 judges what all have seen, and nothing else.

    Attributes:
        name: in ``CATALOG``.
        communicates: whether looking needs process groups, so that all ranks look together or none does.
    """

    name: str
    communicates: bool

    def look(self, job: Job) -> Any:
        """What this rank sees, as JSON can say it; may raise."""

    def judge(self, job: Job, seen: Sequence[Any]) -> list[Finding]:
        """What follows from what the ranks have ``seen``, by rank."""


def by_ranks(findings_of: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Findings of single ranks, by rank, as one each for all ranks that have the same."""
    ranks_of: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(findings_of):
        for finding in dict.fromkeys(findings):
            ranks_of.setdefault(finding, []).append(rank)
    return [
        one if len(ranks) == len(findings_of) else Finding(one.status, f"{in_words(ranks)}: {one.text}", one.fix)
        for one, ranks in ranks_of.items()
    ]


def by_host(hosts: Sequence[str], ranks: Iterable[int] | None = None) -> dict[str, list[int]]:
    """Ranks of each host, in their order.

    Args:
        hosts: of all ranks, by rank.
        ranks: which; all, if not given.
    """
    found: dict[str, list[int]] = {}
    for rank in range(len(hosts)) if ranks is None else ranks:
        found.setdefault(hosts[rank], []).append(rank)
    return found
