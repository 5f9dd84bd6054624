"""Pipeline stages: which blocks one holds, who speaks for it, and how stages tell one another something."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.distributed.distributed_c10d import _get_default_store


def blocks_of_stage(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None = None) -> list[int]:
    """Blocks that a (virtual) pipeline stage holds, counted from 0 over the whole model; ``pp_rank``: default this
    rank.
    """
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank)))


def stage_group() -> dist.ProcessGroup:
    """All ranks of this pipeline stage: tensor, context, expert and data parallel."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def stage_rank() -> int:
    """Which pipeline stage this rank belongs to."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_stage_root() -> bool:
    """Whether this rank speaks for its pipeline stage."""
    return dist.get_rank() == dist.get_process_group_ranks(stage_group())[0]


def is_last_of_stage() -> bool:
    """Whether this rank is the last one of its pipeline stage."""
    return dist.get_rank() == dist.get_process_group_ranks(stage_group())[-1]


class StageMail:
    """Texts from any rank to one that reads, without waiting: stages of a pipeline must not wait for one another here.

    Args:
        key: names the mail in the store that the process group was made with.
    """

    def __init__(self, key: str) -> None:
        self._store = _get_default_store()
        self._key = key
        self._read = 0

    def send(self, text: str) -> None:
        """Leave a text for the rank that reads."""
        number = self._store.add(f"{self._key}/count", 1)
        self._store.set(f"{self._key}/{number}", text)

    def receive(self) -> list[str]:
        """The texts that have come since the last call; they leave the store, which would grow with every step."""
        first, self._read = self._read + 1, self._store.add(f"{self._key}/count", 0)
        return [self._take(f"{self._key}/{number}") for number in range(first, self._read + 1)]

    def _take(self, key: str) -> str:
        text = self._store.get(key).decode()
        self._store.delete_key(key)
        return text
