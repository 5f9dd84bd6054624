"""All ranks of a job mean the same: compared before a model, or any process group, is made.

A node with another command line, version or copy of the data trains to the end with wrong results, or hangs in the
first collective whose sizes differ. So each rank writes down what it means, rank 0 compares, and all ranks get its
verdict, through the store that the process groups are made with later.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import megatron_scmoe
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job.meeting import Meeting, store_lives
from megatron_scmoe.job.roll_call import in_words
from megatron_scmoe.mcore.datasets import dataset_prefixes

OF_ONE_RANK = ("rank", "local_rank")
"""What may differ in Megatron's namespace."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "numpy")
ENVIRONMENT = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "TORCH_DISTRIBUTED_DEBUG",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_FAMILIES = ("NCCL_", "TORCH_NCCL_", "NVTE_")
"""With what the names of variables begin that decide how collectives, and kernels beside them, run."""
_OF_A_NODE = re.compile(r"NCCL_(DEBUG.*|HOSTID|IB_HCA|IB_GID_INDEX|IB_ADDR_.*)|.*_(IFNAME|FILE|PATH|DIR|HOME|ROOT)")
"""What of these may differ from node to node: interfaces, adapters, places of files, and what is printed."""
TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
NOT_SET = "not set"
SHOWN = 3  # differing fields that the refusal names


def meant(args: Namespace) -> dict[str, str]:
    """What this rank means, by field: validated flags, versions, code, environment, sizes of data."""
    settings = {
        f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in OF_ONE_RANK
    }
    return settings | versions() | environment() | dict(_files(args))


def environment() -> dict[str, str]:
    """The variables of this process that change what a rank does, and those that would if they were set."""
    return {name: os.environ.get(name, NOT_SET) for name in ENVIRONMENT} | {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_FAMILIES) and not _OF_A_NODE.fullmatch(name)
    }


def versions() -> dict[str, str]:
    """Of Python, of this package's code, of packages that a training runs, and of NCCL where there is CUDA."""
    found = {"Python": platform.python_version(), "the code of megatron_scmoe": _code_digest()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["NCCL"] = str(torch.cuda.nccl.version())
    return found


def _code_digest() -> str:
    """Of this package's sources: its version says nothing of an edit on one node."""
    folder = Path(megatron_scmoe.__file__).parent
    sources = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
    return hashlib.sha256(repr(sources).encode()).hexdigest()[:12]


def _files(args: Namespace) -> Iterable[tuple[str, str]]:
    """Sizes of datasets, hashes of tokenizer files, as this node sees them."""
    for prefix in dataset_prefixes(args):
        for path in (Path(prefix + ".bin"), Path(prefix + ".idx")):
            yield str(path), f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    for name in TOKENIZER_FILES:
        path = Path(getattr(args, name, None) or "")
        if path.is_file():
            yield str(path), hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def difference(all_meant: Sequence[Mapping[str, str]]) -> str:
    """The fields in which ranks differ, each with its values and their ranks; empty where all mean the same."""
    names = dict.fromkeys(name for one in all_meant for name in one)
    parts = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(all_meant):
            ranks_of.setdefault(one.get(name, NOT_SET), []).append(rank)
        if len(ranks_of) > 1:
            parts.append(
                f"{name} is " + " and ".join(f"{value} on {in_words(ranks)}" for value, ranks in ranks_of.items())
            )
    more = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return "; ".join(parts[:SHOWN]) + more


def check(args: Namespace, meeting: Meeting) -> None:
    """Raise ConfigError, on every rank, where ranks mean different things or some never come; all ranks call this.

    Args:
        args: Megatron's namespace, validated.
        meeting: of the ranks.
    """
    if meeting.world_size == 1:
        return
    with store_lives():
        meeting.store.set(_key_of(meeting.rank), json.dumps(meant(args)))
    meeting.told("same", lambda: _compare(meeting))


def _compare(meeting: Meeting) -> None:
    store, world_size = meeting.store, meeting.world_size
    if missing := meeting.missing(_key_of, range(world_size)):
        raise ConfigError(
            f"all ranks must mean the same: {in_words(missing)} of {world_size} did not say what they mean within "
            "--distributed-timeout-minutes; see what they printed"
        )
    texts = [store.get(_key_of(rank)) for rank in range(world_size)]
    for rank in range(world_size):
        store.delete_key(_key_of(rank))
    if len(set(texts)) > 1:
        found = difference([json.loads(text) for text in texts])
        raise ConfigError(
            f"all ranks must mean the same: {found}; start every node with the same command line, code and data"
        )


def _key_of(rank: int) -> str:
    return f"means/{rank}"
