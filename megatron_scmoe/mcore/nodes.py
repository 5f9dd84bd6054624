"""Which ranks of an expert-parallel group share a machine, and process groups across machines and within one."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_scmoe.config import ConfigError

_OURS = "--a2a-unique is node"


class Nodes(NamedTuple):
    """How an expert-parallel group of N x L ranks lies on N nodes, the ranks of a node behind one another.

    Attributes:
        across: the N ranks with this rank's local number on their nodes, by node.
        inside: the L ranks of this node.
    """

    across: dist.ProcessGroup
    inside: dist.ProcessGroup


@functools.cache
def boot() -> str:
    """Of the Linux that this process runs on, whatever its name; else its host's name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def this_node() -> str:
    """What NCCL, too, takes for one machine: one boot under one host name, or what NCCL_HOSTID says."""
    return os.environ.get("NCCL_HOSTID") or f"{socket.gethostname()} {boot()}"


@functools.cache
def nodes_of(group: dist.ProcessGroup) -> Nodes:
    """The nodes of an expert-parallel ``group``; all its ranks call this alike, and make process groups the first time.

    No rank of another group takes part: each makes two groups, in this order.

    Raises:
        ConfigError: on all ranks of the group, where it does not lie on nodes in equal parts of several ranks.
    """
    names: list[str] = [""] * group.size()
    dist.all_gather_object(names, this_node(), group=group)
    ranks = dist.get_process_group_ranks(group)
    size = ranks_of_a_node(names, ranks)
    node, local = divmod(group.rank(), size)
    across = _like(group, ranks[local::size], "expert-parallel ranks across nodes")
    return Nodes(across, _like(group, ranks[node * size : (node + 1) * size], "expert-parallel ranks of a node"))


def ranks_of_a_node(names: Sequence[str], ranks: Sequence[int]) -> int:
    """How many ranks of a group each of its nodes has.

    Args:
        names: of the node of each rank.
        ranks: of the group.

    Raises:
        ConfigError: where there is one node, or one rank on each, or nodes differ, or are mixed.
    """
    sizes = [len(list(same)) for _, same in groupby(names)]
    found = f"{_OURS}, and the expert-parallel group of {len(ranks)} ranks from {ranks[0]} to {ranks[-1]} has"
    if len(set(names)) < len(sizes):
        raise ConfigError(
            f"ranks of a node must be neighbours in their expert-parallel group: {found} its nodes mixed; start "
            "ranks node by node, or use --a2a-unique rank"
        )
    if len(sizes) == 1:
        raise ConfigError(f"within a node every rank is as near: {found} one node; use --a2a-unique rank")
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"nodes must have as many ranks of an expert-parallel group each: {found} {', '.join(map(str, sizes))} "
            "on its nodes; use another --expert-model-parallel-size, or --a2a-unique rank"
        )
    if sizes[0] == 1:
        raise ConfigError(f"where a node has one rank it is that rank: {found} one on each node; use --a2a-unique rank")
    return sizes[0]


def _like(group: dist.ProcessGroup, ranks: list[int], description: str) -> dist.ProcessGroup:
    """A group of some ranks of ``group``, which alone make it, with its backend, timeout and priority."""
    backend = dist.get_backend(group)
    nccl = backend == dist.Backend.NCCL
    own: Any = group._get_backend(torch.device("cuda" if nccl else "cpu")).options
    options: Any = None
    if nccl:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=own.is_high_priority_stream)
        options.config = own.config
    # Known to Core, which changes the timeouts of its groups later. As ranks of other groups stay away, each rank must
    # be in as many process groups so far: of Core's all ranks of a stage are.
    made = parallel_state.create_group(
        ranks,
        timeout=own._timeout,
        backend=backend,
        pg_options=options,
        use_local_synchronization=True,
        group_desc=description,
    )
    assert isinstance(made, dist.ProcessGroup)  # this rank is one of them
    return made
