"""Which of Megatron's containers holds the layers: GPT's blocks, or a hybrid model's layer pattern."""

from __future__ import annotations

from argparse import Namespace

from megatron.training.models.base import ModelConfig

from megatron_scmoe.config import ScMoEConfig


def model_config_from_args(args: Namespace, scmoe: ScMoEConfig) -> ModelConfig:
    """The model that ``args`` describe.

    Each container is imported where it is asked for alone: Megatron may drop either.
    """
    if args.hybrid_layer_pattern:
        from megatron_scmoe.models import hybrid  # noqa: PLC0415 (see above)

        return hybrid.model_config_from_args(args, scmoe)
    from megatron_scmoe.models import gpt  # noqa: PLC0415 (see above)

    return gpt.model_config_from_args(args, scmoe)
