"""A case of ``models.py`` in Megatron's other container: two layers of a hybrid model for each of its blocks."""

from __future__ import annotations

import dataclasses
import re

import models
import torch
import torch.distributed as dist
from models import Case
from torch import Tensor


def pattern(case: Case) -> str:
    """The layers of ``case``, and those of its prediction layers."""
    behind = "/*-" if case.router == "longcat" else "/*E"
    return ("*-" * (case.moe_every - 1) + "*E") * case.num_groups + behind * case.predictions


def name_in_blocks(name: str) -> str:
    """What a parameter of the hybrid model is called in the model of blocks."""
    name = name.replace("decoder.final_norm", "decoder.final_layernorm")
    name = re.sub(r"mtp_model_layer\.layers\.\d+\.", "mtp_model_layer.", name)
    return re.sub(r"decoder\.layers\.(\d+)\.", lambda match: f"decoder.layers.{int(match[1]) // 2}.", name)


def new(case: Case, layers: str, **sizes: int):
    """A hybrid model of these ``layers``, with the settings of ``case`` and more ``sizes``, on this rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_scmoe.models.hybrid import ScMoEHybridModelBuilder, ScMoEHybridModelConfig

    scmoe = dataclasses.replace(models.settings(case), moe_every=2)  # its default: a pattern says where an MoE is
    scmoe.validate(0, layers)
    transformer = models.transformer_config(case)
    transformer.num_layers = len(layers.partition("/")[0])
    for name, size in sizes.items():
        setattr(transformer, name, size)
    config = ScMoEHybridModelConfig(
        transformer=transformer,
        vocab_size=models.VOCAB_SIZE,
        seq_length=models.SEQ_LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        hybrid_layer_pattern=layers,
        scmoe=scmoe,
    )
    return ScMoEHybridModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def build(case: Case):
    """The hybrid model of ``case`` on this rank, with the parameters that ``models.build`` gives the one of blocks."""
    model = new(case, pattern(case)).to(case.dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(models.parameter(models.global_name(name_in_blocks(name)), tuple(value.shape)))
        for name, value in model.named_buffers():
            if name.endswith("expert_bias"):
                value.copy_(case.router_bias(int(name_in_blocks(name).split(".")[2]) // case.moe_every))
    return model


def losses_and_gradients(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``models.losses_and_gradients``, under the names of blocks."""
    model = build(case)
    ((tokens, labels, positions),) = models.my_batch()
    loss = model(tokens, positions, None, labels=labels)
    (loss.sum() / (models.BATCH_SIZE * models.SEQ_LENGTH)).backward()
    gradients = {}
    for name, value in model.named_parameters():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        if "local_experts" not in name:
            dist.all_reduce(gradient)
        gradients[models.global_name(name_in_blocks(name))] = gradient
    return loss.detach(), gradients
