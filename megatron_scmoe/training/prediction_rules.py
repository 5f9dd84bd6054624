"""What cannot go together with prediction layers (--mtp-num-layers), which follow the groups as stock layers."""

from __future__ import annotations

from argparse import Namespace

from megatron.training.utils import print_rank_0

from megatron_scmoe.config import ConfigError, Router, ScMoEConfig
from megatron_scmoe.config.groups import BEHIND, CUT, MOE, predicted_by_pattern
from megatron_scmoe.mcore.packing import packs_sequences

_LAYOUT_SYMBOL = "m"  # of a prediction layer in --pipeline-model-parallel-layout


def check_early(args: Namespace) -> None:
    """Raise ConfigError for prediction layers beside cut or packed sequences, and where pattern and flag differ."""
    pattern = args.hybrid_layer_pattern or ""
    depths = predicted_by_pattern(pattern)
    if pattern and args.mtp_num_layers not in (None, len(depths)):
        raise ConfigError(
            f"prediction layers of a hybrid model stand behind its {BEHIND}: --mtp-num-layers is {args.mtp_num_layers} "
            f"and --hybrid-layer-pattern {pattern} has {len(depths)}; drop --mtp-num-layers, or change the pattern"
        )
    if (depths or args.mtp_num_layers) and (args.context_parallel_size > 1 or packs_sequences(args)):
        raise ConfigError(
            "prediction layers have not run with cut or packed sequences: --mtp-num-layers is "
            f"{args.mtp_num_layers or len(depths)}, --context-parallel-size is {args.context_parallel_size} and "
            f"sequences are {'packed' if packs_sequences(args) else 'not packed'}; drop --mtp-num-layers, or what "
            f"follows {BEHIND}"
        )


def check(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError for the first setting in ``args``, validated, that prediction layers cannot have."""
    if not args.mtp_num_layers:
        return
    if args.pipeline_model_parallel_size > 1 and not args.untie_embeddings_and_output_weights:
        raise ConfigError(
            "Core builds a second output layer beside tied embeddings where prediction layers are, and cannot save it: "
            f"--mtp-num-layers is {args.mtp_num_layers} and --pipeline-model-parallel-size is "
            f"{args.pipeline_model_parallel_size}; add --untie-embeddings-and-output-weights"
        )
    layout = args.pipeline_model_parallel_layout
    if isinstance(layout, str) and _LAYOUT_SYMBOL in layout.rpartition(CUT)[0]:
        raise ConfigError(
            "only the first and the last pipeline stage get data: --pipeline-model-parallel-layout is "
            f"{layout}, whose prediction layers are on another one; put them before its L"
        )
    if args.recompute_granularity == "full" and args.recompute_method == "uniform" and args.recompute_num_layers != 1:
        raise ConfigError(
            f"Core recomputes prediction layers one by one: --recompute-num-layers is {args.recompute_num_layers} and "
            f"--mtp-num-layers is {args.mtp_num_layers}; use --recompute-num-layers 1"
        )
    behind = (args.hybrid_layer_pattern or "").partition(BEHIND)[2]
    if scmoe.router is Router.LONGCAT and MOE in behind:
        raise ConfigError(
            "an MoE of a prediction layer has the stock router, which knows no bias beside a softmax: --router is "
            f"longcat and --hybrid-layer-pattern is {args.hybrid_layer_pattern}; put - in the place of the {MOE} "
            f"behind its {BEHIND}"
        )


def check_saved(args: Namespace, saved: Namespace) -> None:
    """Raise ConfigError where a checkpoint has another number of prediction layers than the model that it is to fill.

    Those that the model lacks Core leaves out without a word; --finetune may, and says so.

    Args:
        args: Megatron's validated namespace.
        saved: the checkpoint's own.
    """
    now, then = args.mtp_num_layers or None, getattr(saved, "mtp_num_layers", None) or None
    if now == then:
        return
    if now is None and args.finetune:
        print_rank_0(f" > the {then} prediction layers of the checkpoint in {args.load} are left out")
        return
    fix = "drop it" if then is None else f"use --mtp-num-layers {then}"
    leave = "" if now else ", or --finetune, which leaves them out"
    raise ConfigError(
        f"prediction layers come from the checkpoint, too: --mtp-num-layers is {now} and the checkpoint in {args.load} "
        f"has {then}; {fix}{leave}"
    )
