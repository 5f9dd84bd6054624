"""In how many queues CUDA launches: CUDA_DEVICE_MAX_CONNECTIONS, read in one place."""

from __future__ import annotations

import os

import torch

from megatron_scmoe.config import ConfigError

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
MOST = 32
"""By CUDA's programming guide; without the variable there are 8."""


def asked_for() -> int | None:
    """The number that the variable asks for, on a GPU or not; None where it is not set.

    Raises:
        ConfigError: where it is no plain number. CUDA may read one in it, such as 1 in ' 1', and Megatron, which
            compares texts, none.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    if text not in map(str, range(1, MOST + 1)):
        raise ConfigError(
            f"CUDA launches in 1 to {MOST} queues: {VARIABLE} is {text!r}; write a number from 1 to {MOST} and nothing "
            "else, or unset it"
        )
    return int(text)


def launches_in_one() -> bool:
    """Whether this process launches on a GPU, and everything in one queue."""
    return torch.cuda.is_available() and asked_for() == 1
