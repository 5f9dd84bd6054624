"""Core's hybrid model with our groups in it: one subclass step from its stack, its configuration and its builder.

A layer of a hybrid model is one residual op; a group is a run of them that ends with an MoE, whose layer runs the span.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_scmoe.config import Group, Norms, Router, ScMoEConfig
from megatron_scmoe.config.groups import group_that_ends_with
from megatron_scmoe.layers.group import GroupBlock, LeadingBlock, LeadingMamba, link
from megatron_scmoe.mcore import blocks
from megatron_scmoe.models import submodules as parts
from megatron_scmoe.models.hybrid_parts import local_submodules


class GroupedHybridStack(HybridStack):
    """Core's stack of layers, those of each group run by the group's last one.

    Args:
        submodules: the stock layers.
        scmoe: the groups' settings.
        groups: of the whole model.
        The other arguments are those of Core's stack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        scmoe: ScMoEConfig,
        groups: Sequence[Group],
        **kwargs: Any,
    ) -> None:
        fused = config.transformer_impl == "transformer_engine"
        super().__init__(config, _with_groups(submodules, scmoe, groups, unfuse_taps=fused), **kwargs)
        link(list(self.layers), scmoe)


class PipelinedHybridStack(HybridStack):
    """Core's stack of layers, whose MoEs send tokens in chunks, once for a rank, or compressed.

    Those of prediction layers do not.

    Args:
        submodules: the stock layers.
        scmoe: chunks, overlap and codec. The other arguments are those of Core's stack.
    """

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, *, scmoe: ScMoEConfig, **kwargs: Any
    ) -> None:
        pipelined = _changed(submodules.moe_layer, partial(parts.with_pipelined_moe, scmoe=scmoe))
        super().__init__(config, dataclasses.replace(submodules, moe_layer=pipelined), **kwargs)


@dataclass(kw_only=True)
class ScMoEHybridModelConfig(HybridModelConfig):
    """Core's hybrid configuration and the settings of the groups.

    Attributes:
        scmoe: the groups' settings.
        stack_spec: makes the spec of the stack, whose layers are Core's own or those of groups.
    """

    builder: ClassVar[str] = "megatron_scmoe.models.hybrid.ScMoEHybridModelBuilder"
    scmoe: ScMoEConfig = field(default_factory=ScMoEConfig)
    stack_spec: Callable[[ScMoEHybridModelConfig], ModuleSpec] = field(default_factory=lambda: stack_spec)


class ScMoEHybridModelBuilder(HybridModelBuilder):
    """Builds Core's hybrid model on our stack; without Transformer Engine from the local layers, which Core lacks."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> HybridModel:
        """Build one (virtual) pipeline stage; the arguments are those of Core's builder."""
        config = self._model_config
        config.hybrid_stack_spec = config.stack_spec(config)
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        blocks.split_sinks_with_heads(model)
        if config.scmoe.router is Router.LONGCAT:
            blocks.let_expert_biases_move(model)
        return model


def model_config_from_args(args: Namespace, scmoe: ScMoEConfig) -> HybridModelConfig:
    """The hybrid model that ``args`` describe."""
    config = hybrid_config_from_args(args, model_config_cls=ScMoEHybridModelConfig)
    config.scmoe = scmoe
    return config


def stack_spec(config: ScMoEHybridModelConfig) -> ModuleSpec:
    """The stack of ``config``: stock layers, or with a shortcut, chunks or a codec ours among them.

    Prediction layers have stacks of their own, which Core makes of the stock layers.
    """
    transformer, scmoe = config.transformer, config.scmoe
    fused = transformer.transformer_impl == "transformer_engine"
    stock = hybrid_stack_spec.submodules if fused else local_submodules(transformer)
    if transformer.multi_latent_attention:
        latent = partial(parts.with_latent_attention, scmoe=scmoe, fused=fused)
        stock = dataclasses.replace(stock, mla_layer=_changed(stock.mla_layer, latent))
    if scmoe.replaces_stock_moe:
        return ModuleSpec(module=PipelinedHybridStack, params={"scmoe": scmoe}, submodules=stock)
    if not scmoe.enabled:
        return ModuleSpec(module=HybridStack, submodules=stock)
    groups = scmoe.groups(transformer.num_layers, config.hybrid_layer_pattern or "")
    return ModuleSpec(module=GroupedHybridStack, params={"scmoe": scmoe, "groups": groups}, submodules=stock)


def _changed(spec: ModuleSpec, change: Callable[[Any], Any]) -> ModuleSpec:
    return dataclasses.replace(spec, submodules=change(spec.submodules))


def _with_groups(
    stock: HybridStackSubmodules, scmoe: ScMoEConfig, groups: Sequence[Group], *, unfuse_taps: bool
) -> HybridStackSubmodules:
    """The stock layers as layers of groups."""
    leading = {
        "attention_layer": _LeadingLayer,
        "mla_layer": _LeadingLayer,
        "mlp_layer": _LeadingLayer,
        "mamba_layer": _LeadingMambaLayer,
    }
    unfused = {"unfused": _tapped(scmoe, groups) if unfuse_taps else frozenset()}
    layers = {
        name: ModuleSpec(module=kind, params=unfused, submodules=getattr(stock, name).submodules)
        for name, kind in leading.items()
    }
    group = {"scmoe": scmoe, "groups": groups}
    layers["moe_layer"] = ModuleSpec(module=_GroupLayer, params=group, submodules=stock.moe_layer.submodules)
    return dataclasses.replace(stock, **layers)


def _tapped(scmoe: ScMoEConfig, groups: Sequence[Group]) -> frozenset[int]:
    """Layers, from 0 over the whole model, whose normed input routed experts read."""
    if scmoe.shortcut_norms is Norms.UPSTREAM:
        return frozenset()  # they have a norm of their own
    taps = ((group, scmoe.tap(index, group.num_ops)) for index, group in enumerate(groups))
    return frozenset(group.layers[tap] for group, tap in taps if tap < group.num_ops)


class _LeadingLayer(LeadingBlock):
    """A layer before a group's last one; where it is among ``unfused`` layers, its norm stands alone."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        *,
        unfused: frozenset[int],
        **kwargs: Any,
    ) -> None:
        if layer_number - 1 in unfused:
            is_mlp = submodules.self_attention is IdentityOp
            submodules = (parts.unfuse_mlp if is_mlp else parts.unfuse_attention)(submodules)
        super().__init__(config, submodules, layer_number, **kwargs)


class _LeadingMambaLayer(LeadingMamba):
    """As ``_LeadingLayer``."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int,
        *,
        unfused: frozenset[int],
        **kwargs: Any,
    ) -> None:
        if layer_number - 1 in unfused:
            submodules = parts.unfuse_mamba(submodules)
        super().__init__(config, submodules, layer_number, **kwargs)


class _GroupLayer(GroupBlock):
    """A group's last layer; without an MoE of its own where it borrows one."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        *,
        scmoe: ScMoEConfig,
        groups: Sequence[Group],
        **kwargs: Any,
    ) -> None:
        submodules = parts.with_moe_of_group(submodules, scmoe, group_that_ends_with(groups, layer_number - 1))
        super().__init__(config, submodules, layer_number, scmoe=scmoe, groups=groups, **kwargs)
