"""Core's own block specs of a GPT model with our classes in the place of its layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_scmoe.config import Group, Norms, Router, ScMoEConfig
from megatron_scmoe.layers.group import GroupBlock, LeadingBlock
from megatron_scmoe.mcore import stages
from megatron_scmoe.models import submodules as parts


def shortcut_block_spec(
    model_config: GPTModelConfig, vp_stage: int | None, *, scmoe: ScMoEConfig
) -> TransformerBlockSubmodules:
    """The blocks of one (virtual) pipeline stage, as groups.

    Args:
        model_config: Core's model configuration; its own spec is the start.
        vp_stage: virtual pipeline stage, None without interleaving.
        scmoe: the groups' settings.
    """
    config = model_config.transformer
    block_spec = default_layer_spec(model_config, vp_stage)
    fused = config.transformer_impl == "transformer_engine"
    groups = scmoe.groups(config.num_layers)
    blocks = stages.blocks_of_stage(config, vp_stage)
    layer_specs = [
        _layer_of_group(spec, block, scmoe, groups, unfuse_tap=fused)
        for spec, block in zip(block_spec.layer_specs, blocks, strict=True)
    ]
    block_spec = dataclasses.replace(block_spec, layer_specs=layer_specs)
    if config.sequence_parallel:
        block_spec = dataclasses.replace(block_spec, layer_norm=parts.sequence_parallel_norm(block_spec.layer_norm))
    return _each_layer(block_spec, partial(_that_trains, config=config, scmoe=scmoe))


def prediction_spec(
    stock: MultiTokenPredictionBlockSubmodules, *, model_config: GPTModelConfig, scmoe: ScMoEConfig
) -> MultiTokenPredictionBlockSubmodules:
    """The prediction layers behind the groups: Core's own, in no group; LongCat-Flash's have no experts.

    Args:
        stock: Core's spec of them.
        model_config: Core's model configuration.
        scmoe: the groups' settings.
    """
    config = model_config.transformer

    def changed(spec: ModuleSpec) -> ModuleSpec:
        layer = spec.submodules
        inner = _dense_layer(model_config) if scmoe.router is Router.LONGCAT else layer.mtp_model_layer
        inner = dataclasses.replace(inner, submodules=_that_trains(inner.submodules, config=config, scmoe=scmoe))
        layer = dataclasses.replace(layer, mtp_model_layer=inner)
        if config.sequence_parallel:
            layer = parts.with_sequence_parallel_prediction(layer)
        return dataclasses.replace(spec, submodules=layer)

    return dataclasses.replace(stock, layer_specs=[changed(spec) for spec in stock.layer_specs or ()])


def pipelined_block_spec(
    model_config: GPTModelConfig, vp_stage: int | None, *, scmoe: ScMoEConfig
) -> TransformerBlockSubmodules:
    """Core's blocks of one (virtual) pipeline stage, whose MoEs send tokens in chunks, once for a rank, or compressed.

    Args:
        model_config: Core's model configuration; its own spec is the start.
        vp_stage: virtual pipeline stage, None without interleaving.
        scmoe: chunks, overlap and codec.
    """
    block_spec = _each_layer(default_layer_spec(model_config, vp_stage), partial(parts.with_pipelined_moe, scmoe=scmoe))
    if model_config.transformer.transformer_impl == "local":
        block_spec = _each_layer(block_spec, parts.with_local_core_attention)
    return block_spec


def local_block_spec(model_config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules | ModuleSpec:
    """Core's own blocks of the local spec with our core attention; without experts, Core has one spec for all of them.

    Args:
        model_config: Core's model configuration; its own spec is the start.
        vp_stage: virtual pipeline stage, None without interleaving.
    """
    spec = default_layer_spec(model_config, vp_stage)
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(spec, submodules=parts.with_local_core_attention(spec.submodules))
    return _each_layer(spec, parts.with_local_core_attention)


def _each_layer(
    block_spec: TransformerBlockSubmodules, change: Callable[[TransformerLayerSubmodules], TransformerLayerSubmodules]
) -> TransformerBlockSubmodules:
    layer_specs = [dataclasses.replace(spec, submodules=change(spec.submodules)) for spec in block_spec.layer_specs]
    return dataclasses.replace(block_spec, layer_specs=layer_specs)


def _that_trains(
    submodules: TransformerLayerSubmodules, *, config: TransformerConfig, scmoe: ScMoEConfig
) -> TransformerLayerSubmodules:
    """The layer with what Core's lacks under sequence parallelism, in its latent and in its local core attention."""
    if config.transformer_impl == "local":
        submodules = parts.with_local_core_attention(submodules)
    if config.sequence_parallel:
        submodules = parts.with_sequence_parallel_norms(submodules)
    if config.multi_latent_attention:
        fused = config.transformer_impl == "transformer_engine"
        submodules = parts.with_latent_attention(submodules, scmoe=scmoe, fused=fused)
    return submodules


def _dense_layer(model_config: GPTModelConfig) -> ModuleSpec:
    """Core's layer of this model as it would be without experts."""
    dense = copy.copy(model_config)
    dense.transformer = copy.copy(model_config.transformer)
    dense.transformer.num_moe_experts = None
    return default_layer_spec(dense, None)


def _layer_of_group(
    spec: ModuleSpec, block: int, scmoe: ScMoEConfig, groups: tuple[Group, ...], *, unfuse_tap: bool
) -> ModuleSpec:
    group_index, block_in_group = divmod(block, scmoe.moe_every)
    submodules = spec.submodules
    tap = scmoe.tap(group_index, groups[group_index].num_ops)
    is_last = block_in_group == scmoe.moe_every - 1
    # Not where the experts have a norm of their own, nor at farskip's tap: the norm before an MoE stands alone already.
    read_alone = scmoe.shortcut_norms is Norms.UPSTREAM or (is_last and tap % 2 == 1)
    if unfuse_tap and tap // 2 == block_in_group and not read_alone:
        submodules = parts.unfuse_mlp(submodules) if tap % 2 else parts.unfuse_attention(submodules)
    if not is_last:
        return ModuleSpec(module=LeadingBlock, submodules=submodules)
    return ModuleSpec(
        module=GroupBlock,
        params={"scmoe": scmoe, "groups": groups},
        submodules=parts.with_moe_of_group(submodules, scmoe, group_index),
    )
