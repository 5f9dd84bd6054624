"""What a machine without Transformer Engine builds in its place, and how the two differ in memory."""

from __future__ import annotations

import dataclasses
import functools
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.base import ModelConfig
from megatron.training.models.hybrid import HybridModelConfig

from megatron_scmoe.dry_run.meta import FlashAttention

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig

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
    """Let the attention of ``config`` keep what a flash attention keeps; returns it."""
    if isinstance(config, HybridModelConfig):
        config.stack_spec = functools.partial(_flash_stack, build=config.stack_spec)
    else:
        # Here alone: where Megatron has no GPT model, there are hybrid ones still.
        from megatron.training.models.gpt import default_layer_spec  # noqa: PLC0415

        config.transformer_layer_spec = functools.partial(
            _flash_spec, build=config.transformer_layer_spec or default_layer_spec
        )
    return config


def _flash_stack(config: HybridModelConfig, *, build: Any) -> ModuleSpec:
    """The stack of a hybrid model."""
    spec = build(config)
    layers = {name: getattr(spec.submodules, name) for name in ("attention_layer", "mla_layer")}
    flash = {name: _with_flash(layer) for name, layer in layers.items()}
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **flash))


def _flash_spec(config: GPTModelConfig, vp_stage: int | None, *, build: Any) -> TransformerBlockSubmodules | ModuleSpec:
    """Core's spec of all blocks, or, without experts, of one for all."""
    spec = build(config, vp_stage)
    if isinstance(spec, ModuleSpec):
        return _with_flash(spec)
    return dataclasses.replace(spec, layer_specs=[_with_flash(layer_spec) for layer_spec in spec.layer_specs])


def _with_flash(spec: ModuleSpec) -> ModuleSpec:
    attention = spec.submodules.self_attention
    parts = dataclasses.replace(attention.submodules, core_attention=FlashAttention)
    attention = dataclasses.replace(attention, submodules=parts)
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention))


def imagined_capability(_device: object = None) -> tuple[int, int]:
    """Of the GPU that a dry run stands for: Megatron asks for 8.0 where experts multiply in groups."""
    return (9, 0)
