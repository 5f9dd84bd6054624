"""Core's GPT model with our blocks in it: one subclass step from Core's model configuration and from its builder."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_scmoe.config import Router, ScMoEConfig
from megatron_scmoe.layers.group import link
from megatron_scmoe.mcore import blocks, predictions
from megatron_scmoe.mcore.packing import packs_sequences
from megatron_scmoe.models.specs import (
    local_block_spec,
    pipelined_block_spec,
    prediction_spec,
    shortcut_block_spec,
)


@dataclass(kw_only=True)
class ScMoEGPTModelConfig(GPTModelConfig):
    """Core's GPT configuration and the settings of the groups.

    Attributes:
        scmoe: the groups' settings. It reaches the layers through the block spec; nothing is attached to Core's
            ``TransformerConfig``, which Core rebuilds and deep-copies.
    """

    builder: ClassVar[str] = "megatron_scmoe.models.gpt.ScMoEGPTModelBuilder"
    scmoe: ScMoEConfig = field(default_factory=ScMoEConfig)


class ScMoEGPTModelBuilder(GPTModelBuilder):
    """Builds Core's GPT model from our block spec and links the blocks of each group."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one (virtual) pipeline stage; the arguments are those of Core's builder."""
        scmoe = self._model_config.scmoe
        with predictions.changed_spec(partial(prediction_spec, model_config=self._model_config, scmoe=scmoe)):
            model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        blocks.split_sinks_with_heads(model)
        link(list(model.decoder.layers), scmoe)
        if scmoe.router is Router.LONGCAT:
            blocks.let_expert_biases_move(model)
        return model


def model_config_from_args(args: Namespace, scmoe: ScMoEConfig) -> GPTModelConfig:
    """The model that ``args`` describe: ours where a shortcut is set, else Core's own.

    Core's own is untouched but for the core attention of the local spec, where sequences are cut or packed.
    """
    if scmoe.replaces_stock_moe:
        return with_chunks(gpt_config_from_args(args), scmoe)
    if scmoe.enabled:
        return with_shortcut(gpt_config_from_args(args, model_config_cls=ScMoEGPTModelConfig), scmoe)
    config = gpt_config_from_args(args)
    if args.transformer_impl == "local" and (args.context_parallel_size > 1 or packs_sequences(args)):
        config.transformer_layer_spec = local_block_spec
    return config


def with_chunks(config: GPTModelConfig, scmoe: ScMoEConfig) -> GPTModelConfig:
    """Let the stock MoE layers of ``config`` send tokens in chunks, once for a rank, or compressed; returns it."""
    config.transformer_layer_spec = partial(pipelined_block_spec, scmoe=scmoe)
    return config


def with_shortcut(config: ScMoEGPTModelConfig, scmoe: ScMoEConfig) -> ScMoEGPTModelConfig:
    """Give ``config`` the groups of ``scmoe``; returns it."""
    config.scmoe = scmoe
    config.transformer_layer_spec = partial(shortcut_block_spec, scmoe=scmoe)
    return config
