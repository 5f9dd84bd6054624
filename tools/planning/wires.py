"""What collectives of one rank take: bytes inside a domain of fast links and between domains, and messages to peers."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, lgamma
from typing import NamedTuple

from megatron_scmoe.contracts import TransferName
from planning.hardware import Machine
from planning.rows import BF16, nbytes, nbytes_gathered, travelling
from planning.training import Dispatcher
from planning.workload import Moe, Workload


class Sent(NamedTuple):
    """What a rank sends in one collective, and how long it takes.

    Attributes:
        inside: bytes to ranks of its domain.
        between: bytes to others.
        seconds: until all has arrived.
    """

    inside: float
    between: float
    seconds: float

    def times(self, count: float) -> Sent:
        """So many of them, one after the other."""
        return Sent(self.inside * count, self.between * count, self.seconds * count)

    def then(self, other: Sent) -> Sent:
        """Both, one after the other."""
        return Sent(self.inside + other.inside, self.between + other.between, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of a collective, ``stride`` apart in the order of the GPUs.

    Attributes:
        machine: where they are.
        size: ranks.
        stride: between two of them.
    """

    machine: Machine
    size: int
    stride: int = 1

    @property
    def inside(self) -> int:
        """Ranks of one domain."""
        return max(1, min(self.size, self.machine.hardware.domain // self.stride))

    def _seconds(self, inside: float, between: float, messages: float) -> float:
        """Both ways at once: links and network are apart."""
        hardware, constants = self.machine.hardware, self.machine.constants
        moved = max(
            inside / (hardware.link * constants.link),
            between / (hardware.network * constants.network) if between else 0.0,
        )
        return moved + messages * constants.message_s

    def all_to_all(self, size: float) -> Sent:
        """Each rank sends ``size`` bytes in equal parts to all, itself included."""
        if self.size == 1:
            return Sent(0.0, 0.0, 0.0)
        inside = size * (self.inside - 1) / self.size
        between = size * (self.size - self.inside) / self.size
        return Sent(inside, between, self._seconds(inside, between, self.size - 1))

    def unique(self, tokens: float, copies: float, size: float, *, experts: int, limited: float = 1.0) -> Sent:
        """Each of ``tokens`` goes once to each rank that wants one of its ``copies``, and once to each domain.

        Balanced: a token's experts are any, and no two the same. Over the network a token goes once to each domain, and
        from there over its links.

        Args:
            tokens: of this rank.
            copies: experts of each.
            size: bytes of a token.
            experts: of all ranks.
            limited: part of the ranks among which a token's are.
        """
        if self.size == 1:
            return Sent(0.0, 0.0, 0.0)
        domains = self.size / self.inside
        ranks = _chosen(self.size * limited, copies, experts * limited)
        elsewhere = _chosen(max(1.0, domains * limited), copies, experts * limited) * (1 - 1 / domains)
        inside = tokens * size * ranks * (1 - 1 / self.inside)
        between = tokens * size * elsewhere
        return Sent(inside, between, self._seconds(inside, between, self.inside - 1 + domains - 1))

    def ring(self, size: float) -> Sent:
        """An all-gather or reduce-scatter whose whole is ``size`` bytes; a domain's ranks share its way out."""
        if self.size == 1:
            return Sent(0.0, 0.0, 0.0)
        inside = size * (self.inside - 1) / self.inside
        domains = self.size / self.inside
        between = size / self.inside * (domains - 1) / domains
        return Sent(inside, between, self._seconds(inside, between, self.inside - 1 + domains - 1))


def _chosen(ranks: float, copies: float, experts: float) -> float:
    """How many of so many ranks have at least one of ``copies`` different experts, of which each has as many.

    Of E experts e are a rank's; it has none of k with probability C(E - e, k) / C(E, k), as in
    ``megatron_scmoe.config.unique``, but here numbers need not be whole.
    """
    left = experts - experts / ranks
    if copies >= left + 1:  # more than others have
        return ranks
    none = lgamma(left + 1) - lgamma(left - copies + 1) + lgamma(experts - copies + 1) - lgamma(experts + 1)
    return ranks * (1 - exp(none))


class Groups:
    """The parallel groups of a workload, in Megatron's order of ranks: TP, CP, DP (or expert TP, EP, expert DP), PP.

    Args:
        workload: whose layout counts.
        machine: where it runs.
    """

    def __init__(self, workload: Workload, machine: Machine) -> None:
        layout = workload.layout
        self.workload = workload
        self.tp = Group(machine, layout.tp)
        self.cp = Group(machine, layout.cp, layout.tp)
        self.dp = Group(machine, layout.dp * layout.cp, layout.tp)
        self.etp = Group(machine, layout.etp)
        self.ep = Group(machine, layout.ep, layout.etp)
        self.expert_dp = Group(machine, layout.expert_dp, layout.etp * layout.ep)
        self.pp = Group(machine, layout.pp, layout.gpus // layout.pp)

    def flight(self, op: Moe, tokens: float, transfer: TransferName) -> Sent:
        """Carrying ``tokens`` of this rank to their experts, what these made of them back, or gradients of either."""
        rows = travelling(op, tokens, self.workload.training)
        each = nbytes(op, self.workload.hidden, transfer)
        if self.workload.training.dispatcher is Dispatcher.ALLTOALL:
            sent = self.ep.all_to_all(rows * each)
        else:
            sent = self.ep.unique(tokens * op.sent, op.top_k, each, experts=op.experts, limited=op.limited)
        if self.etp.size > 1:  # all ranks of an expert get all of its rows
            each = nbytes_gathered(op, self.workload.hidden, transfer)
            sent = sent.then(self.etp.ring(rows * each * self.etp.size))
        return sent

    def flights(self, op: Moe, tokens: float, again: float = 0.0) -> dict[str, tuple[Sent, Sent]]:
        """Dispatch and combine of ``tokens``, each forward and backward; forward ``again`` times within backward."""
        found = {}
        for kind in ("dispatch", "combine"):
            forward, backward = (TransferName.of(kind, backward=way) for way in (False, True))
            there = self.flight(op, tokens, forward)
            found[kind] = there, self.flight(op, tokens, backward).then(there.times(again))
        return found

    def tensors(self, kind: str, tokens: float, width: float) -> Sent:
        """A collective of ``kind`` over a tensor parallel group's ``tokens``; an all-reduce goes round twice."""
        sent = self.tp.ring(tokens * width * BF16)
        return sent.times(2) if kind == "all-reduce" else sent

    def handed_on(self, tokens: float) -> Sent:
        """What one stage hands to the next of ``tokens`` on this rank."""
        if self.pp.size == 1:
            return Sent(0.0, 0.0, 0.0)
        size = tokens * self.workload.hidden * BF16
        hardware, constants = self.pp.machine.hardware, self.pp.machine.constants
        if self.pp.inside == self.pp.size:  # else some hop leaves the domain, and the pipeline waits for that
            return Sent(size, 0.0, size / (hardware.link * constants.link) + constants.message_s)
        return Sent(0.0, size, size / (hardware.network * constants.network) + constants.message_s)
