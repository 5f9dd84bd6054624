"""What the entry script refuses with or without a shortcut: what its hooks do not do, and what would have no effect.

In one line, before any process group starts: the rule, the values, the fix.
"""

from __future__ import annotations

import importlib.util
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_scmoe.config import ConfigError, ScMoEConfig
from megatron_scmoe.training import refused_flags


def check_hooks(args: Namespace) -> None:
    """Raise ConfigError for the first flag in ``args`` that the entry script's hooks do not do."""
    for refusal in refused_flags.HOOK_REFUSALS:
        refusal.check(args)
    _check_document_flags(args)
    if args.full_validation and not args.multiple_validation_sets:
        raise ConfigError(
            "Core 0.19.2 ends at its first full validation of a single set: --full-validation is set and "
            "--multiple-validation-sets is off; add --multiple-validation-sets"
        )
    if args.tp_comm_overlap and importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "it is Transformer Engine's: --tp-comm-overlap is set and Transformer Engine is not installed; install it, "
            "or drop --tp-comm-overlap"
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


def check_chunks(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError where there would be chunks without tokens; ``args`` are validated."""
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    if scmoe.overlap_chunks > tokens:
        raise ConfigError(
            f"a chunk has a token at least: --overlap-chunks is {scmoe.overlap_chunks} and a rank has {tokens} tokens "
            f"of a micro-batch; use --overlap-chunks {min(tokens, 4)}"
        )


def check_report_folder(scmoe: ScMoEConfig) -> None:
    """Make the folder of --overlap-report; raise ConfigError where no file can be written there."""
    if not scmoe.overlap_report:
        return
    try:
        Path(scmoe.overlap_report).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scmoe.overlap_report):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the report is files in a folder: --overlap-report is {scmoe.overlap_report}, where none can be written "
            f"({getattr(error, 'strerror', None) or error}); give another folder"
        ) from error
