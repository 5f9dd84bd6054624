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
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_scmoe
from megatron_scmoe.config import ConfigError
from megatron_scmoe.job.meeting import Meeting
from megatron_scmoe.mcore.datasets import dataset_prefixes

OF_ONE_RANK = ("rank", "local_rank")
"""What may differ in Megatron's namespace."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "numpy")
ENVIRONMENT = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "NCCL_PROTO", "TORCH_NCCL_ENABLE_TIMING")
"""What decides how collectives run. Names of interfaces and adapters may differ from node to node."""
TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
SHOWN = 3  # differing fields that the refusal names
SAY_EVERY_S = 30.0

_MEANS = "means/"


def meant(args: Namespace) -> dict[str, str]:
    """What this rank means, by field: validated flags, versions, code, environment, sizes of data."""
    settings = {
        f"--{name.replace('_', '-')}": str(value) for name, value in vars(args).items() if name not in OF_ONE_RANK
    }
    environment = {name: os.environ.get(name, "not set") for name in ENVIRONMENT}
    return settings | _versions() | environment | dict(_files(args))


def _versions() -> dict[str, str]:
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
            ranks_of.setdefault(one.get(name, "missing"), []).append(rank)
        if len(ranks_of) > 1:
            parts.append(
                f"{name} is " + " and ".join(f"{value} on {in_words(ranks)}" for value, ranks in ranks_of.items())
            )
    more = f"; and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return "; ".join(parts[:SHOWN]) + more


def in_words(ranks: Sequence[int]) -> str:
    """Such as ``rank 3`` or ``ranks 0-7, 9``; ``ranks`` ascend."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {words}"


def check(args: Namespace, meeting: Meeting) -> None:
    """Raise ConfigError, on every rank, where ranks mean different things or some never come; all ranks call this.

    Args:
        args: Megatron's namespace, validated.
        meeting: of the ranks.
    """
    if meeting.world_size == 1:
        return
    meeting.store.set(f"{_MEANS}{meeting.rank}", json.dumps(meant(args)))
    meeting.told("same", lambda: _compare(meeting))


def _compare(meeting: Meeting) -> None:
    store, world_size = meeting.store, meeting.world_size
    # Before the others give up waiting for what this one finds.
    if missing := _wait(store, range(world_size), 0.9 * meeting.limit_s):
        raise ConfigError(
            f"a job starts when all ranks are there: {in_words(missing)} of {world_size} did not come within "
            "--distributed-timeout-minutes; see what they printed, and the address of the first node"
        )
    texts = [store.get(f"{_MEANS}{rank}") for rank in range(world_size)]
    for rank in range(world_size):
        store.delete_key(f"{_MEANS}{rank}")
    if len(set(texts)) > 1:
        found = difference([json.loads(text) for text in texts])
        raise ConfigError(
            f"all ranks must mean the same: {found}; start every node with the same command line, code and data"
        )


def _wait(store: dist.Store, ranks: Iterable[int], limit_s: float) -> list[int]:
    """Wait until all have written; says now and then who has not, and returns who has not at the end."""
    began_s = said_s = time.monotonic()
    missing = list(ranks)
    while missing := [rank for rank in missing if not store.check([f"{_MEANS}{rank}"])]:
        now_s = time.monotonic()
        if now_s - began_s > limit_s:
            return missing
        if now_s - said_s > SAY_EVERY_S:
            said_s = now_s
            print(f" > waiting for {in_words(missing)} for {now_s - began_s:.0f} s", flush=True)
        time.sleep(0.1)
    return []
