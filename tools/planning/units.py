"""The smallest parts of a model that no pipeline stage cuts, and what else of its flags decides which layouts are."""
# ruff: noqa: PLC0415 - Megatron takes seconds to import, for which a refusal of this tool's need not wait

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from command_line import UserError

from megatron_scmoe.config import ConfigError, Position, ScMoEConfig
from planning import settings
from planning.settings import PATTERN, Model


@dataclass(frozen=True, kw_only=True)
class Units:
    """The parts.

    Attributes:
        size: layers of each; of a hybrid model they differ.
        freq: which of these layers have an MoE; empty where a shortcut says that, or a pattern.
        segments: symbols of each part of a hybrid model; empty words for blocks.
        behind: what a hybrid model's pattern has behind all stages.
    """

    size: int
    freq: list[int]
    segments: tuple[str, ...]
    behind: str = ""


def units_of(flags: Sequence[str]) -> Units:
    """The parts of the model of ``flags``. Raises UserError for layers that are no whole parts."""
    if PATTERN in flags:
        return _of_pattern(flags)
    num_layers = settings.whole_of(flags, "--num-layers")
    size, freq = _of_blocks(flags, num_layers)
    return Units(size=size, freq=freq, segments=("",) * (num_layers // size))


def _of_blocks(flags: Sequence[str], num_layers: int) -> tuple[int, list[int]]:
    """Blocks of a part, and which of them have an MoE; the latter empty where a shortcut says that."""
    if settings.value_of(flags, "--shortcut", "none") != "none":
        size = settings.whole_of(flags, "--moe-every", "2") * settings.whole_of(flags, "--moe-share-groups", "1")
        if num_layers % size:
            raise UserError(f"groups are whole: --num-layers is {num_layers} and a group has {size}; use a multiple")
        return size, []
    if "--num-experts" not in flags:
        return 1, []
    from megatron.training.arguments import moe_freq_type

    every = moe_freq_type(settings.value_of(flags, "--moe-layer-freq", "1"))
    freq = every if isinstance(every, list) else [int(layer % every == 0) for layer in range(num_layers)]
    sizes = (size for size in range(1, num_layers + 1) if num_layers % size == 0)
    size = next(size for size in sizes if freq[:size] * (num_layers // size) == freq)
    return size, freq[:size]


def _of_pattern(flags: Sequence[str]) -> Units:
    """Parts end with an MoE, as groups do, the last one with the model; without experts each layer is one."""
    stages, slash, behind = settings.value_of(flags, PATTERN).partition("/")
    symbols = stages.replace("|", "")
    segments = re.findall(r"[^E]*E", symbols) or list(symbols)
    if not segments:
        raise UserError(f"a search lays out layers: {PATTERN} has none before its predictions; add some")
    segments[-1] += symbols[len("".join(segments)) :]
    together = settings.whole_of(flags, "--moe-share-groups", "1")
    if len(segments) % together:
        raise UserError(
            f"groups that share an MoE stay together: {PATTERN} has {len(segments)} groups and --moe-share-groups is "
            f"{together}; use a multiple"
        )
    parts = tuple("".join(segments[first : first + together]) for first in range(0, len(segments), together))
    return Units(size=0, freq=[], segments=parts, behind=slash + behind)


def model_of(flags: Sequence[str], units: Units, args: Namespace, scmoe: ScMoEConfig, keep: Collection[str]) -> Model:
    """What decides which layouts there are.

    Args:
        flags: of the entry script.
        units: of its model.
        args: Megatron's namespace of a model of the same sizes, validated.
        scmoe: our settings in it.
        keep: names of ``settings.KEEPABLE`` that stay as ``flags`` have them.
    """
    kept, count = settings.kept(flags, keep), len(units.segments)
    positions: tuple[str, ...] = ("",)
    spans: tuple[int, ...] = (1,)
    if scmoe.enabled:
        own = settings.value_of(flags, "--shortcut-position", "pos2")
        whole = "".join(units.segments)
        found = _positions(scmoe, len(whole) or units.size * count, whole)
        positions = tuple(sorted(found, key=lambda one: one != own))
        own_span = settings.whole_of(flags, "--shortcut-span", "1")
        may_land = count % 2 == 0 and scmoe.moe_share_groups == 1 and scmoe.shortcut_norms == "none"
        spans = tuple(sorted({1, 2} if may_land else {1}, key=lambda one: one != own_span))
        positions = (kept["position"],) if "position" in keep else positions
        spans = (int(kept["span"]),) if "span" in keep else spans
    return Model(
        flags=tuple(settings.not_chosen(flags)),
        unit=units.size,
        segments=units.segments,
        behind=units.behind,
        heads=args.num_attention_heads,
        key_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        experts=args.num_experts or 0,
        sequence=args.seq_length,
        global_batch=settings.whole_of(flags, "--global-batch-size"),
        context=args.context_parallel_size,
        positions=positions,
        spans=spans,
        kept=kept,
    )


def _positions(scmoe: ScMoEConfig, num_layers: int, pattern: str) -> Iterator[str]:
    """Those that the groups have; farskip is a form of its own, which nobody chooses by speed."""
    for position in (Position.POS1, Position.POS2, Position.POS3):
        try:
            one = replace(scmoe, shortcut_position=(position,), shortcut_span=1, shortcut_landing=0)
            one.validate(num_layers, pattern)
        except ConfigError:
            continue
        yield str(position)
