"""What ranks of many layouts hold, from a few dry runs of stages with a unit of layers each (``probing.py``).

The first of these stages has the embedding, the last one the output layer, and each has a like without: so they tell
what a unit, what is before all units and what is behind them need: parameters, and bytes that autograd keeps. A search
prunes by it; what it reports was dry-run as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planning.dry import DryRun
from planning.settings import FULL, Layout, Model, units_of_stages

if TYPE_CHECKING:
    from megatron_scmoe.dry_run.stages import Stage


@dataclass(frozen=True, slots=True)
class Part:
    """Some layers on one rank: parameters, and bytes that are kept of a micro-batch of one sequence."""

    dense: float
    expert: float
    kept: float

    @classmethod
    def of(cls, stage: Stage, ep: int) -> Part:
        """A stage of a dry run on so many expert-parallel ranks: experts of all of these."""
        return cls(stage.held.dense, stage.held.expert * ep, stage.saved[0])

    def __sub__(self, other: Part) -> Part:
        return Part(self.dense - other.dense, self.expert - other.expert, self.kept - other.kept)

    def __add__(self, other: Part) -> Part:
        return Part(self.dense + other.dense, self.expert + other.expert, self.kept + other.kept)

    def times(self, number: float) -> Part:
        """So many of them."""
        return Part(self.dense * number, self.expert * number, self.kept * number)


@dataclass(frozen=True, slots=True)
class Parts:
    """What is before all units, each kind of unit by its symbols, and what is behind all units."""

    before: Part
    units: Mapping[str, Part]
    behind: Part

    def of_tensor_ranks(self, halves: Parts, tp: int) -> Parts:
        """On ``tp`` ranks, where these are on one, and ``halves`` on two: what they share is cut by their number."""

        def cut(one: Part, half: Part) -> Part:
            return (one - half).times(2 / tp) + half.times(2) - one

        units = {name: cut(one, halves.units[name]) for name, one in self.units.items()}
        return Parts(cut(self.before, halves.before), units, cut(self.behind, halves.behind))


PROBED = ((1, 1), (2, 1), (2, 2))
"""Tensor and expert-tensor parallel ranks."""


def _parts_of(dry: DryRun, segments: Sequence[str]) -> Parts:
    first, *units, last = (Part.of(stage, dry.args.expert_model_parallel_size) for stage in dry.stages)
    by_kind = dict(zip(dict.fromkeys(segments), units, strict=True))
    return Parts(first - by_kind[segments[0]], by_kind, last - by_kind[segments[-1]])


class Footprints:
    """Memory of layouts.

    Args:
        model: of which.
        probes: dry runs by tensor and expert-tensor parallel ranks: ``PROBED``, or the first of them where ranks cannot
            share the model.
        gpus: of the job.
    """

    def __init__(self, model: Model, probes: Mapping[tuple[int, int], DryRun], gpus: int) -> None:
        self._model, self._gpus = model, gpus
        self._args, unit = probes[1, 1].args, probes[1, 1].stages[1]
        self._each = (unit.standing.weights + unit.standing.gradients) / unit.held.total
        self._probed = {pair: _parts_of(dry, model.segments) for pair, dry in probes.items()}
        self._freed: dict[str, dict[str, float]] = {}
        self._known: dict[tuple[int, int], Parts] = {}

    def computing_again(self, probes: Mapping[str, DryRun]) -> tuple[str, ...]:
        """Take note of dry runs that compute one module each again, by its name; returns those that keep less."""
        whole = self._probed[1, 1].units
        for module, dry in probes.items():
            its = _parts_of(dry, self._model.segments).units
            freed = {name: part.kept - its[name].kept for name, part in whole.items()}
            if min(freed.values()) >= 0 < max(freed.values()):
                self._freed[module] = freed
        return tuple(self._freed)

    def _parts(self, layout: Layout) -> Parts:
        pair = (layout.tp, min(2, layout.etp))
        if pair not in self._known:
            whole = self._probed[1, 1]
            self._known[pair] = whole if layout.tp == 1 else whole.of_tensor_ranks(self._probed[2, pair[1]], layout.tp)
        return self._known[pair]

    def nbytes(self, layout: Layout) -> float:
        """What the rank that needs most of ``layout`` holds, in bytes; units are computed again one by one."""
        stages = units_of_stages(layout, self._model)
        alike = not layout.sizes and len(set(self._model.segments)) == 1
        looked_at = {0, layout.pp - 1} if alike else range(layout.pp)
        return max(self._stage(layout, stages, number) for number in looked_at)

    def _stage(self, layout: Layout, stages: Sequence[Sequence[range]], number: int) -> float:
        parts, args = self._parts(layout), self._args
        segments = [self._model.segments[unit] for units in stages[number] for unit in units]
        of_stage = Part(0, 0, 0)
        for name, count in Counter(segments).items():
            of_stage += parts.units[name].times(count)
        if number == 0:
            of_stage += parts.before
        if number == layout.pp - 1:
            of_stage += parts.behind
        if layout.pp == 1 and not args.untie_embeddings_and_output_weights:
            of_stage -= Part(args.padded_vocab_size * args.hidden_size / layout.tp, 0, 0)
        return self._standing(layout, of_stage) + self._activations(layout, stages[number], number)

    def _standing(self, layout: Layout, part: Part) -> float:
        from megatron_scmoe.dry_run.memory import optimizer_bytes_per_parameter  # noqa: PLC0415 - imports Megatron

        args = self._args
        optimizer = optimizer_bytes_per_parameter(args)
        dense, expert = part.dense, part.expert / layout.ep
        shards = (1.0, 1.0)
        if args.use_distributed_optimizer:
            ranks = self._gpus / layout.pp
            shards = (ranks / layout.tp, ranks / (layout.ep * layout.etp))
        return self._each * (dense + expert) + optimizer * (dense / shards[0] + expert / shards[1])

    def _activations(self, layout: Layout, chunks: Sequence[range], number: int) -> float:
        from megatron_scmoe.dry_run.stages import micro_batches_in_flight  # noqa: PLC0415 - imports Megatron

        parts, model, args = self._parts(layout), self._model, self._args
        data = self._gpus // (layout.tp * layout.pp * model.context)
        in_flight = micro_batches_in_flight(
            stage=number,
            num_stages=layout.pp,
            num_chunks=layout.vp,
            round_size=layout.pp,
            num_micro_batches=model.global_batch // (layout.micro_batch * data),
        )
        outside = (parts.before.kept * in_flight[0] * (number == 0), parts.behind.kept * (number == layout.pp - 1))
        kept = {name: unit.kept - self._less(layout, name) for name, unit in parts.units.items()}
        again = 0.0
        if layout.recompute == FULL:
            read = args.seq_length * args.hidden_size * args.params_dtype.itemsize / (layout.tp * model.context)
            # By the time that the last unit runs again, what is behind it on the same virtual stage is gone.
            gone = outside[1] if layout.vp == 1 else 0.0
            largest = max(kept[model.segments[unit]] for units in chunks for unit in units)
            again, kept = max(0.0, largest - read - gone), dict.fromkeys(kept, read)
        of_chunks = (
            flying * sum(kept[name] * count for name, count in Counter(model.segments[unit] for unit in units).items())
            for flying, units in zip(in_flight, chunks, strict=True)
        )
        return (sum(of_chunks) + outside[0] + outside[1] * in_flight[-1] + again) * layout.micro_batch

    def _less(self, layout: Layout, name: str) -> float:
        """What a unit keeps less for what is computed again; tensor parallel ranks share all of that."""
        if layout.recompute == FULL:
            return 0.0
        return sum(self._freed[module][name] for module in layout.recompute) / layout.tp
