"""Layers of Core's HybridModel, one for each symbol of its pattern, where there is no Transformer Engine.

Core has specs of these with Transformer Engine's modules alone. Its own classes stand in them here, with linears and
norms of the local spec; on the CPU backend they train.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_scmoe.config import ConfigError
from megatron_scmoe.layers.core_attention import LocalCoreAttention
from megatron_scmoe.mcore.norm import SequenceParallelNorm
from megatron_scmoe.models import submodules as parts


def local_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    """Core's layers without Transformer Engine, under the parameter and checkpoint names that it has in blocks."""
    backend = LocalSpecProvider()
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    qk_norm = norm if config.qk_layernorm else IdentityOp
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=LocalCoreAttention,
        linear_proj=row,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    latent_attention = MLASelfAttentionSubmodules(
        linear_q_proj=column,
        linear_q_down_proj=column,
        linear_q_up_proj=column,
        linear_kv_down_proj=column,
        linear_kv_up_proj=column,
        core_attention=LocalCoreAttention,
        linear_proj=row,
        q_layernorm=qk_norm,
        kv_layernorm=qk_norm,
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    layers = {
        "attention_layer": _attention_layer(norm, ModuleSpec(SelfAttention, causal, attention)),
        "mla_layer": _attention_layer(norm, ModuleSpec(MLASelfAttention, causal, latent_attention)),
        "mlp_layer": TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
        "moe_layer": TransformerLayerSubmodules(
            pre_mlp_layernorm=norm,
            mlp=_moe(backend) if config.num_moe_experts else IdentityOp,
            mlp_bda=get_bias_dropout_add,
        ),
    }
    if config.sequence_parallel:
        layers = {name: parts.with_sequence_parallel_norms(submodules) for name, submodules in layers.items()}
    return HybridStackSubmodules(
        mtp_block_spec=_prediction_spec(parts.sequence_parallel_norm(norm) if config.sequence_parallel else norm),
        mamba_layer=local_mamba_layer_spec(),
        **{name: missing_layer_spec(symbol) for name, symbol in (("gdn_layer", "G"), ("dsa_layer", "D"))},
        **{name: ModuleSpec(module=TransformerLayer, submodules=submodules) for name, submodules in layers.items()},
    )


def _moe(backend: LocalSpecProvider) -> partial[MoELayer]:
    """What ``megatron.core.models.gpt`` has a function for: a hybrid model does without that package."""
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    shared_experts = partial(SharedExpertMLP, submodules=linears)
    experts = backend.grouped_mlp_modules(False)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared_experts))


def _prediction_spec(norm: LayerNormBuilder) -> ModuleSpec:
    """What is around the layers of each `/`: norms of embedding and hidden state, a projection of both, a last norm."""
    layer = MultiTokenPredictionLayerSubmodules(enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, layer_norm=norm)
    layers = [ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)]
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=layers)
    )


def _attention_layer(norm: LayerNormBuilder, attention: ModuleSpec) -> TransformerLayerSubmodules:
    latent = attention.module is MLASelfAttention
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        # Transformer Engine fuses this norm into the linear behind it, but for a latent attention.
        sharded_state_dict_keys_map={} if latent else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )


def local_mamba_layer_spec() -> ModuleSpec:
    """Symbol ``M``: a norm, a Mamba-2 mixer and the residual sum, [s, b, h] to [s, b, h].

    Transformer Engine has the norm in the linear behind it, so its weight is a parameter ``norm.weight`` here, and in
    checkpoints what it is there: ``mixer.in_proj.layer_norm_weight``.
    """
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=SequenceParallelNorm,
            mixer=ModuleSpec(
                module=MambaMixer,
                submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            ),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def missing_layer_spec(symbol: str) -> ModuleSpec:
    """A symbol that the local spec has no layer for: whoever builds it gets a ConfigError.

    Without it Core builds a layer that does nothing. ``G``, a gated delta net, needs kernels of flash-linear-attention,
    and ``D``, a sparse attention, linears of Transformer Engine's.
    """
    return ModuleSpec(module=_MissingLayer, params={"symbol": symbol})


class _MissingLayer(torch.nn.Module):
    def __init__(self, *_args: Any, symbol: str, **_kwargs: Any) -> None:
        raise ConfigError(
            f"--hybrid-layer-pattern has {symbol}, for which the local spec has no layer; "
            "leave it out, or use --transformer-impl transformer_engine"
        )
