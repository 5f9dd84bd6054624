"""What a search asks of the model of time: the step of a layout and form, and what nothing of them beats."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate
from math import lcm

from megatron_scmoe.config import Overlap, Position, ScMoEConfig
from planning.hardware import Machine
from planning.reading import workload
from planning.settings import FULL, Form, Layout, Model, units_of_stages
from planning.step import predict
from planning.whatif import without_all_to_all
from planning.workload import Workload


class Pricer:
    """Seconds of settings of one model on one kind of machine.

    Args:
        model: of which.
        args: Megatron's namespace of a model of the same sizes, validated.
        scmoe: our settings in it.
        freq: which layers of a unit have an MoE, where neither a shortcut nor a pattern says that.
        gpus: of the job.
        machine: of which kind.
    """

    def __init__(
        self, model: Model, args: Namespace, scmoe: ScMoEConfig, *, freq: Sequence[int], gpus: int, machine: Machine
    ) -> None:
        self.model, self.machine = model, machine
        self._args, self._scmoe, self._freq, self._gpus = args, scmoe, list(freq), gpus
        self._of_all: dict[Layout, float] = {}
        self.priced = 0

    def step_s(self, layout: Layout, form: Form) -> float:
        """Predicted seconds of a step."""
        self.priced += 1
        return predict(self.workload(layout, form), self.machine).step_s

    def bound_s(self, layout: Layout) -> float:
        """Seconds that no form of ``layout`` beats: its step without any all-to-all."""
        self.priced += 1
        return predict(*without_all_to_all(self.workload(layout, self._any_form), self.machine)).step_s

    def floor_s(self, layout: Layout) -> float:
        """Seconds that nothing of ``layout`` beats, whatever its stages: the slowest takes their mean at least."""
        alone = replace(layout, pp=1, vp=1, sizes=(), recompute=())
        if alone not in self._of_all:
            self.priced += 1
            (stage,) = predict(*without_all_to_all(self._small(alone), self.machine)).stages
            self._of_all[alone] = stage.forward_s + stage.backward_s
        data = self._gpus // (layout.tp * layout.pp * self.model.context)
        turns = self.model.global_batch // (layout.micro_batch * data) + (layout.pp - 1) / layout.vp
        return self._of_all[alone] * turns / layout.pp

    def weights(self, ep: int) -> tuple[float, ...]:
        """Seconds of each unit of a hybrid model on so many expert-parallel ranks, without any all-to-all."""
        each = Layout(pp=self.model.units, ep=ep, sizes=(1,) * self.model.units)
        stages = predict(*without_all_to_all(self._small(each), self.machine)).stages
        return tuple(stage.forward_s + stage.backward_s for stage in stages)

    @property
    def _any_form(self) -> Form:
        return Form(position=self.model.positions[0], overlap="off")

    def _small(self, layout: Layout) -> Workload:
        """One micro-batch of ``layout`` on as few GPUs as have it: what its ops take does not depend on how many."""
        gpus = layout.pp * lcm(layout.tp * self.model.context, layout.ep * layout.etp)
        data = gpus // (layout.pp * layout.tp * self.model.context)
        return self.workload(layout, self._any_form, gpus, layout.micro_batch * data)

    def workload(self, layout: Layout, form: Form, gpus: int = 0, global_batch: int = 0) -> Workload:
        """What a step of these settings computes; on all GPUs and of the whole batch, but for other numbers."""
        args, model = copy(self._args), self.model
        full = layout.recompute == FULL
        vars(args).update(
            num_layers=model.num_layers,
            hybrid_layer_pattern=model.pattern(layout) if model.hybrid else None,
            world_size=gpus or self._gpus,
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.tp > 1,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            micro_batch_size=layout.micro_batch,
            global_batch_size=global_batch or model.global_batch,
            recompute_granularity="full" if full else "selective" if layout.recompute else None,
            recompute_method="uniform" if full else None,
            recompute_modules=list(layout.recompute),
            moe_layer_freq=self._freq * model.units if self._freq else self._args.moe_layer_freq,
        )
        scmoe = replace(self._scmoe, overlap=Overlap(form.overlap), overlap_chunks=form.chunks)
        if form.position:
            scmoe = replace(scmoe, shortcut_position=(Position(form.position),))
            scmoe = replace(scmoe, shortcut_span=form.span, shortcut_landing=form.landing)
        return workload(args, scmoe, _layers_of_stages(layout, model))


def _layers_of_stages(layout: Layout, model: Model) -> list[list[int]]:
    ends = [0, *accumulate(model.layers_of(unit) for unit in range(model.units))]
    return [
        [layer for units in stage for layer in range(ends[units.start], ends[units.stop])]
        for stage in units_of_stages(layout, model)
    ]
