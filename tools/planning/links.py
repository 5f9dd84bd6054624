"""Links of the machine at hand: all-to-alls within its nodes, and between them, each alone.

Nodes are the launcher's (LOCAL_WORLD_SIZE), whatever a table says of a GPU's domain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from command_line import UserError

from planning import bench
from planning.hardware import Machine

Sent = Sequence[tuple[int, float]]
"""Bytes that each rank sends in all, and seconds of the all-to-all, the smallest first."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where the ranks are.

    Attributes:
        ranks: of the job.
        each: ranks of a node.
    """

    ranks: int
    each: int

    @classmethod
    def of_this_job(cls) -> Nodes:
        """As the launcher says. Raises UserError where it does not, or has nodes of different sizes."""
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks == 1:
            return cls(1, 1)
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not local.isdecimal() or int(local) < 1 or ranks % int(local):
            raise UserError(
                f"links are measured inside nodes and between them: LOCAL_WORLD_SIZE is {local or 'not set'} with "
                f"{ranks} ranks; start as many ranks on each node, by torchrun"
            )
        return cls(ranks, int(local))

    @property
    def count(self) -> int:
        """Of nodes."""
        return self.ranks // self.each

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """This rank's, by what they measure: the ranks of its node, and those in its place of each node.

        Raises:
            UserError: where ranks were told other sizes.
        """
        sizes: list[int] = [0] * self.ranks
        dist.all_gather_object(sizes, self.each)
        if len(set(sizes)) > 1:
            raise UserError(f"nodes have {min(sizes)} to {max(sizes)} ranks: start as many on each")
        found = {}
        if self.each > 1:
            nodes = [list(range(first, first + self.each)) for first in range(0, self.ranks, self.each)]
            found["inside a node"], _ = dist.new_subgroups_by_enumeration(nodes)
        if self.count > 1:
            places = [list(range(place, self.ranks, self.each)) for place in range(self.each)]
            found["between nodes"], _ = dist.new_subgroups_by_enumeration(places)
        return found


def measure(its: bench.Bench, nodes: Nodes, sizes: Sequence[int], done: Callable[[], object]) -> dict[str, Sent]:
    """Seconds of all-to-alls of so many bytes, by where they were; ``done`` is called behind each."""
    found: dict[str, Sent] = {}
    for where, group in nodes.groups().items() if nodes.ranks > 1 else ():
        timed = []
        for size in sizes:
            timed.append((size, bench.all_to_all_s(its, f"all-to-all {where}", group, size)))
            done()
        found[where] = timed
    return found


def with_links(machine: Machine, nodes: Nodes, sent: dict[str, Sent], nominal: str) -> Machine:
    """``machine`` with the rates of its all-to-alls and what a small one costs for each peer; its source says which.

    Args:
        machine: with the nominal rates of its links.
        nodes: where the ranks are.
        sent: what was measured, as ``measure`` returns it.
        nominal: where the nominal rates are from: "from the table", or "assumed".

    Raises:
        UserError: for times from which no rate follows.
    """
    hardware = machine.hardware
    if nodes.ranks > 1:
        hardware = replace(hardware, domain=nodes.each)
    changes, said = {}, []
    for where, name, size in (("inside a node", "link", nodes.each), ("between nodes", "network", nodes.count)):
        peak = getattr(hardware, name)
        if where not in sent:
            said.append(f"links {where} are not measured: {peak / 1e9:.3g} GB/s of each rank, {nominal}")
            continue
        rate = rate_of(sent[where], size, where)
        changes[name] = rate / peak
        faster = "faster than " if rate > peak else "of "
        said.append(
            f"links {where} are measured: {rate / 1e9:.3g} GB/s of each rank, {faster}{peak / 1e9:.3g} {nominal}"
        )
    if sent:
        peers = {"inside a node": nodes.each - 1, "between nodes": nodes.count - 1}
        changes["message_s"] = max(min(took for _, took in timed) / peers[where] for where, timed in sent.items())
    constants = replace(machine.constants, **changes)
    source = f"measured on {nodes.ranks} rank{'s' * (nodes.ranks > 1)} ({hardware.name}), {nodes.each} a node"
    return replace(machine, hardware=hardware, constants=constants, source="; ".join([source, *said]))


def rate_of(sent: Sent, ranks: int, where: str) -> float:
    """Bytes/s of a rank to its peers, by the smallest and the largest all-to-all of so many ranks.

    Raises:
        UserError: where the larger one was no slower.
    """
    (small, small_s), (large, large_s) = sent[0], sent[-1]
    if large_s <= small_s:
        raise UserError(
            f"no rate of links {where} follows from these times: {large:,} bytes took {large_s * 1e6:,.1f} us and "
            f"{small:,} bytes {small_s * 1e6:,.1f} us; measure while nothing else runs"
        )
    return (large - small) * (ranks - 1) / ranks / (large_s - small_s)
