"""What is not refused but slower than it need be: a run with it says so when it starts."""

from __future__ import annotations

from argparse import Namespace

from megatron_scmoe.config import ScMoEConfig, Unique
from megatron_scmoe.report.figures import ONE_QUEUE


def one_queue_warning(scmoe: ScMoEConfig, *, one_queue: bool) -> str | None:
    """``ONE_QUEUE`` where collectives would hold one another up.

    Args:
        scmoe: the settings of this run.
        one_queue: whether a GPU is launched on in one queue.
    """
    return ONE_QUEUE if scmoe.flies_side_by_side and one_queue else None


def codec_warning(args: Namespace, scmoe: ScMoEConfig) -> str | None:
    """Where rows are rounded and do not travel; not refused, as numbers must not depend on the layout.

    Args:
        args: Megatron's namespace, validated.
        scmoe: the settings of this run.
    """
    if not scmoe.rounds or args.expert_model_parallel_size > 1:
        return None
    return (
        f"no token travels, and rows are rounded all the same: --a2a-codec is {scmoe.a2a_codec} and "
        "--expert-model-parallel-size 1; nothing is saved, drop --a2a-codec"
    )


def unique_warning(args: Namespace, scmoe: ScMoEConfig) -> str | None:
    """Where ``--a2a-unique`` costs something and can save nothing; not refused, as the layout may change on resume.

    Args:
        args: Megatron's namespace, validated.
        scmoe: the settings of this run.
    """
    if scmoe.a2a_unique is not Unique.RANK:  # what is in vain with node is refused
        return None
    ranks = args.expert_model_parallel_size
    if ranks == 1:
        why = "no token travels"
    elif args.num_experts == ranks:
        why = "a rank has one expert"
    else:
        return None
    return (
        f"{why}: --a2a-unique is {scmoe.a2a_unique}, --num-experts {args.num_experts} and "
        f"--expert-model-parallel-size {ranks}; nothing is saved, drop --a2a-unique"
    )
