"""What a machine without Transformer Engine builds in its place, and how the two differ in memory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.training.models.base import ModelConfig

from megatron_scmoe.dry_run.meta import FlashAttention

TRANSFORMER_ENGINE = "--transformer-impl transformer_engine"
_NEED_A_GPU: dict[str, tuple[str, tuple[Any, ...]]] = {
    "transformer_impl": (TRANSFORMER_ENGINE, ("local",)),
    "moe_grouped_gemm": ("--moe-grouped-gemm", (False,)),
    "moe_permute_fusion": ("--moe-permute-fusion", (False,)),
    "moe_token_dispatcher_type": ("--moe-token-dispatcher-type flex", ("alltoall", "allgather")),
    "use_grouped_gemm_for_shared_expert": ("--use-grouped-gemm-for-shared-expert", (False,)),
    "moe_router_fusion": ("--moe-router-fusion", (False,)),
    "tp_comm_overlap": ("--tp-comm-overlap", (False,)),
    "fp8": ("--fp8-format", (None,)),
    "fp8_param_gather": ("--fp8-param-gather", (False,)),
    "fp4": ("--fp4-format", (None,)),
    "cuda_graph_impl": ("--cuda-graph-impl", ("none",)),
    "apply_rope_fusion": ("", (False,)),
    "masked_softmax_fusion": ("", (False,)),
    "gradient_accumulation_fusion": ("", (False,)),
    "no_persist_layer_norm": ("", (True,)),
    # Nothing is written.
    "tensorboard_dir": ("", (None,)),
    "wandb_project": ("", (None,)),
}
"""Names of values; the flags that ask for them, where they are no defaults; what needs no GPU, and is built instead."""


def go_without(args: Namespace) -> dict[str, Any]:
    """Set in ``args`` what needs neither Transformer Engine nor a GPU; returns what was there instead, by name."""
    gone = {name: getattr(args, name) for name, (_, plain) in _NEED_A_GPU.items() if getattr(args, name) not in plain}
    vars(args).update({name: _NEED_A_GPU[name][1][0] for name in gone})
    if "moe_grouped_gemm" in gone and "moe_act" in (args.recompute_modules or ()):
        gone["recompute_modules"] = args.recompute_modules  # which Core recomputes in grouped products alone
        args.recompute_modules = [module for module in args.recompute_modules if module != "moe_act"]
    return gone


def flags_of(gone: Iterable[str]) -> list[str]:
    """The flags that asked for what ``go_without`` has taken out, but for defaults."""
    flags = {name: flag for name, (flag, _) in _NEED_A_GPU.items()} | {
        "recompute_modules": "--recompute-modules moe_act"
    }
    return [flag for name in gone if (flag := flags[name])]


def keeps_scores(args: Namespace) -> bool:
    """Whether attention keeps all scores: Transformer Engine's does where --attention-backend is unfused."""
    return args.attention_backend is AttnBackend.unfused


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
