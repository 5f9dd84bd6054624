"""What a dry run prints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_scmoe.dry_run.memory import Parameters
from megatron_scmoe.dry_run.stages import Stage

NOT_COUNTED = (
    "not counted: CUDA context (about 0.5 GiB), NCCL's buffers, workspaces and gradients of activations while they are "
    "computed, fragmentation, padding of buckets, and experts that get more than their even share of tokens; leave "
    "10% to 20% of a GPU's memory free for them"
)
_COLUMNS = (
    *("stage", "blocks", "MoE", "in flight"),
    *("dense M", "expert M", "total M"),
    *("weights", "gradients", "optimizer", "activations", "sum GiB"),
)


def text(args: Namespace, stages: Sequence[Stage], gone: Sequence[str]) -> str:
    """The report.

    Args:
        args: Megatron's namespace, validated.
        stages: in their order.
        gone: flags that were left out.
    """
    model = sum((stage.in_the_model for stage in stages), Parameters(0, 0))
    lines = [
        f"Dry run on {args.world_size} GPUs: tensor {args.tensor_model_parallel_size} x context "
        f"{args.context_parallel_size} x pipeline {args.pipeline_model_parallel_size} x data {args.data_parallel_size};"
        f" experts on {args.expert_model_parallel_size} ranks x tensor {args.expert_tensor_parallel_size}",
        f"{get_num_microbatches()} micro-batches of {args.micro_batch_size} x {args.seq_length} tokens a step on each "
        f"data-parallel rank, {args.global_batch_size * args.seq_length:,} tokens in all",
        f"the model has {model.total:,} parameters: {model.dense:,} dense and {model.expert:,} of routed experts",
        "",
        "A rank of each pipeline stage: blocks, those with routed experts, micro-batches in flight; millions of "
        "parameters; GiB of memory",
        "",
        *_table([_COLUMNS, *(_row(number, stage) for number, stage in enumerate(stages))]),
        "",
        NOT_COUNTED,
    ]
    if stages[-1].predictions:
        lines.append(
            f"counted, but not among the blocks: {stages[-1].predictions} prediction layers on the last stage, and its "
            "copy of the embedding"
        )
    if args.a2a_codec != "none":
        lines.append(
            f"nor rows on their way, which --a2a-codec {args.a2a_codec} makes smaller; it keeps none for backward"
        )
    if gone:
        lines.append(
            f"built with Megatron's local spec, without {', '.join(gone)}; attention keeps what flash attention keeps"
        )
    return "\n".join(lines)


def _row(number: int, stage: Stage) -> tuple[str, ...]:
    counts = (number, len(stage.blocks), stage.moe_layers, sum(stage.in_flight))
    parameters = (stage.held.dense, stage.held.expert, stage.held.total)
    nbytes = (*stage.standing, stage.activations, stage.total)
    return (
        *map(str, counts),
        *(f"{count / 1e6:,.1f}" for count in parameters),
        *(f"{size / 2**30:.2f}" for size in nbytes),
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
