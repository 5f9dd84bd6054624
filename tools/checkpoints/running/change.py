"""How far upcycling moves a model from what it computed, for every position that its routed experts could read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy

from checkpoints.running.verify import compare, logits_of, random_tokens

POSITIONS = ("pos1", "pos2", "pos3")


def function_change(
    source: Path, source_format: str, target: Path, *, moe_every: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Compare the logits of a model with those of what it was upcycled to, in fp32, before the first step.

    Args:
        source: the dense model, or the stock MoE.
        source_format: what its user calls it.
        target: the Megatron checkpoint made of it. Its parameters are the same for every position.
        moe_every: blocks in a group; only pos1 exists where it is 1.
        trust_remote_code: whether Python files of a Hugging Face folder may run.

    Returns:
        By position: the norm of the difference of all logits, relative to that of the source's; and how often the
        most likely token is the same.

    Raises:
        CheckpointError: where one of them does not run.
    """
    result = {}
    with tempfile.TemporaryDirectory(prefix="change-") as scratch:
        tokens = Path(scratch, "tokens.npy")
        numpy.save(tokens, random_tokens(source, target))
        before = logits_of(f"the source ({source_format})", source, tokens, trust_remote_code=trust_remote_code)
        for position in POSITIONS if moe_every > 1 else POSITIONS[:1]:
            settings = {"shortcut_position": [position]}
            found = compare(before, logits_of("the target (megatron)", target, tokens, settings=settings))
            result[position] = {name: found[name] for name in ("relative_difference", "same_first_choice")}
    return {"function_change_at_step_0": result}
