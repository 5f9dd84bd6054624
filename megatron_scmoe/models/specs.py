"""Core's own block specs with our classes in the place of its layer.

Core builds the spec of the stock model; here the layer class of each block is replaced, and nothing else in the local
spec. Transformer Engine fuses the norm before an attention or a dense MLP into the linear that follows it. The op at
the tap must give its normed input to the routed experts too, so there, and only there, the two are unfused again,
under the key names of the fused module: checkpoints stay those of the stock model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.post_training.modelopt.layers import Norm
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_scmoe.config import LatentScaling, Norms, Router, ScMoEConfig, Shortcut
from megatron_scmoe.layers.attention import LatentCoreAttention, LatentSelfAttention, longcat_norm
from megatron_scmoe.layers.group import GroupBlock, LeadingBlock
from megatron_scmoe.layers.norm import SequenceParallelNorm
from megatron_scmoe.layers.pipelined import PipelinedMoELayer
from megatron_scmoe.layers.router import DualGateRouter, LongcatRouter
from megatron_scmoe.mcore import stages


def shortcut_block_spec(
    model_config: GPTModelConfig, vp_stage: int | None, *, scmoe: ScMoEConfig
) -> TransformerBlockSubmodules:
    """The blocks of one (virtual) pipeline stage, as groups.

    Args:
        model_config: Core's model configuration; its own spec is the start.
        vp_stage: virtual pipeline stage, None without interleaving.
        scmoe: the groups' settings.
    """
    block_spec = default_layer_spec(model_config, vp_stage)
    blocks = stages.blocks_of_stage(model_config.transformer, vp_stage)
    fused = model_config.transformer.transformer_impl == "transformer_engine"
    layer_specs = [
        _shortcut_layer_spec(layer_spec, block, scmoe, unfuse_tap=fused)
        for layer_spec, block in zip(block_spec.layer_specs, blocks, strict=True)
    ]
    block_spec = dataclasses.replace(block_spec, layer_specs=layer_specs)
    if model_config.transformer.sequence_parallel:
        block_spec = _with_sequence_parallel_norms(block_spec)
    if model_config.transformer.multi_latent_attention:
        block_spec = _with_latent_attention(block_spec, scmoe, fused=fused)
    return block_spec


def pipelined_block_spec(
    model_config: GPTModelConfig, vp_stage: int | None, *, scmoe: ScMoEConfig
) -> TransformerBlockSubmodules:
    """Core's own blocks of one (virtual) pipeline stage, whose MoE layers send their tokens in chunks, or compressed.

    Args:
        model_config: Core's model configuration; its own spec is the start.
        vp_stage: virtual pipeline stage, None without interleaving.
        scmoe: chunks, overlap and codec.
    """
    block_spec = default_layer_spec(model_config, vp_stage)
    return dataclasses.replace(
        block_spec, layer_specs=[_with_pipelined_moe(spec, scmoe) for spec in block_spec.layer_specs]
    )


def _with_pipelined_moe(spec: ModuleSpec, scmoe: ScMoEConfig) -> ModuleSpec:
    mlp = spec.submodules.mlp
    if getattr(mlp, "func", None) is not MoELayer:
        return spec
    pipelined = functools.partial(PipelinedMoELayer, *mlp.args, scmoe=scmoe, **mlp.keywords)
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, mlp=pipelined))


def _with_sequence_parallel_norms(block_spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    def norm(builder: LayerNormBuilder) -> LayerNormBuilder:
        return SequenceParallelNorm if builder is WrappedTorchNorm else builder

    layer_specs = [
        dataclasses.replace(
            spec,
            submodules=dataclasses.replace(
                spec.submodules,
                input_layernorm=norm(spec.submodules.input_layernorm),
                pre_mlp_layernorm=norm(spec.submodules.pre_mlp_layernorm),
                self_attention=_with_latent_norms(spec.submodules.self_attention, norm),
            ),
        )
        for spec in block_spec.layer_specs
    ]
    return dataclasses.replace(block_spec, layer_specs=layer_specs, layer_norm=norm(block_spec.layer_norm))


def _with_latent_norms(attention: ModuleSpec, change: Callable[[LayerNormBuilder], LayerNormBuilder]) -> ModuleSpec:
    """``attention`` with the norms of its latents changed; itself where it has none."""
    parts = attention.submodules
    if not hasattr(parts, "kv_layernorm"):
        return attention
    changed = dataclasses.replace(parts, q_layernorm=change(parts.q_layernorm), kv_layernorm=change(parts.kv_layernorm))
    return dataclasses.replace(attention, submodules=changed)


def _with_latent_attention(
    block_spec: TransformerBlockSubmodules, scmoe: ScMoEConfig, *, fused: bool
) -> TransformerBlockSubmodules:
    layer_specs = []
    for spec in block_spec.layer_specs:
        attention = spec.submodules.self_attention
        if not fused:
            parts = dataclasses.replace(attention.submodules, core_attention=LatentCoreAttention)
            attention = dataclasses.replace(attention, module=LatentSelfAttention, submodules=parts)
        if scmoe.latent_scaling is LatentScaling.LONGCAT:
            attention = _with_longcat_latents(attention, fused=fused)
        submodules = dataclasses.replace(spec.submodules, self_attention=attention)
        layer_specs.append(dataclasses.replace(spec, submodules=submodules))
    return dataclasses.replace(block_spec, layer_specs=layer_specs)


def _with_longcat_latents(attention: ModuleSpec, *, fused: bool) -> ModuleSpec:
    if not fused:
        return _with_latent_norms(attention, longcat_norm)
    # Transformer Engine fuses these norms into the linears behind them, which have no place for a scale.
    parts = dataclasses.replace(
        attention.submodules,
        q_layernorm=longcat_norm(Norm),
        kv_layernorm=longcat_norm(Norm),
        linear_q_up_proj=TEColumnParallelLinear,
        linear_kv_up_proj=TEColumnParallelLinear,
    )
    return dataclasses.replace(attention, submodules=parts)


def _shortcut_layer_spec(spec: ModuleSpec, block: int, scmoe: ScMoEConfig, *, unfuse_tap: bool) -> ModuleSpec:
    group_index, block_in_group = divmod(block, scmoe.moe_every)
    submodules = spec.submodules
    tap = scmoe.tap(group_index)
    is_last = block_in_group == scmoe.moe_every - 1
    # Not where the experts have a norm of their own, nor at farskip's tap: the norm before an MoE stands alone already.
    read_alone = scmoe.shortcut_norms is Norms.UPSTREAM or (is_last and tap % 2 == 1)
    if unfuse_tap and tap // 2 == block_in_group and not read_alone:
        submodules = _unfuse_mlp(submodules) if tap % 2 else _unfuse_attention(submodules)
    if is_last and scmoe.borrows_moe(group_index):
        submodules = dataclasses.replace(submodules, mlp=IdentityOp)
    elif is_last and scmoe.shortcut is Shortcut.DGMOE:
        submodules = dataclasses.replace(submodules, mlp=_with_two_gates(submodules.mlp))
    elif is_last and scmoe.router is Router.LONGCAT:
        submodules = dataclasses.replace(submodules, mlp=_with_longcat_router(submodules.mlp, scmoe.zero_experts))
    if is_last:
        return ModuleSpec(module=GroupBlock, params={"scmoe": scmoe}, submodules=submodules)
    return ModuleSpec(module=LeadingBlock, submodules=submodules)


def _with_two_gates(moe: functools.partial) -> functools.partial:
    submodules = dataclasses.replace(moe.keywords["submodules"], router=DualGateRouter)
    return functools.partial(_build_top1, moe.func, submodules=submodules)


def _with_longcat_router(moe: functools.partial, zero_experts: int) -> functools.partial:
    router = functools.partial(LongcatRouter, zero_experts=zero_experts)
    submodules = dataclasses.replace(moe.keywords["submodules"], router=router)
    return functools.partial(moe.func, *moe.args, **{**moe.keywords, "submodules": submodules})


def _build_top1(build: Callable[..., MoELayer], *, config: TransformerConfig, **kwargs: Any) -> MoELayer:
    """Build an MoE layer each of whose calls sends a token to one expert; Megatron counts both gates in its top-k."""
    config = copy.copy(config)
    config.moe_router_topk = 1
    return build(config=config, **kwargs)


def _unfuse_attention(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    attention = submodules.self_attention
    if not hasattr(attention.submodules, "linear_qkv"):
        return submodules  # multi-latent attention: its input norm stands alone already
    linears = dataclasses.replace(attention.submodules, linear_qkv=TEColumnParallelLinear)
    return dataclasses.replace(
        submodules,
        # Core's own TE norm for this purpose: it keeps `_extra_state`, which no stock checkpoint has, out of
        # checkpoints.
        input_layernorm=Norm,
        self_attention=dataclasses.replace(attention, submodules=linears),
        sharded_state_dict_keys_map={
            **submodules.sharded_state_dict_keys_map,
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        },
    )


def _unfuse_mlp(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    mlp = submodules.mlp
    linears = dataclasses.replace(mlp.keywords["submodules"], linear_fc1=TEColumnParallelLinear)
    return dataclasses.replace(
        submodules,
        pre_mlp_layernorm=Norm,
        mlp=functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": linears}),
        sharded_state_dict_keys_map={
            **submodules.sharded_state_dict_keys_map,
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )
