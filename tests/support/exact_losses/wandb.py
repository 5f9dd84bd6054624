"""In the place of Weights & Biases: Megatron gives it each step's loss as it is, where its log has seven digits.

A line in the file $EXACT_LOSSES, written before the step's checkpoint and whole whatever ends the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """For what Megatron calls besides."""


init = finish = _ignore
config = SimpleNamespace(update=_ignore)
run = SimpleNamespace(entity="", project="", log_artifact=_ignore, use_artifact=_ignore)


def Artifact(*_args: Any, **_kwargs: Any) -> SimpleNamespace:
    """Of a checkpoint."""
    return SimpleNamespace(add_reference=_ignore, add_file=_ignore)


def log(values: Mapping[str, Any], step: int) -> None:
    """Called for each figure of a step."""
    if "lm loss" in values:
        with open(os.environ["EXACT_LOSSES"], "a") as file:
            file.write(f"{step} {float(values['lm loss']).hex()}\n")
