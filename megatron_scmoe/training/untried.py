"""What is neither refused nor tried: it should work by its sources, and a run with it says so."""

from __future__ import annotations

from argparse import Namespace

from megatron_scmoe.config import ScMoEConfig


def found_in(args: Namespace, scmoe: ScMoEConfig) -> list[str]:
    """A line for each combination of ``args``, validated, that has not run beside collectives of ours."""
    if not scmoe.overlaps:
        return []
    lines = []
    if args.context_parallel_size > 1 and args.transformer_impl == "transformer_engine":
        lines.append(
            "Transformer Engine's context parallelism beside tokens in flight: --context-parallel-size is "
            f"{args.context_parallel_size}; it sends keys and values on streams of its own"
        )
    if args.tp_comm_overlap:
        lines.append(
            "Transformer Engine's overlap of tensor parallelism beside tokens in flight: --tp-comm-overlap is set; "
            "both take multiprocessors and links, and it counts on CUDA_DEVICE_MAX_CONNECTIONS=1"
        )
    return lines
