"""The arguments of a Megatron checkpoint, as a run of Megatron's forward pass needs them, in any layout.

Imports Megatron: ``megatron_model``, which prepares for that, is the module to import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.layers import pattern_of
from checkpoints.running.scores import USUAL_LENGTH
from checkpoints.tensors import CheckpointError
from megatron_scmoe.config import ARCHITECTURE_FIELDS, CODEC_FIELDS, ConfigError, ScMoEConfig
from megatron_scmoe.config.groups import BEHIND
from megatron_scmoe.training import refusals, stage_rules
from megatron_scmoe.training.arguments import CORE_FORGETS, add_scmoe_arguments, scmoe_config_from_args

EMBEDDING = "embedding.word_embeddings.weight"

# What Core's --use-checkpoint-args takes of a checkpoint, in so far as it decides what a model computes, and what else
# does; the rest of it is in CORE_FORGETS. How layers are computed, and what matters in training alone, is not taken.
# Capacity, jitter and the codec are part of that, so that a loss depends on the tokens before it and on nothing else.
_OF_CORE = """
num_layers hidden_size ffn_hidden_size num_attention_heads group_query_attention num_query_groups kv_channels
position_embedding_type add_position_embedding use_rotary_position_embeddings max_position_embeddings rotary_base
rotary_percent rotary_interleaved add_bias_linear add_qkv_bias swiglu squared_relu normalization
apply_query_key_layer_scaling untie_embeddings_and_output_weights attention_dropout hidden_dropout num_experts
moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_latent_size moe_router_topk
moe_router_pre_softmax moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor
moe_router_load_balancing_type vocab_size mup_width_mult fp32_residual_connection attention_softmax_in_fp32
disable_bf16_reduced_precision_matmul
hybrid_layer_pattern mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
"""
_ARCHITECTURE = {*_OF_CORE.split(), *CORE_FORGETS, *ARCHITECTURE_FIELDS} - {*CODEC_FIELDS}
_REFUSED = """
heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
experimental_attention_variant spec yaml_cfg
"""
_FLAGS = """
--micro-batch-size 1 --no-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-rope-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
--moe-token-dispatcher-type alltoall --overlap off
"""


def arguments(
    source: MegatronCheckpoint, layout: Mapping[str, int], dtype: torch.dtype
) -> tuple[Namespace, ScMoEConfig]:
    """Megatron's namespace, validated, and our settings: the checkpoint's architecture in this layout."""
    saved = source.args
    tensor, pipeline, expert, expert_tensor = layout.values()
    world_size = dist.get_world_size()
    for size in (tensor * pipeline, expert * expert_tensor * pipeline):
        if world_size % size:
            raise CheckpointError(
                f"a model is split over {size} ranks in this layout, and {world_size} are there: {layout}; start "
                f"torchrun --nproc-per-node {size}, or change the layout"
            )
    args = _namespace(source)
    if args.hybrid_layer_pattern and len(args.hybrid_layer_pattern.split("|")) != pipeline:
        args.hybrid_layer_pattern = pattern_of(args)  # cuts for other stages: more would be a virtual pipeline's
    args.rank, args.world_size = dist.get_rank(), world_size
    vars(args).update(layout)
    args.bf16, args.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    args.fp32_residual_connection &= args.bf16 or args.fp16
    args.transformer_impl = "transformer_engine" if _has_transformer_engine() else "local"
    args.padded_vocab_size = source.infos[EMBEDDING].shape[0]
    args.seq_length = min(getattr(saved, "seq_length", None) or USUAL_LENGTH, args.max_position_embeddings)
    if tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's rule; it is for overlap in training
    try:
        scmoe = scmoe_config_from_args(args)
        pattern = args.hybrid_layer_pattern or ""
        scmoe.validate(args.num_layers if scmoe.enabled else 0, pattern)
        args.sequence_parallel = scmoe.enabled and tensor > 1
        if scmoe.enabled:
            refusals.check_megatron_args(args, scmoe)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
            validate_args(args)
        if scmoe.enabled:
            stage_rules.check_pipeline(scmoe, core_transformer_config_from_args(args), pattern)
    except (ConfigError, ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{source.folder} cannot run in this layout: {' '.join(str(error).split())}") from error
    if args.padded_vocab_size % tensor:
        raise CheckpointError(
            f"tensor-parallel ranks hold equal parts of the vocabulary: {source.folder} has {args.padded_vocab_size} "
            f"rows and --tensor-model-parallel-size is {tensor}; use 1"
        )
    return args, scmoe


def _namespace(source: MegatronCheckpoint) -> Namespace:
    """Megatron's namespace with what the checkpoint says of the model; refuses models of other kinds."""
    saved = source.settings
    for name in _REFUSED.split():
        if value := saved.get(name):
            raise CheckpointError(
                f"only plain GPT and hybrid models run here: {source.folder} has {name} {str(value)[:60]!a}; use "
                "Megatron's tools"
            )
    parser = add_scmoe_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(_FLAGS.split())
    vars(args).update({name: saved[name] for name in _ARCHITECTURE & vars(args).keys() & saved.keys()})
    if args.hybrid_layer_pattern:  # without prediction layers: scores are those of the next token
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.partition(BEHIND)[0]
    return args


def _has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
