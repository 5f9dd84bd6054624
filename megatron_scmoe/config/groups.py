"""Which layers of a model form the groups, in both of Megatron's containers.

A layer of a GPT model is a block; a layer of a hybrid model is one symbol of ``--hybrid-layer-pattern``, a residual op.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_scmoe.config.rules import ConfigError

MOE, CUT, BEHIND = "E", "|", "/"
"""Symbols of a pattern that say where groups end: an MoE, a cut between pipeline stages, what follows all stages."""

RESIDUAL_OPS = "M*+-"
"""Symbols whose layers can be ops of a group: Mamba, attention, latent attention and MLP."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group.

    Attributes:
        layers: that it consists of, counted from 0 over the whole model; the last one carries the MoE.
        num_ops: residual ops before its MoE.
    """

    layers: range
    num_ops: int


def groups_of_blocks(num_layers: int, moe_every: int) -> tuple[Group, ...]:
    """The groups of a GPT model: ``moe_every`` blocks each, of attention and MLP, the last MLP an MoE."""
    return tuple(Group(range(first, first + moe_every), 2 * moe_every - 1) for first in range(0, num_layers, moe_every))


def groups_of_pattern(pattern: str) -> tuple[Group, ...]:
    """The groups of a hybrid model: each run of layers of one pipeline stage that ends with an MoE.

    Args:
        pattern: as ``--hybrid-layer-pattern`` has it. Layers behind a stage's last MoE belong to no group.

    Raises:
        ConfigError: for a symbol that no group can run.
    """
    symbols = layers_of_pattern(pattern)
    groups: list[Group] = []
    for stage in stages_of_pattern(pattern):
        first = stage.start  # of the layers that no group has yet
        for layer in stage:
            if symbols[layer] == MOE:
                groups.append(Group(range(first, layer + 1), layer - first))
                first = layer + 1
            elif symbols[layer] not in RESIDUAL_OPS:
                raise ConfigError(
                    f"a group runs the layers {RESIDUAL_OPS}: layer {layer} of --hybrid-layer-pattern {pattern} is "
                    f"{symbols[layer]}; use another layer, or --shortcut none"
                )
    return tuple(groups)


def group_that_ends_with(groups: Sequence[Group], layer: int) -> int:
    """Index of the group whose last layer this is, counted from 0 over the whole model."""
    return [group.layers[-1] for group in groups].index(layer)


def stages_of_pattern(pattern: str) -> Sequence[range]:
    """The layers of each (virtual) pipeline stage that the cuts of ``pattern`` make, in order."""
    stages: list[range] = []
    first = 0
    for stage in _of_all_stages(pattern).split(CUT):
        stages.append(range(first, first + len(stage)))
        first += len(stage)
    return stages


def layers_of_pattern(pattern: str) -> str:
    """The symbols of all layers of ``pattern``, whatever cuts them into stages; not of what follows all stages."""
    return _of_all_stages(pattern).replace(CUT, "")


def predicted_by_pattern(pattern: str) -> list[str]:
    """The symbols of the layers in each prediction layer of ``pattern``, which follow all stages."""
    parts = pattern.replace(CUT, "").split(BEHIND)[1:]
    return [part for part in parts if part]


def _of_all_stages(pattern: str) -> str:
    return pattern.split(BEHIND, maxsplit=1)[0]
