"""What becomes of the submodules of one of Core's layers when it is part of a group; the same in both containers.

Core builds the spec of the stock model; here the class of its MoE or router is replaced, and nothing else in the local
spec. Transformer Engine fuses the norm before an attention, a dense MLP or a Mamba mixer into the linear that follows
it. The op at the tap must give its normed input to the routed experts too, so there, and only there, the two are
unfused again, under the key names of the fused module: checkpoints stay those of the stock model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.post_training.modelopt.layers import Norm
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_scmoe.config import LatentScaling, Router, ScMoEConfig, Shortcut
from megatron_scmoe.layers.attention import LatentSelfAttention, longcat_norm
from megatron_scmoe.layers.core_attention import LocalCoreAttention
from megatron_scmoe.layers.pipelined import PipelinedMoELayer
from megatron_scmoe.layers.router import DualGateRouter, LongcatRouter
from megatron_scmoe.mcore.norm import SequenceParallelNorm
from megatron_scmoe.mcore.padding import RouterOfPadded


def with_moe_of_group(
    submodules: TransformerLayerSubmodules, scmoe: ScMoEConfig, group_index: int
) -> TransformerLayerSubmodules:
    """The layer that ends group ``group_index``: its MoE is the group's, or none where the group borrows one."""
    if scmoe.borrows_moe(group_index):
        return dataclasses.replace(submodules, mlp=IdentityOp)
    if scmoe.shortcut is Shortcut.DGMOE:
        return dataclasses.replace(submodules, mlp=_with_two_gates(submodules.mlp))
    if scmoe.router is Router.LONGCAT:
        router = functools.partial(LongcatRouter, zero_experts=scmoe.zero_experts)
        return dataclasses.replace(submodules, mlp=_with_router(submodules.mlp, router))
    return dataclasses.replace(submodules, mlp=_with_router(submodules.mlp, RouterOfPadded))


def with_pipelined_moe(submodules: TransformerLayerSubmodules, scmoe: ScMoEConfig) -> TransformerLayerSubmodules:
    """The stock layer, its MoE, if it has one, with tokens that travel in chunks, once for a rank, or compressed."""
    mlp = submodules.mlp
    if getattr(mlp, "func", None) is not MoELayer:
        return submodules
    moe = _with_router(mlp, RouterOfPadded)
    return dataclasses.replace(
        submodules, mlp=functools.partial(PipelinedMoELayer, *moe.args, scmoe=scmoe, **moe.keywords)
    )


def sequence_parallel_norm(builder: LayerNormBuilder) -> LayerNormBuilder:
    """A builder of the same norm that sequence parallelism may have."""
    return SequenceParallelNorm if builder is WrappedTorchNorm else builder


def with_sequence_parallel_norms(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The layer with norms that know of sequence parallelism."""
    return dataclasses.replace(
        submodules,
        input_layernorm=sequence_parallel_norm(submodules.input_layernorm),
        pre_mlp_layernorm=sequence_parallel_norm(submodules.pre_mlp_layernorm),
        self_attention=_with_latent_norms(submodules.self_attention, sequence_parallel_norm),
    )


def with_local_core_attention(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The layer of the local spec with an attention that knows parts of sequences, documents and latents."""
    attention = submodules.self_attention
    parts = dataclasses.replace(attention.submodules, core_attention=LocalCoreAttention)
    return dataclasses.replace(submodules, self_attention=dataclasses.replace(attention, submodules=parts))


def with_sequence_parallel_prediction(
    layer: MultiTokenPredictionLayerSubmodules,
) -> MultiTokenPredictionLayerSubmodules:
    """The prediction layer with norms of its own that know of sequence parallelism; those of its inner layer stay."""
    norms = {name: sequence_parallel_norm(getattr(layer, name)) for name in ("enorm", "hnorm", "layer_norm")}
    return dataclasses.replace(layer, **norms)


def with_latent_attention(
    submodules: TransformerLayerSubmodules, scmoe: ScMoEConfig, *, fused: bool
) -> TransformerLayerSubmodules:
    """The layer with a multi-latent attention that trains.

    Args:
        submodules: of a layer whose attention is Core's multi-latent one.
        scmoe: says how latents are scaled.
        fused: whether they are Transformer Engine's.
    """
    attention = submodules.self_attention
    if not fused:
        attention = dataclasses.replace(attention, module=LatentSelfAttention)
    if scmoe.latent_scaling is LatentScaling.LONGCAT:
        attention = _with_longcat_latents(attention, fused=fused)
    return dataclasses.replace(submodules, self_attention=attention)


def unfuse_attention(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The layer with the norm before its attention taken apart from the linear that holds it in Transformer Engine."""
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


def unfuse_mlp(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
    """The layer with the norm before its MLP taken apart from the linear that holds it in Transformer Engine."""
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


def unfuse_mamba(submodules: MambaLayerSubmodules) -> MambaLayerSubmodules:
    """The layer with the norm before its mixer taken apart from the linear that holds it in Transformer Engine."""
    mixer = submodules.mixer
    linears = dataclasses.replace(mixer.submodules, in_proj=TEColumnParallelLinear)
    return dataclasses.replace(
        submodules,
        norm=Norm,
        mixer=dataclasses.replace(mixer, submodules=linears),
        sharded_state_dict_keys_map={**submodules.sharded_state_dict_keys_map, "norm.": "mixer.in_proj.layer_norm_"},
    )


def _with_latent_norms(attention: Any, change: Callable[[LayerNormBuilder], LayerNormBuilder]) -> Any:
    """``attention`` with the norms of its latents changed; itself where it has none."""
    parts: Any = getattr(attention, "submodules", None)
    if not hasattr(parts, "kv_layernorm"):
        return attention
    changed = dataclasses.replace(parts, q_layernorm=change(parts.q_layernorm), kv_layernorm=change(parts.kv_layernorm))
    return dataclasses.replace(attention, submodules=changed)


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


def _with_two_gates(moe: functools.partial) -> functools.partial:
    submodules = dataclasses.replace(moe.keywords["submodules"], router=DualGateRouter)
    return functools.partial(_build_top1, moe.func, submodules=submodules)


def _with_router(moe: functools.partial, router: Callable[..., TopKRouter]) -> functools.partial:
    submodules = dataclasses.replace(moe.keywords["submodules"], router=router)
    return functools.partial(moe.func, *moe.args, **{**moe.keywords, "submodules": submodules})


def _build_top1(build: Callable[..., MoELayer], *, config: TransformerConfig, **kwargs: Any) -> MoELayer:
    """Build an MoE layer each of whose calls sends a token to one expert; Megatron counts both gates in its top-k."""
    config = copy.copy(config)
    config.moe_router_topk = 1
    return build(config=config, **kwargs)
