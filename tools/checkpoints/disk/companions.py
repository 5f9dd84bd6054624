"""Small files beside the weights of a Hugging Face folder that go where the model goes: tokenizer and generation."""

from __future__ import annotations

import os
from pathlib import Path

from checkpoints.disk.files import inside
from checkpoints.tensors import CheckpointError

FOLDER = "tokenizer"
"""Where they lie beside a Megatron checkpoint; --tokenizer-model finds them there."""
TOKENIZER_CONFIG, SENTENCEPIECE = "tokenizer_config.json", "tokenizer.model"
GENERATION_CONFIG = "generation_config.json"
NAMES = (
    *(TOKENIZER_CONFIG, "tokenizer.json", SENTENCEPIECE, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", GENERATION_CONFIG),
)
"""None of them is code. What else is in a folder stays there."""
_MOST_BYTES = 1 << 28  # they are held in memory; the largest known have a tenth of this


def companions(folder: Path) -> dict[str, bytes]:
    """What ``folder`` has of these files, by name; refuses one that is no file of it, or too large for its name."""
    paths = [inside(folder, name, folder) for name in NAMES if os.path.lexists(folder / name)]
    for path in paths:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for its name; remove it")
    return {path.name: path.read_bytes() for path in paths}
