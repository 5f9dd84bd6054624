"""Prediction layers of Core's GPT model, whose builder makes their spec by itself and has no place to change it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules


@contextlib.contextmanager
def changed_spec(
    change: Callable[[MultiTokenPredictionBlockSubmodules], MultiTokenPredictionBlockSubmodules],
) -> Iterator[None]:
    """Let models that Core's builder builds in here have ``change`` of its spec where they have prediction layers."""
    # Here alone: where Megatron has no GPT model, there are hybrid ones still.
    from megatron.training.models import gpt  # noqa: PLC0415

    stock = gpt.mtp_block_spec

    def changed(*args: Any, **kwargs: Any) -> MultiTokenPredictionBlockSubmodules | None:
        spec = stock(*args, **kwargs)
        return None if spec is None else change(spec)

    gpt.mtp_block_spec = changed
    try:
        yield
    finally:
        gpt.mtp_block_spec = stock
