"""Which Megatron-Core this is: the versions that the seam was written for, and what this installation has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from argparse import ArgumentParser

from megatron_scmoe.config import ConfigError

SUPPORTED_CORE = ("0.19.2", "0.20")
"""Lowest tested version of megatron-core, and the first one that is refused."""


def check_core_version() -> None:
    """Raise ConfigError where megatron-core is not a version this seam was written for."""
    lowest, refused = SUPPORTED_CORE
    installed = importlib.metadata.version("megatron-core")
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:3] if part.isdigit())
    if not _numbers(lowest) <= numbers < _numbers(refused):
        raise ConfigError(
            f"megatron-core must be >={lowest},<{refused}: {installed} is installed; "
            f"pip install 'megatron-core=={lowest}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def mend_help(parser: ArgumentParser) -> None:
    """Escape bare percent signs in Megatron's help texts: argparse fails on them, and shows no help at all."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%(?![%(])", "%%", action.help.replace("%%", "%"))


def uses_torch_optimizers() -> bool:
    """Whether Core has neither Transformer Engine's nor Apex's optimizers to use."""
    return not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))
