"""Layers of Core's HybridModel, one for each symbol of its pattern, where there is no Transformer Engine.

Core has specs of these with Transformer Engine's modules alone. Its own classes stand in them here, with linears and
norms of the local spec; on the CPU backend they train.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_scmoe.config import ConfigError
from megatron_scmoe.layers.norm import SequenceParallelNorm


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
