"""Has the checkpoint the layers of this run? Decided from the arguments saved in it, before any process group starts.

Core reads a stock GPT checkpoint into a hybrid model where all blocks are alike, saved as one tensor and named as
Transformer Engine's are; with a shortcut that is left to tools/convert_checkpoint.py. The other way it ends with a
traceback.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_scmoe.config import ConfigError, ScMoEConfig
from megatron_scmoe.config.groups import layers_of_pattern


def check(args: Namespace, saved: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    """Raise ConfigError where the parameters of a checkpoint belong to other layers than this run has.

    Args:
        args: Megatron's validated namespace.
        saved: the checkpoint's own.
        scmoe: the settings of this run.
        trained: those of the checkpoint.
    """
    now, then = _layers(args), _layers(saved)
    if bool(now) == bool(then):
        if now != then:
            raise ConfigError(
                f"a parameter belongs to its layer: --hybrid-layer-pattern is {now} and the checkpoint in {args.load} "
                f"has {then}, cuts aside; use its pattern"
            )
        return
    if scmoe.enabled or trained.enabled:
        container = "hybrid" if now else "gpt"
        raise ConfigError(
            "a block of Megatron's GPT model is two layers of its hybrid one, with other names: --hybrid-layer-pattern "
            f"is {now or 'not set'} and the checkpoint in {args.load} has {then or 'none'}; load what "
            f"tools/convert_checkpoint.py --from megatron --to megatron --container {container} --load {args.load} "
            f"--save NEW makes of it, or {'drop --hybrid-layer-pattern' if now else 'set it'}"
        )


def _layers(args: Namespace) -> str:
    """Of a hybrid model; empty for blocks."""
    return layers_of_pattern(getattr(args, "hybrid_layer_pattern", None) or "")
