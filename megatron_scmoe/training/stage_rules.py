"""What the pipeline stages of a model must not cut or lack, in blocks as in a hybrid model's pattern."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from math import lcm

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ConfigError, Group, ScMoEConfig, stages_of_pattern
from megatron_scmoe.mcore import stages


def check_pipeline(scmoe: ScMoEConfig, config: TransformerConfig, pattern: str) -> None:
    """Raise ConfigError where a (virtual) pipeline stage would cut a group, a span, or groups that share an MoE.

    Args:
        scmoe: the groups' settings.
        config: Core's.
        pattern: of a hybrid model, whose cuts make the stages; empty for blocks.
    """
    together = lcm(scmoe.shortcut_span, scmoe.moe_share_groups)
    units = _units(scmoe.groups(config.num_layers, pattern), together)
    for name, layers in _stages(config, pattern):
        if _cuts(layers, units):
            said = "".join(
                f", --{name.replace('_', '-')} is {getattr(scmoe, name)}"
                for name in ("shortcut_span", "moe_share_groups")
                if getattr(scmoe, name) > 1
            )
            of_blocks = "" if pattern else f", --moe-every is {scmoe.moe_every}"
            fix = (
                "move the cuts of --hybrid-layer-pattern"
                if pattern
                else f"give every stage whole units of {scmoe.moe_every * together} blocks"
            )
            raise ConfigError(
                f"a pipeline stage holds whole groups, spans and shared MoEs: {name} would hold the layers "
                f"{sorted(layers)}{of_blocks}{said}; {fix}"
            )


def check_recompute(scmoe: ScMoEConfig, config: TransformerConfig, pattern: str) -> None:
    """Raise ConfigError where block recompute would end inside a span, whose last layer runs it: it would be left out.

    The arguments are those of ``check_pipeline``.
    """
    if config.recompute_granularity != "full" or config.recompute_method != "block":
        return
    spans = _units(scmoe.groups(config.num_layers, pattern), scmoe.shortcut_span)
    of_stages = [sorted(layers) for _, layers in _stages(config, pattern)]

    def ends_inside(count: int) -> bool:
        return any(_cuts(set(layers[:count]), spans) for layers in of_stages)

    count = config.recompute_num_layers or 0
    if ends_inside(count):
        whole = next(number for number in itertools.count(count) if not ends_inside(number))
        where = f"--hybrid-layer-pattern is {pattern}" if pattern else f"--moe-every is {scmoe.moe_every}"
        raise ConfigError(
            "a group, or span of groups, is recomputed as a whole, with its last layer: --recompute-method is block, "
            f"--recompute-num-layers is {count}, {where} and --shortcut-span is {scmoe.shortcut_span}; use "
            f"--recompute-num-layers {whole}"
        )


def check_balance_losses(scmoe: ScMoEConfig, config: TransformerConfig, pattern: str) -> None:
    """Raise ConfigError where a rank of the pipeline has no MoE, and balance losses are logged.

    Core sums them over the stages in tensors whose size is the number of all layers where there is an MoE, and of the
    pattern's MoEs where there is none (0.19.2). The arguments are those of ``check_pipeline``.
    """
    losses = {"--moe-aux-loss-coeff": config.moe_aux_loss_coeff, "--moe-z-loss-coeff": config.moe_z_loss_coeff}
    if not pattern or not any(map(_is_positive, losses.values())):
        return
    carriers = {group.layers[-1] for group in scmoe.groups(config.num_layers, pattern)}
    of_stages = [layers for _, layers in _stages(config, pattern)]
    size = config.pipeline_model_parallel_size
    for rank in range(size):
        if not any(carriers & layers for layers in of_stages[rank::size]):
            said = " and ".join(f"{flag} is {value}" for flag, value in losses.items())
            raise ConfigError(
                "Core sums balance losses over pipeline stages that each have an MoE: --hybrid-layer-pattern is "
                f"{pattern}, whose stage {rank} has none, {said}; move its cuts, or use --moe-aux-loss-coeff 0 and no "
                "--moe-z-loss-coeff"
            )


def _is_positive(coefficient: float | list[float] | None) -> bool:
    return any(coefficient) if isinstance(coefficient, list) else bool(coefficient)


def _units(groups: Iterable[Group], together: int) -> list[set[int]]:
    """The layers of so many neighbouring groups each."""
    return [{layer for group in unit for layer in group.layers} for unit in itertools.batched(groups, together)]


def _cuts(layers: set[int], units: list[set[int]]) -> bool:
    """Whether ``layers`` are a part of a unit."""
    return any(unit & layers not in (set(), unit) for unit in units)


def _stages(config: TransformerConfig, pattern: str) -> Iterator[tuple[str, set[int]]]:
    """Names of all (virtual) pipeline stages and the layers that they hold, from 0 over the whole model."""
    size, num_virtual = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if pattern:
        cut = stages_of_pattern(pattern)
        if len(cut) < size:
            raise ConfigError(
                f"groups need to know where a hybrid model is cut: --pipeline-model-parallel-size is {size} and "
                f"--hybrid-layer-pattern {pattern} has {len(cut) - 1} cuts; put a | between stages"
            )
        for number, layers in enumerate(cut):
            yield f"stage {number}", set(layers)
        return
    for pp_rank in range(size):
        for vp_stage in range(num_virtual) if num_virtual else (None,):
            name = f"stage {pp_rank}" + ("" if vp_stage is None else f", virtual stage {vp_stage},")
            yield name, set(stages.blocks_of_stage(config, vp_stage, pp_rank))
