"""--use-checkpoint-args: what decides what a model computes comes from the checkpoint, all of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys

import pytest
import ranks
import training
from training import SCMOE, STOCK, with_flags

# What stays the command line's: how a model is trained,
TRAINS = """mtp_loss_scaling_factor mtp_detach_heads init_method_std embedding_init_method_std
 qk_clip qk_clip_alpha qk_clip_threshold moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff
 moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_input_jitter_eps moe_expert_capacity_factor
 moe_pad_expert_input_to_capacity moe_token_drop_policy moe_router_force_load_balancing moe_router_force_biased
 moe_use_upcycling moe_upcycling_granularity dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss mup_width_mult"""

# how it runs (patterns of whole names),
RUNS = r"""fp[48](_.*)? first_last_layers_bf16 num_layers_at_(start|end)_in_bf16 fp32_residual_connection
 attention_softmax_in_fp32 disable_bf16_reduced_precision_matmul mamba_training_ssm_states_dtype .*fusion.*
 .*cuda_graph.* .*offload.* .*recompute.*
 .*fused.* .*kitchen.* inference_.* moe_(deepep|enable_deepep|flex_dispatcher|hybridep|ncclep|paged_stash)(_.*)?
 moe_enable_routing_replay moe_expert_rank_capacity_factor moe_router_padding_for_.* moe_shared_expert_overlap
 moe_per_layer_logging use_grouped_gemm_for_.* mlp_chunks_for_.* use_t.* use_mamba_mem_eff_path transformer_impl
 attention_backend flash_.* batch_invariant_mode calculate_per_token_loss log_max_attention_logit config_logger_dir
 distribute_saved_activations account_for_.*_in_pipeline_split pipeline_model_parallel_layout cp_comm_type
 clone_scatter_output_in_embedding high_priority_a2a_comm_stream symmetric_ar_type nccl_all_reduce_for_prefill
 test_mode init_model_with_meta_device dsa_kernel_backend mtp_standalone make_vocab_size_divisible_by onnx_safe
 cache_mla_latents"""
# and what is of other models than GPT, or of no use in Core.
ELSEWHERE = "bert_binary_head (en|de)coder_num_layers is_hybrid_model relative_attention_.* openai_gelu"


def unclassified(patterns: str) -> list[str]:
    """Settings of Core's models that a command line can set and nothing says who sets them with a checkpoint."""
    import inspect
    import re

    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training import arguments, checkpointing

    from megatron_scmoe.training.arguments import CORE_FORGETS

    parser = argparse.ArgumentParser()
    for add in (arguments._add_moe_args, arguments._add_mla_args, arguments._add_experimental_attention_variant_args):
        parser = add(parser)
    mine = {action.dest for action in arguments._add_network_size_args(argparse.ArgumentParser())._actions}
    flags = mine | {action.dest for action in parser._actions}
    everything = {action.dest for action in arguments.add_megatron_arguments(argparse.ArgumentParser())._actions}
    settings = flags | ({field.name for field in dataclasses.fields(MLATransformerConfig)} & everything)
    by_core = set(re.findall(r"_set_arg\('(\w+)'", inspect.getsource(checkpointing.load_args_from_checkpoint)))
    assert "apply_layernorm_1p" in by_core - everything  # a name that no flag has
    settings -= {field.name for field in dataclasses.fields(ModelParallelConfig)}  # over which ranks it is split
    rest = settings - by_core - set(CORE_FORGETS) - {"help"}
    known = re.compile("|".join(patterns.split()))
    assert not list(filter(known.fullmatch, CORE_FORGETS))
    return sorted(name for name in rest if not known.fullmatch(name))


def test_every_setting_of_core_s_is_somebody_s():
    """A flag that a new version of Core brings has to be put somewhere."""
    assert ranks.run(unclassified, 1, f"{TRAINS} {RUNS} {ELSEWHERE}") == [[]]


def all_restored(folder: str) -> dict[str, object]:
    """What the names of ``core_forgets`` are after ``--use-checkpoint-args``, before anything is validated."""
    from megatron_scmoe.training import arguments

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *SCMOE, "--load", folder, "--use-checkpoint-args"]
    args = arguments.parse_args(arguments.add_scmoe_arguments)
    given = {name: getattr(args, name) for name in arguments.CORE_FORGETS}  # each is a flag
    with contextlib.redirect_stdout(io.StringIO()):
        arguments._restore_args(args)
    assert all(given[name] != getattr(args, name) for name in given)
    return {name: getattr(args, name, None) for name in core_forgets()}


def test_all_that_core_forgets_is_restored(tmp_path):
    """Every name gets the value of the checkpoint, those that a conversion has put there too."""
    from checkpoint_files import ARGS, made_tensors, write_megatron

    (names,) = ranks.run(core_forgets, 1)
    saved = {name: f"of {name}" for name in names}
    folder = write_megatron(tmp_path / "release", made_tensors(), args={**ARGS, **saved})
    assert ranks.run(all_restored, 1, str(folder)) == [saved]


def core_forgets() -> tuple[str, ...]:
    from megatron_scmoe.training.arguments import CORE_FORGETS

    return (*CORE_FORGETS, "hf_config", "hf_has_unused_tensors")


LATENT = """--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4
 --v-head-dim 6"""
FORGOTTEN = {
    "yarn": (
        SCMOE,
        "--position-embedding-type yarn --rotary-scaling-factor 4.0 --mscale 0.7 --mscale-all-dim 0.4 "
        "--yarn-original-max-position-embeddings 8 --yarn-beta-fast 16.0 --yarn-beta-slow 2.0 "
        "--no-yarn-correction-range-round-to-int",
    ),
    "latent yarn": (SCMOE, f"{LATENT} --rope-type yarn --rotary-scaling-factor 8.0 --mscale 0.7 --mscale-all-dim 0.4"),
    "llama 3": (SCMOE, "--use-rope-scaling --rotary-base 500000"),
    "prediction layers": (SCMOE, "--mtp-num-layers 2 --mtp-use-repeated-layer"),
    "stock": (STOCK, "--moe-layer-freq [0,1]*2 --moe-shared-expert-gate --window-size 4,0"),
}


def settings_of(flags: list[str]) -> dict[str, str]:
    """What a command line comes to, validated."""
    from megatron_scmoe.training.arguments import parse_and_validate_args

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()):
        args, *_ = parse_and_validate_args()
    return {name: repr(value) for name, value in vars(args).items()}


@pytest.mark.parametrize("case", FORGOTTEN)
def test_use_checkpoint_args_restores_what_core_forgets(tmp_path, case):
    """Through Megatron's own saving, parsing and validation: what the flags changed is as it was in training."""
    base, flags = FORGOTTEN[case]
    trained = with_flags(base, *("--" + flag for flag in flags.removeprefix("--").split(" --")))
    saving = with_flags(trained, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1")
    (printed,) = ranks.run(training.train, 1, saving)
    assert "exit code" not in printed, printed[-3000:]
    loading = with_flags(base, f"--load {tmp_path}", "--finetune")
    (then,), (plain,) = ranks.run(settings_of, 1, trained), ranks.run(settings_of, 1, base)
    (now,) = ranks.run(settings_of, 1, [*loading, "--use-checkpoint-args"])
    changed = {name for name in then if then[name] != plain[name]}
    assert len(changed) >= flags.count("--")
    assert {name: now[name] for name in changed} == {name: then[name] for name in changed}


def test_use_checkpoint_args_leaves_evaluation_to_the_command_line(tmp_path):
    """What travels in training is the model's business; what travels in evaluation is not."""
    trained = with_flags(SCMOE, "--a2a-codec lsh", "--lsh-hashes 3", "--lsh-evaluation centroids")
    (printed,) = ranks.run(
        training.train, 1, with_flags(trained, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1")
    )
    assert "exit code" not in printed, printed[-3000:]
    loading = [*with_flags(SCMOE, f"--load {tmp_path}", "--finetune"), "--use-checkpoint-args"]
    for flags, evaluation in (([], "tokens"), (["--lsh-evaluation", "centroids"], "centroids")):
        (now,) = ranks.run(settings_of, 1, [*loading, *flags])
        assert (now["a2a_codec"], now["lsh_hashes"]) == ("'lsh'", "3")
        assert now["lsh_evaluation"] == repr(evaluation)
