"""The arguments of a Megatron checkpoint, as a run of Megatron's forward pass needs them, in any layout.

Imports Megatron: ``megatron_model``, which prepares for that, is the module to import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.running.model import USUAL_LENGTH
from checkpoints.tensors import CheckpointError
from megatron_scmoe.config import CODEC_FIELDS, ConfigError, ScMoEConfig
from megatron_scmoe.training import refusals
from megatron_scmoe.training.arguments import add_scmoe_arguments, scmoe_config_from_args

EMBEDDING = "embedding.word_embeddings.weight"

# Settings of a layer that say how it is computed, or only matter in training: not taken from the checkpoint. Capacity,
# jitter and the codec are among them, so that the loss of a token depends on the tokens before it and on nothing else.
_HOW_LAYERS_RUN = """
transformer_impl attention_backend flash_attention_version recompute_granularity recompute_method recompute_num_layers
recompute_modules distribute_saved_activations cuda_graph_impl enable_cuda_graph external_cuda_graph cuda_graph_modules
cuda_graph_warmup_steps inference_cuda_graph_scope fp8 fp8_recipe fp8_param fp8_quantizer_factory fp4 fp4_recipe
fp4_param fp4_quantizer_factory quant_recipe first_last_layers_bf16
pipeline_model_parallel_layout num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split init_method output_layer_init_method
embedding_init_method init_model_with_meta_device bias_activation_fusion masked_softmax_fusion persist_layer_norm
memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope fused_residual_rmsnorm
use_fused_weighted_squared_relu use_transformer_engine_op_fuser use_te_activation_func use_te_rng_tracker use_kitchen
use_kitchen_attention config_logger_dir flash_decode batch_invariant_mode qk_clip log_max_attention_logit
mla_down_proj_fusion cache_mla_latents cp_comm_type offload_modules fine_grained_activation_offloading moe_paged_stash
moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_grouped_gemm moe_single_grouped_weight
moe_single_grouped_bias use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert moe_permute_fusion
moe_router_fusion moe_shared_expert_overlap moe_layer_recompute moe_expert_capacity_factor
moe_pad_expert_input_to_capacity moe_expert_rank_capacity_factor moe_input_jitter_eps moe_router_force_load_balancing
moe_router_force_biased moe_enable_routing_replay moe_router_padding_for_quantization moe_router_padding_for_fp8
mlp_chunks_for_prefill mlp_chunks_for_training calculate_per_token_loss
"""
_HOW_GROUPS_RUN = {
    *("overlap", "overlap_chunks", "expert_slot", "overlap_interval", "overlap_report", "shortcut_resume"),
    "lsh_evaluation",
}
# What Megatron's flags call otherwise than its configurations, and what only they have.
_BESIDE = """
num_experts group_query_attention swiglu squared_relu quick_geglu position_embedding_type add_position_embedding
use_rotary_position_embeddings rotary_base rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling
rope_scaling_factor rope_type untie_embeddings_and_output_weights max_position_embeddings vocab_size
yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
"""
_ARCHITECTURE = (
    ({field.name for field in fields(MLATransformerConfig)} - {field.name for field in fields(ModelParallelConfig)})
    - set(_HOW_LAYERS_RUN.split())
    | ({field.name for field in fields(ScMoEConfig)} - _HOW_GROUPS_RUN - set(CODEC_FIELDS))
    | set(_BESIDE.split())
)
_REFUSED = """
hybrid_layer_pattern heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
experimental_attention_variant mtp_num_layers spec yaml_cfg
"""
_FLAGS = """
--micro-batch-size 1 --no-initialization --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-rope-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
--moe-token-dispatcher-type alltoall --overlap off
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Over how many ranks what is split."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int


def arguments(source: MegatronCheckpoint, layout: Layout, dtype: torch.dtype) -> tuple[Namespace, ScMoEConfig]:
    """Megatron's namespace, validated, and our settings: the checkpoint's architecture in this layout.

    Raises:
        CheckpointError: where that cannot run here.
    """
    saved = source.args
    world_size = dist.get_world_size()
    for size in (layout.tensor * layout.pipeline, layout.expert * layout.expert_tensor * layout.pipeline):
        if world_size % size:
            raise CheckpointError(
                f"a model is split over {size} ranks in this layout, and {world_size} are there: {layout}; start "
                f"torchrun --nproc-per-node {size}, or change the layout"
            )
    for name in _REFUSED.split():
        if value := getattr(saved, name, None):
            raise CheckpointError(
                f"only plain GPT models run here: {source.folder} has {name} {str(value)[:60]!a}; use Megatron's tools"
            )
    parser = add_scmoe_arguments(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args(_FLAGS.split())
    for name in _ARCHITECTURE:
        if hasattr(args, name) and hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    args.rank, args.world_size = dist.get_rank(), world_size
    args.tensor_model_parallel_size = layout.tensor
    args.pipeline_model_parallel_size = layout.pipeline
    args.expert_model_parallel_size = layout.expert
    args.expert_tensor_parallel_size = layout.expert_tensor
    args.bf16, args.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    args.fp32_residual_connection &= args.bf16 or args.fp16
    args.transformer_impl = "transformer_engine" if _has_transformer_engine() else "local"
    args.padded_vocab_size = source.infos[EMBEDDING].shape[0]
    args.seq_length = min(getattr(saved, "seq_length", None) or USUAL_LENGTH, args.max_position_embeddings)
    if layout.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's rule; it is for overlap in training
    try:
        scmoe = scmoe_config_from_args(args)
        scmoe.validate(args.num_layers if scmoe.enabled else 0)
        args.sequence_parallel = scmoe.enabled and layout.tensor > 1
        if scmoe.enabled:
            refusals.check_megatron_args(args, scmoe)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
            validate_args(args)
        if scmoe.enabled:
            refusals.check_pipeline(scmoe, core_transformer_config_from_args(args))
    except (ConfigError, ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(f"{source.folder} cannot run in this layout: {' '.join(str(error).split())}") from error
    if args.padded_vocab_size % layout.tensor:
        raise CheckpointError(
            f"tensor-parallel ranks hold equal parts of the vocabulary: {source.folder} has {args.padded_vocab_size} "
            f"rows and --tensor-model-parallel-size is {layout.tensor}; use 1"
        )
    return args, scmoe


def _has_transformer_engine() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
