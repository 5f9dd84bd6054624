"""What the entry script refuses with or without a shortcut: what its hooks do not do, and what would have no effect.

In one line, before any process group starts: the rule, the values, the fix.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from megatron_scmoe.config import ConfigError, ScMoEConfig, stages_of_pattern
from megatron_scmoe.training import hybrid_rules, prediction_rules, queues, refused_flags, sequence_rules

_FOLDERS = (
    *("overlap_report", "save", "data_cache_path", "moe_routing_trace_path", "logits_save_dir", "ckpt_convert_save"),
    "non_persistent_global_ckpt_dir",
)
"""Where every machine writes, which Megatron tries behind the process groups, or behind the first steps."""
_FOLDERS_OF_ONE = ("tensorboard_dir", "wandb_save_dir")
"""Where one machine writes: on others the place may not be there."""
_FILES = ("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path", "te_precision_config_file")

_RESTARTS = ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT")
"""How often torchrun would start the ranks again, and how often Slurm has."""


_TIMES_COLLECTIVES = ("TORCH_NCCL_ENABLE_TIMING", "NCCL_ENABLE_TIMING", "TORCH_NCCL_DESYNC_DEBUG", "NCCL_DESYNC_DEBUG")
"""With one of them torch records an event that takes the time before and behind each collective."""
_TRUE = ("1", "T", "TRUE", "Y", "YES")


def check_hooks(args: Namespace, *, needs_transformer_engine: bool = True) -> None:
    """Raise ConfigError for the first flag in ``args`` that the entry script's hooks do not do.

    Args:
        args: Megatron's namespace.
        needs_transformer_engine: whether what is Transformer Engine's will be used.
    """
    for refusal in refused_flags.HOOK_REFUSALS:
        refusal.check(args)
    _check_loss_mask(args)
    sequence_rules.check_sequences(args)
    _check_document_flags(args)
    _check_pattern(args)
    prediction_rules.check_early(args)
    if args.full_validation and not args.multiple_validation_sets:
        raise ConfigError(
            "Core 0.19.2 ends at its first full validation of a single set: --full-validation is set and "
            "--multiple-validation-sets is off; add --multiple-validation-sets"
        )
    if args.save_tokens_per_expert_interval and not (
        args.transformer_impl == "transformer_engine" and args.moe_grouped_gemm
    ):
        raise ConfigError(
            "Core counts the tokens of experts in Transformer Engine's grouped products alone: "
            f"--save-tokens-per-expert-interval is {args.save_tokens_per_expert_interval}, --transformer-impl is "
            f"{args.transformer_impl} and --moe-grouped-gemm is {'on' if args.moe_grouped_gemm else 'off'}; drop it"
        )
    if args.use_grouped_gemm_for_shared_expert and args.transformer_impl == "local":
        raise ConfigError(
            "Core has a grouped product for a shared expert in Transformer Engine alone: "
            "--use-grouped-gemm-for-shared-expert is set and --transformer-impl is local; drop it"
        )
    if args.eval_interval is None and not (args.skip_train or args.full_validation):
        raise ConfigError(
            "Megatron divides by it, be anything evaluated or not: --eval-interval is not set and --eval-iters is "
            f"{args.eval_iters}; set --eval-interval, and --eval-iters 0 to evaluate nothing"
        )
    if args.async_save:
        _check_async_saves(args)
    missing = needs_transformer_engine and importlib.util.find_spec("transformer_engine") is None
    if args.tp_comm_overlap and missing:
        raise ConfigError(
            "it is Transformer Engine's: --tp-comm-overlap is set and Transformer Engine is not installed; install it, "
            "or drop --tp-comm-overlap"
        )
    if args.moe_latent_size:
        _check_latents(args, missing=missing and torch.cuda.is_available())


def _check_async_saves(args: Namespace) -> None:
    """Refuse what Megatron would turn off with a warning, and what would end a save halfway."""
    if args.exit_signal_handler:
        raise ConfigError(
            "a signal ends the processes that save asynchronously, which launchers send it as well: --async-save and "
            "--exit-signal-handler are set; drop one of them"
        )
    if not args.use_persistent_ckpt_worker:
        raise ConfigError(
            "Megatron saves asynchronously by a process that stays, and not at all without: --async-save is set and "
            "--use-persistent-ckpt-worker is not; add --use-persistent-ckpt-worker, or drop --async-save"
        )


def _check_latents(args: Namespace, *, missing: bool) -> None:
    """Refuse what Core's latent projections cannot do; ``missing``: Transformer Engine, and no CPU stands in for it."""
    if missing:
        raise ConfigError(
            "Core makes latent projections of Transformer Engine's linears, whatever the spec: --moe-latent-size is "
            f"{args.moe_latent_size} and Transformer Engine is not installed; install it, or drop --moe-latent-size"
        )
    if args.moe_shared_expert_overlap:
        raise ConfigError(
            "Core overlaps no shared expert with latent projections while it trains: --moe-latent-size is "
            f"{args.moe_latent_size} and --moe-shared-expert-overlap is set; drop --moe-shared-expert-overlap"
        )


def _check_pattern(args: Namespace) -> None:
    """What of a hybrid model's pattern the hooks, or this machine, do not have."""
    pattern = args.hybrid_layer_pattern or ""
    counted = sum(len(stage) for stage in stages_of_pattern(pattern))
    if pattern and args.num_layers not in (None, counted):
        raise ConfigError(
            f"the layers of a hybrid model stand in its pattern: --num-layers is {args.num_layers} and "
            f"--hybrid-layer-pattern {pattern} has {counted}; drop --num-layers"
        )
    if pattern:
        hybrid_rules.check_layers(args)
        hybrid_rules.check_cuts(args)
        hybrid_rules.check_recomputation(args)
        hybrid_rules.check_positions(args)
        hybrid_rules.check_norms(args)


def _check_loss_mask(args: Namespace) -> None:
    if args.context_parallel_size > 1 and args.eod_mask_loss and not args.calculate_per_token_loss:
        raise ConfigError(
            "Core averages a loss over the tokens of each context-parallel rank, and then over these, so that a token "
            f"counts by where it is: --context-parallel-size is {args.context_parallel_size} and --eod-mask-loss is "
            "set; add --calculate-per-token-loss, or drop --eod-mask-loss"
        )


def _check_document_flags(args: Namespace) -> None:
    """Masks and positions that begin anew with each document reach the model only where something reads them."""
    if args.reset_attention_mask:
        local, masked = args.transformer_impl == "local", args.create_attention_mask_in_dataloader
        few_stages = args.pipeline_model_parallel_size <= 2 and not (
            args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
        )
        if not (local and masked and few_stages):
            raise ConfigError(
                "a mask of documents reaches the attention where the data loader makes it, the local spec reads it and "
                "every pipeline stage gets data: --reset-attention-mask is set, "
                f"--no-create-attention-mask-in-dataloader is {'off' if masked else 'on'}, --transformer-impl is "
                f"{args.transformer_impl} and --pipeline-model-parallel-size is {args.pipeline_model_parallel_size}; "
                "drop --reset-attention-mask"
            )
    if args.reset_position_ids and args.position_embedding_type not in ("learned_absolute", "mrope"):
        raise ConfigError(
            "nothing reads position ids where positions are no table: --reset-position-ids is set and "
            f"--position-embedding-type is {args.position_embedding_type}; drop --reset-position-ids"
        )


def check_restarts(args: Namespace) -> None:
    """Raise ConfigError where a restarted job would not go on from what it saved, but begin anew and write over it."""
    restarts = {name: os.environ.get(name, "0") for name in _RESTARTS}
    if not args.save or all(number == "0" for number in restarts.values()):
        return
    begins_anew = {
        f"--load is {args.load} and --save is {args.save}": args.load != args.save,
        "--finetune is set": args.finetune,
        f"--ckpt-step is {args.ckpt_step}": args.ckpt_step is not None,
    }
    if found := [words for words, is_so in begins_anew.items() if is_so]:
        name, number = next((name, number) for name, number in restarts.items() if number != "0")
        raise ConfigError(
            f"a restarted job goes on from the newest checkpoint that it saved: {name} is {number} and {found[0]}; use "
            f"--load {args.save}, without --finetune and --ckpt-step, and --pretrained-checkpoint for the weights to "
            "begin with"
        )


def check_chunks(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError where there would be chunks without tokens; ``args`` are validated."""
    sequences = min(args.micro_batch_size, args.eval_micro_batch_size)
    tokens = sequences * args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    if scmoe.overlap_chunks > tokens:
        raise ConfigError(
            f"a chunk has a token at least: --overlap-chunks is {scmoe.overlap_chunks} and a rank has {tokens} tokens "
            f"of a micro-batch; use --overlap-chunks {min(tokens, 4)}"
        )


def check_timing(scmoe: ScMoEConfig) -> None:
    """Raise ConfigError where events that time collectives would keep them from running beside anything."""
    if queues.asked_for() != 1 or not scmoe.overlaps:
        return
    found = [name for name in _TIMES_COLLECTIVES if os.environ.get(name, "").upper() in _TRUE]
    if os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        found.append("TORCH_DISTRIBUTED_DEBUG")
    if found:
        raise ConfigError(
            "in one queue no collective runs beside anything once torch times it (pytorch issue 143890): "
            f"CUDA_DEVICE_MAX_CONNECTIONS is 1 and {found[0]} is {os.environ[found[0]]}; unset {found[0]}, or use "
            "CUDA_DEVICE_MAX_CONNECTIONS=32 or --overlap off"
        )


def check_paths(args: Namespace) -> None:
    """Raise ConfigError where a folder cannot be written, or a file is not there; nothing is made yet."""
    for name in (*_FOLDERS, *_FOLDERS_OF_ONE):
        path = getattr(args, name)
        if path and "://" not in path and (reason := _obstacle(path, is_tried=name in _FOLDERS)):
            raise ConfigError(
                f"what is written are files in a folder: --{name.replace('_', '-')} is {path}, where none can be "
                f"written ({reason}); give another folder"
            )
    for name in _FILES:
        path = getattr(args, name)
        if path and "://" not in path and not os.path.isfile(path):  # noqa: PTH113 (never raises)
            raise ConfigError(f"it is to be read: --{name.replace('_', '-')} is {path}, which is no file; give a file")


def _obstacle(path: str, *, is_tried: bool) -> str | None:
    """What keeps files from being written below ``path``, as far as it shows now; None: nothing."""
    place = Path(path).absolute()
    try:
        while not place.is_symlink() and not place.exists():
            place = place.parent
        if is_tried or not place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                pass
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
