"""Environment variables: what each that is set does to overlap, and which do harm."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from doctoring.check import Finding, by_ranks, not_tried, ok, problem
from doctoring.job import Job
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import sameness
from megatron_scmoe.training import queues

FAMILIES = ("NCCL_", "TORCH_NCCL_", "NVTE_", "GLOO_", "CUDA_", "PYTORCH_", "OMP_", "TORCH_DISTRIBUTED_", "CUBLAS_")

EFFECTS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "so many queues: with 1 a collective that waits holds up what is launched behind it",
    "NVTE_EXT_MARGIN_SM": "matrix products leave so many multiprocessors to NCCL",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "forward norms leave so many multiprocessors to NCCL",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "backward norms leave so many multiprocessors to NCCL",
    "NCCL_MAX_CTAS": "collectives take at most so many multiprocessors from the products beside them",
    "NCCL_MIN_CTAS": "collectives take at least so many multiprocessors from the products beside them",
    "NCCL_MAX_NCHANNELS": "collectives use at most so many channels, each of which takes a multiprocessor",
    "NCCL_MIN_NCHANNELS": "collectives use at least so many channels, each of which takes a multiprocessor",
    "NCCL_ALGO": "NCCL chooses no algorithm by itself",
    "NCCL_PROTO": "NCCL chooses no protocol by itself",
    "NCCL_SOCKET_IFNAME": "interfaces of NCCL's first contacts, and of all its traffic without InfiniBand",
    "NCCL_IB_HCA": "InfiniBand adapters that NCCL uses, where there are any",
    "NCCL_DEBUG": "NCCL says what it does",
    "TORCH_NCCL_HIGH_PRIORITY": "every collective is scheduled before products, not the all-to-all alone",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "what torch does where a collective fails or takes too long",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "torch from 2.8 on does so in any case",
    "PYTORCH_CUDA_ALLOC_CONF": "how memory is cut: experts get another number of rows in each step",
    "OMP_NUM_THREADS": "threads of each rank; without a GPU they compute",
    "GLOO_SOCKET_IFNAME": "the interface of gloo's traffic",
    "CUDA_VISIBLE_DEVICES": "GPUs that ranks see",
}
"""What variables do that do no harm by being set."""

_OF_FILES = re.compile("_(VERSION|HOME|PATH|ROOT|DIR|FILE)$")
"""Variables that say where something is, and what: images of containers set dozens."""


class Seen(NamedTuple):
    """One rank.

    Attributes:
        variables: of ``FAMILIES``.
        interfaces: of its network.
        infiniband: adapters.
        side_by_side: whether collectives fly beside one another, by the flags.
    """

    variables: Mapping[str, str]
    interfaces: Sequence[str]
    infiniband: Sequence[str]
    side_by_side: bool


class Rule(NamedTuple):
    """What harms.

    Attributes:
        names: of variables.
        harms: whether a value does.
        why: in words.
        fix: in words.
    """

    names: tuple[str, ...]
    harms: Callable[[str, Seen], bool]
    why: str
    fix: str


def _is_true(value: str, _seen: Seen) -> bool:
    return value.upper() in ("1", "T", "TRUE", "Y", "YES")


def _in_one_queue(value: str, seen: Seen) -> bool:
    return _is_true(value, seen) and seen.variables.get(queues.VARIABLE) == "1"


def _is_no_interface(value: str, seen: Seen) -> bool:
    return any(name not in seen.interfaces for name in value.split(","))


def _matches_no_interface(value: str, seen: Seen) -> bool:
    return "lo" not in value.lstrip("=").split(",") and not _matching(value, [x for x in seen.interfaces if x != "lo"])


def _matches_no_adapter(value: str, seen: Seen) -> bool:
    if not seen.infiniband:  # in a job that goes by TCP as it is: there is none to name
        return False
    return not _matching(re.sub(r":[0-9]+", "", value), seen.infiniband)  # of which a port may be named


def _matching(value: str, names: Sequence[str]) -> list[str]:
    """What NCCL takes of ``names``: by their beginnings; = makes them whole, and ^ names what is left out."""
    found = re.fullmatch(r"(\^?)(=?)(.*)", value)
    assert found is not None
    leaves_out, whole, words = bool(found[1]), bool(found[2]), found[3].split(",")
    matching = [one for one in names if any(one == word if whole else one.startswith(word) for word in words)]
    return [one for one in names if one not in matching] if leaves_out else matching


def _is_never(value: str, _seen: Seen) -> bool:
    return value.upper() in ("LOC", "0")


_SLOW = "it is for finding faults"
RULES = (
    Rule(("CUDA_LAUNCH_BLOCKING",), _is_true, "each launch waits for its kernel, so nothing overlaps", "unset it"),
    Rule(
        ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"),
        _is_true,
        "the host stands still in each wait and launches nothing beside a collective",
        "unset it",
    ),
    Rule(
        ("TORCH_NCCL_ENABLE_TIMING", "NCCL_ENABLE_TIMING", "TORCH_NCCL_DESYNC_DEBUG", "NCCL_DESYNC_DEBUG"),
        _in_one_queue,
        "in one queue no collective runs beside anything once torch times it (pytorch issue 143890)",
        f"unset it, or use {queues.VARIABLE}=32",
    ),
    Rule(
        ("TORCH_DISTRIBUTED_DEBUG",),
        lambda value, _: value.upper() == "DETAIL",
        f"ranks compare each collective before it starts: {_SLOW}",
        "unset it",
    ),
    Rule(
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"),
        lambda value, _: value == "0",
        "where a rank fails the others wait for it for ever",
        "unset it",
    ),
    Rule(("NCCL_P2P_DISABLE",), _is_true, "GPUs of a node go without NVLink, by way of host memory", "unset it"),
    Rule(("NCCL_P2P_LEVEL",), _is_never, "GPUs of a node go without NVLink, by way of host memory", "unset it"),
    Rule(
        ("NCCL_NET_GDR_LEVEL",),
        lambda value, seen: _is_never(value, seen) and bool(seen.infiniband),
        "what travels between nodes goes by way of host memory, though there is InfiniBand",
        "unset it",
    ),
    Rule(("NCCL_SHM_DISABLE",), _is_true, "GPUs of a node without NVLink speak by the network", "unset it"),
    Rule(
        ("NCCL_IB_DISABLE",),
        lambda value, seen: _is_true(value, seen) and bool(seen.infiniband),
        "NCCL goes by TCP though there is InfiniBand",
        "unset it",
    ),
    Rule(
        ("PYTORCH_NO_CUDA_MEMORY_CACHING",),
        lambda value, _: value not in ("", "0"),
        "each allocation waits for the GPU, so nothing overlaps",
        "unset it",
    ),
    Rule(
        (queues.VARIABLE,),
        lambda value, seen: value == "1" and seen.side_by_side,
        "with these flags collectives fly side by side, and in one queue hold one another up",
        "use 32, where Megatron does not insist on 1, or one chunk",
    ),
    Rule(
        ("OMP_NUM_THREADS",),
        lambda value, _: not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", value),
        "it is no number of threads",
        "set it to cores / ranks of this machine",
    ),
    Rule(
        ("GLOO_SOCKET_IFNAME",), _is_no_interface, "no interface of this machine has that name", "name one of ip link"
    ),
    Rule(
        ("NCCL_SOCKET_IFNAME",),
        _matches_no_interface,
        "no interface of this machine has such a name",
        "name one of ip link",
    ),
    Rule(
        ("NCCL_IB_HCA",),
        _matches_no_adapter,
        "no InfiniBand adapter of this machine has such a name, and NCCL goes by TCP",
        "name one of ibstat -l",
    ),
)


def judged(seen: Seen) -> list[Finding]:
    """What there is to say of one rank's variables."""
    found, wrong = [], set()
    for rule in RULES:
        for name in rule.names:
            value = seen.variables.get(name)
            if value is not None and rule.harms(value, seen):
                wrong.add(name)
                found.append(problem(f"{name} is {value!r}: {rule.why}", rule.fix))
    harmless = [name for name in EFFECTS if name in seen.variables and name not in wrong]
    found += [ok(f"{name}={seen.variables[name]}: {EFFECTS[name]}") for name in harmless]
    if queues.VARIABLE not in seen.variables:
        found.append(ok(f"{queues.VARIABLE} is not set, which is 8 queues; examples/launch.sh sets 32"))
    known = {*EFFECTS, *(name for rule in RULES for name in rule.names)}
    if unknown := sorted(name for name in seen.variables if name not in known and not _OF_FILES.search(name)):
        found.append(not_tried(f"what these do to overlap is not known here: {', '.join(unknown)}"))
    return found


class Environment:
    """See ``CATALOG``."""

    name, communicates = "environment", False

    def look(self, job: Job) -> dict[str, Any]:
        """Variables, what of them has to be the same on all ranks, and what they may name."""
        try:
            queues.asked_for()
            unreadable = ""
        except ConfigError as error:
            unreadable = str(error)
        adapters = Path("/sys/class/infiniband")
        return {
            "variables": {name: value for name, value in os.environ.items() if name.startswith(FAMILIES)},
            "alike": sameness.environment(),
            "unreadable": unreadable,
            "interfaces": [name for _, name in socket.if_nameindex()],
            "infiniband": sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else [],
            "side_by_side": bool(job.flags and job.flags.scmoe and job.flags.scmoe.flies_side_by_side),
        }

    def judge(self, job: Job, seen: Sequence[dict[str, Any]]) -> list[Finding]:
        """Differences between ranks, and then each rank by itself."""
        difference = sameness.difference([one["alike"] for one in seen])
        found = [problem(difference, "set it alike on every node")] if difference else []
        of_ranks = []
        for one in seen:
            unreadable, _, fix = one["unreadable"].partition("; ")
            mine = Seen(one["variables"], one["interfaces"], one["infiniband"], one["side_by_side"])
            of_ranks.append([problem(unreadable, fix)] if unreadable else judged(mine))
        return found + by_ranks(of_ranks)
