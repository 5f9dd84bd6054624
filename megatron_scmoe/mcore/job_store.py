"""The store that joins the ranks of a job, before and after Megatron has made its process groups with it."""

from __future__ import annotations

import os
from argparse import Namespace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_scmoe.config import ConfigError


def job_store(args: Namespace) -> dist.Store:
    """The store of the process group where there is one, else the one at MASTER_ADDR, for Megatron to make it with.

    Raises:
        ConfigError: where this process was told of no other, or cannot reach them.
    """
    if dist.is_initialized():
        return _get_default_store()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ConfigError(
            f"ranks find one another by MASTER_ADDR and MASTER_PORT: they are {address or 'not set'} and "
            f"{port or 'not set'}; start this script with torchrun, also on one GPU"
        )
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", args.rank, args.world_size, timeout=timeout)))
    except (dist.DistError, ValueError) as error:
        raise ConfigError(
            f"ranks find one another at MASTER_ADDR:MASTER_PORT: {address}:{port} cannot be used "
            f"({str(error).splitlines()[0]}); give the first node's address and a free port"
        ) from error
    return store
