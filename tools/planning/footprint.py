"""What ranks of many layouts hold, from a few dry runs: one of three stages with a unit of layers each.

The first of these stages has the embedding, the last one the output layer, and so the three of them tell what a unit,
what is before all units and what is behind them need: parameters, and bytes that autograd keeps. A search prunes by it;
what it reports was dry-run as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planning.dry import DryRun
from planning.settings import Layout, Model

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


Parts = tuple[Part, Part, Part]
"""What is before all units, a unit, and what is behind all units."""


PROBED = ((1, 1), (2, 1), (2, 2))
"""Tensor and expert-tensor parallel ranks."""


def _parts_of(dry: DryRun) -> Parts:
    first, unit, last = (Part.of(stage, dry.args.expert_model_parallel_size) for stage in dry.stages)
    return first - unit, unit, last - unit


class Footprints:
    """Memory of layouts.

    What tensor parallel ranks share is cut by their number, the rest is not: so 1 and 2 of them tell the others.

    Args:
        model: of which.
        probes: dry runs of three stages of a unit each, by tensor and expert-tensor parallel ranks: ``PROBED``, or
            the first of them where ranks cannot share the model.
        gpus: of the job.
    """

    def __init__(self, model: Model, probes: Mapping[tuple[int, int], DryRun], gpus: int) -> None:
        self._model, self._gpus = model, gpus
        self._args, unit = probes[1, 1].args, probes[1, 1].stages[1]
        self._each = (unit.standing.weights + unit.standing.gradients) / unit.held.total
        self._probed = {pair: _parts_of(dry) for pair, dry in probes.items()}

    def _parts(self, layout: Layout) -> Parts:
        whole = self._probed[1, 1]
        if layout.tp == 1:
            return whole
        halves = self._probed[2, min(2, layout.etp)]
        before, unit, behind = (
            (one - half).times(2 / layout.tp) + half.times(2) - one for one, half in zip(whole, halves, strict=True)
        )
        return before, unit, behind

    def nbytes(self, layout: Layout) -> float:
        """What the rank that needs most of ``layout`` holds, in bytes; units are computed again one by one."""
        return max(self._stage(layout, number) for number in {0, layout.pp - 1})

    def _stage(self, layout: Layout, number: int) -> float:
        before, unit, behind = self._parts(layout)
        args, of_stage = self._args, unit.times(self._model.units / layout.pp)
        if number == 0:
            of_stage += before
        if number == layout.pp - 1:
            of_stage += behind
        if layout.pp == 1 and not args.untie_embeddings_and_output_weights:
            of_stage -= Part(args.padded_vocab_size * args.hidden_size / layout.tp, 0, 0)
        return self._standing(layout, of_stage) + self._activations(layout, number)

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

    def _activations(self, layout: Layout, number: int) -> float:
        from megatron_scmoe.dry_run.stages import micro_batches_in_flight  # noqa: PLC0415 - imports Megatron

        before, unit, behind = (part.kept for part in self._parts(layout))
        model, args = self._model, self._args
        data = self._gpus // (layout.tp * layout.pp * model.context)
        in_flight = micro_batches_in_flight(
            stage=number,
            num_stages=layout.pp,
            num_chunks=layout.vp,
            round_size=layout.pp,
            num_micro_batches=model.global_batch // (layout.micro_batch * data),
        )
        again = 0.0
        if layout.recompute:
            read = args.seq_length * args.hidden_size * args.params_dtype.itemsize / (layout.tp * model.context)
            # By the time that the last unit runs again, what is behind it on the same virtual stage is gone.
            gone = behind if layout.vp == 1 and number == layout.pp - 1 else 0.0
            again, unit = max(0.0, unit - read - gone), read
        kept = sum(in_flight) * unit * model.units / (layout.pp * layout.vp)
        kept += before * in_flight[0] * (number == 0) + behind * in_flight[-1] * (number == layout.pp - 1)
        return (kept + again) * layout.micro_batch
