"""What else could be done with a model, and what of that this project runs today: other overlaps, other forms, less to
send.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from megatron_scmoe.config import Codec, ConfigError, Overlap, Position, Router, ScMoEConfig, Shortcut, Unique
from planning import reading, sending
from planning.hardware import Machine
from planning.workload import Moe, Span, Workload

RATE = 0.2
"""Part of the rows that LSH-MoE sends (arXiv 2411.08446, section 4.1: between 10% and 20%)."""
MOST_CHUNKS = 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The same run with something else.

    Attributes:
        name: what.
        workload: of a step.
        flags: with which it runs.
        note: what else to know, such as that it is another model.
    """

    name: str
    workload: Workload
    flags: str
    note: str = ""


@dataclass(frozen=True)
class Run:
    """A run whose flags the entry script accepts.

    Attributes:
        args: Megatron's namespace, validated.
        scmoe: our settings in it.
        layers_of_stages: layers of each pipeline stage.
    """

    args: Namespace
    scmoe: ScMoEConfig
    layers_of_stages: Sequence[Sequence[int]]

    @property
    def workload(self) -> Workload:
        """Of a step."""
        return reading.workload(self.args, self.scmoe, self.layers_of_stages)

    def changed(self, scmoe: ScMoEConfig, **args: object) -> Run | None:
        """With other settings; None where no model is like that, or a stage would cut one of its spans."""
        other = copy(self.args)
        vars(other).update(args)
        pattern = other.hybrid_layer_pattern or ""
        try:
            scmoe.validate(other.num_layers, pattern)
            groups = scmoe.groups(other.num_layers, pattern) if scmoe.enabled else ()
        except ConfigError:
            return None
        spans = [groups[first : first + scmoe.shortcut_span] for first in range(0, len(groups), scmoe.shortcut_span)]
        for span in spans:
            layers = {layer for group in span for layer in group.layers}
            if any(layers & set(stage) not in (set(), layers) for stage in self.layers_of_stages):
                return None
        return Run(other, scmoe, self.layers_of_stages)


def overlaps(run: Run) -> Iterator[Variant]:
    """With each overlap: off, at a fixed place, where the solver puts it, and that in chunks; none of a stock layer."""
    scmoe = run.scmoe
    if not (scmoe.enabled or scmoe.replaces_stock_moe):
        return
    for overlap, chunks in (
        (Overlap.OFF, 1),
        (Overlap.FIXED, 1),
        (Overlap.ADAPTIVE, 1),
        (Overlap.ADAPTIVE, MOST_CHUNKS),
    ):
        if not scmoe.enabled and chunks == 1:
            continue  # the stock layer in one piece has nothing to place
        other = run.changed(replace(scmoe, overlap=overlap, overlap_chunks=chunks, expert_slot=()))
        if other is not None:
            in_chunks = f" --overlap-chunks {chunks}" if chunks > 1 else ""
            yield Variant(
                name=f"{overlap}{f', up to {chunks} chunks' if chunks > 1 else ''}",
                workload=other.workload,
                flags=f"--overlap {overlap}{in_chunks}",
            )


def what_if(run: Run) -> list[Variant]:
    """Other forms of the MoE, and less to send."""
    if not run.args.num_experts:
        return []
    return [*_forms(run), *_less_to_send(run)]


def _forms(run: Run) -> Iterator[Variant]:
    """The stock layer, and ScMoE at other positions and landings."""
    base, given, note = run, "", "another model"
    if run.scmoe.enabled:
        yield from _stock(run)
    else:
        changed = _as_scmoe(run)
        if changed is None:
            return
        base, given = changed
        note += " with a shared expert"
        note += " and one routed expert less" if base.args.moe_router_topk != run.args.moe_router_topk else ""
    if base.scmoe.shortcut is not Shortcut.SCMOE:
        return
    for position in (Position.POS1, Position.POS2, Position.POS3):
        if run.scmoe.enabled and set(run.scmoe.shortcut_position) == {position}:
            continue
        other = base.changed(replace(base.scmoe, shortcut_position=(position,), expert_slot=()))
        if other is not None:
            flags = f"{given}--shortcut-position {position}"
            yield Variant(name=f"ScMoE {position}", workload=other.workload, flags=flags, note=note)
    landed = base.changed(replace(base.scmoe, shortcut_span=2, shortcut_landing=1, expert_slot=()))
    if landed is not None and not base.scmoe.shortcut_landing:
        own = "" if run.scmoe.enabled else f"--shortcut-position {base.scmoe.shortcut_position[0]} "
        flags = f"{given}{own}--shortcut-span 2 --shortcut-landing 1"
        yield Variant(name="late landing", workload=landed.workload, flags=flags, note=note)


def _stock(run: Run) -> Iterator[Variant]:
    stock = replace(ScMoEConfig(), router=run.scmoe.router, zero_experts=run.scmoe.zero_experts)
    flags = "--shortcut none" if run.scmoe.router is Router.CORE and run.scmoe.shortcut is Shortcut.SCMOE else ""
    workload = Run(run.args, stock, run.layers_of_stages).workload
    yield Variant(name="no shortcut", workload=workload, flags=flags, note="the stock layer")


def _as_scmoe(run: Run) -> tuple[Run, str] | None:
    """A stock model with shortcuts, and the flags for that but the position; None where its MoEs are in no groups."""
    every, num_layers = run.args.moe_layer_freq, run.args.num_layers
    if run.args.hybrid_layer_pattern:
        group = ScMoEConfig().moe_every
    elif isinstance(every, list):
        group = num_layers // max(1, sum(map(bool, every)))
        if [bool(one) for one in every] != ([False] * (group - 1) + [True]) * (num_layers // group):
            return None
    elif every == 1:
        group = 1
    else:
        return None  # Core's whole numbers put an MoE first, not last
    flags = f"--shortcut {Shortcut.SCMOE} --overlap {Overlap.ADAPTIVE} "
    flags += "" if run.args.hybrid_layer_pattern else f"--moe-every {group} "
    args: dict[str, object] = {}
    if not run.args.moe_shared_expert_intermediate_size:
        if run.args.moe_router_topk < 2:
            return None
        width, top_k = run.args.moe_ffn_hidden_size, run.args.moe_router_topk - 1
        args = {"moe_shared_expert_intermediate_size": width, "moe_router_topk": top_k}
        flags += f"--moe-shared-expert-intermediate-size {width} --moe-router-topk {top_k} "
        if top_k == 1 and run.args.moe_router_score_function == "softmax":
            flags += "--moe-router-pre-softmax "  # the softmax of one score is 1
    position = Position.POS1 if group == 1 or run.args.hybrid_layer_pattern else Position.POS2
    scmoe = replace(
        ScMoEConfig(), shortcut=Shortcut.SCMOE, moe_every=group, shortcut_position=(position,), overlap=Overlap.ADAPTIVE
    )
    changed = run.changed(scmoe, **args)
    return None if changed is None else (changed, flags)


def _less_to_send(run: Run) -> Iterator[Variant]:
    workload, args = run.workload, run.args
    moe = next(_moes(workload))
    yield from _unique(run)
    rounded = None if run.scmoe.rounds else run.changed(replace(run.scmoe, a2a_codec=Codec.FP8))
    if rounded is not None:
        yield Variant(
            name="fp8 dispatch", workload=rounded.workload, flags="--a2a-codec fp8",
            note="dispatch forward and combine backward in fp8, the others in bf16",
        )  # fmt: skip
    width = args.hidden_size // 2
    if not moe.latent:
        yield Variant(
            name="latents of half the width", workload=_with_moes(workload, latent=width),
            flags=f"--moe-latent-size {width}", note="another model, whose experts compute less",
        )  # fmt: skip
    yield Variant(
        name=f"LSH-MoE, {RATE:.0%} of the rows",
        workload=_with_moes(workload, sent=RATE, once=None, beside=0.0, beside_back=0.0, rounded=frozenset()),
        flags=f"{_without(run.scmoe)}--a2a-codec lsh --lsh-target-rate {RATE}",
        note="without the cost of hashing; changes the model",
    )  # fmt: skip


def _without(scmoe: ScMoEConfig) -> str:
    """Flags that undo what ``scmoe`` has and no codec of centroids takes."""
    default = ScMoEConfig().fp8_transfers
    transfers = f"--fp8-transfers {' '.join(default)} " if scmoe.fp8_transfers != default else ""
    return "--a2a-unique none " * scmoe.sends_once + transfers


def _unique(run: Run) -> Iterator[Variant]:
    """Each token once to each rank, where that is less."""
    topk, ranks = run.args.moe_router_topk, run.args.expert_model_parallel_size
    if run.scmoe.sends_once or topk == 1 or ranks == 1 or sending.unknown(run.args, run.scmoe):
        return
    other = run.changed(replace(run.scmoe, a2a_unique=Unique.RANK))
    once = 1.0 if other is None else next(_moes(other.workload)).once
    if other is not None and once is not None and once < 1:
        yield Variant(
            name="unique tokens",
            workload=other.workload,
            flags="--a2a-unique rank",
            note=f"a token travels to a rank once: {1 - once:.0%} of the rows less, with even routing",
        )


def _with_moes(workload: Workload, **changes: Any) -> Workload:
    return replace(workload, stages=tuple(reading.with_calls(stage, **changes) for stage in workload.stages))


def _moes(workload: Workload) -> Iterator[Moe]:
    for stage in workload.stages:
        for op in stage:
            if isinstance(op, Moe):
                yield op
            elif isinstance(op, Span):
                yield from op.calls


def without_all_to_all(workload: Workload, machine: Machine) -> tuple[Workload, Machine]:
    """What no form of ``workload`` beats: nothing travels to experts, and no collective waits for its peers."""
    still = _with_moes(workload, carried=0.0)
    stages = (
        tuple(replace(op, overlap=Overlap.OFF, chunks=(1,)) if isinstance(op, Span) else op for op in stage)
        for stage in still.stages
    )
    return replace(still, stages=tuple(stages)), replace(machine, constants=replace(machine.constants, message_s=0.0))
