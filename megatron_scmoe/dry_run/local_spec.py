"""What a machine without Transformer Engine builds in its place, and how the two differ in memory."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.training.models.base import ModelConfig

from megatron_scmoe.dry_run.meta import FlashAttention

TRANSFORMER_ENGINE = "--transformer-impl transformer_engine"
_NEED_A_GPU: dict[str, tuple[str, Any]] = {
    "transformer_impl": (TRANSFORMER_ENGINE, "local"),
    "moe_grouped_gemm": ("--moe-grouped-gemm", False),
    "moe_permute_fusion": ("--moe-permute-fusion", False),
    "use_grouped_gemm_for_shared_expert": ("--use-grouped-gemm-for-shared-expert", False),
    "moe_router_fusion": ("--moe-router-fusion", False),
    "tp_comm_overlap": ("--tp-comm-overlap", False),
    "apply_rope_fusion": ("", False),
    "masked_softmax_fusion": ("", False),
    "gradient_accumulation_fusion": ("", False),
    "no_persist_layer_norm": ("", True),
    # Nothing is written.
    "tensorboard_dir": ("", None),
    "wandb_project": ("", None),
}
"""Names of values; the flags that ask for them, where they are no defaults; and what is built without it."""


def go_without(args: Namespace) -> list[str]:
    """Set in ``args`` what needs neither Transformer Engine nor a GPU; returns the flags that have no effect then."""
    flags = []
    for name, (flag, value) in _NEED_A_GPU.items():
        if getattr(args, name) != value:
            setattr(args, name, value)
            flags.append(flag)
    return [flag for flag in flags if flag]


def with_flash_attention(config: ModelConfig) -> ModelConfig:
    """Let the attention of ``config`` keep what a flash attention keeps, in prediction layers too; returns it."""
    config.pre_wrap_hooks.append(_with_flash)
    return config


def _with_flash(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    for module in [module for chunk in model_chunks for module in chunk.modules()]:
        if isinstance(getattr(module, "core_attention", None), DotProductAttention):
            module.core_attention = FlashAttention()
    return model_chunks


def imagined_capability(_device: object = None) -> tuple[int, int]:
    """Of the GPU that a dry run stands for: Megatron asks for 8.0 where experts multiply in groups."""
    return (9, 0)
