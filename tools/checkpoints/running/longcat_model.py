"""LongcatFlash of transformers, also from published folders, which lack what its class has for zero experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.mappings.longcat import unused_tensors


def load(source: HFFolder, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """The model of a folder; rows of zero experts that it lacks are zeros, which no forward pass reads.

    The class is always that of transformers: Python files in the folder do not run.

    Args:
        source: its config.json has model_type longcat_flash.
        options: of ``from_pretrained``, ``output_loading_info`` among them.

    Returns:
        The model, and what transformers says of its tensors.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 (slow, and needed here alone)
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM  # noqa: PLC0415

    config = LongcatFlashConfig.from_pretrained(source.folder, local_files_only=True)
    state = {name: tensor for shard in source.shards for name, tensor in load_file(shard).items()}
    for name, shape in unused_tensors(config.to_dict()).items():
        state.setdefault(name, torch.zeros(()).expand(shape))  # a single number in memory
    return LongcatFlashForCausalLM.from_pretrained(None, config=config, state_dict=state, **options)
