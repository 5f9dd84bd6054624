"""The best few settings of a model on so many GPUs: searched by prediction, reported as the entry script takes them."""
# ruff: noqa: PLC0415 - Megatron takes seconds to import, for which a refusal of this tool's need not wait

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from math import lcm

from command_line import UserError
from progress import progress

from megatron_scmoe.config import ConfigError, Overlap, Position, ScMoEConfig
from planning import search, settings
from planning.dry import DryRun, dry_run, load
from planning.footprint import PROBED, Footprints
from planning.hardware import Machine
from planning.reading import workload
from planning.running import check_precision
from planning.settings import Form, Layout, Model
from planning.step import predict
from planning.whatif import without_all_to_all
from planning.workload import Workload

GIB = 2**30
STAGES = 3
"""Of a probe: with the embedding, with neither, with the output layer."""
TRIES = 4
"""Settings that are dry-run for each one that is asked for, where some are refused."""
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""What Megatron insists on with tensor or context parallelism, up to Hopper."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings that the entry script takes.

    Attributes:
        layout: on the GPUs.
        form: of the shortcut.
        flags: all of them.
        chosen: those of them that were searched.
        dry: their dry run.
        step_s: predicted.
    """

    layout: Layout
    form: Form
    flags: list[str]
    chosen: list[str]
    dry: DryRun
    step_s: float

    @property
    def nbytes(self) -> int:
        """What the fullest rank holds."""
        return max(stage.total for stage in self.dry.stages)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a search has found.

    Attributes:
        best: the fastest first.
        layouts: how many there are.
        fit: how many of them memory allows.
        dropped: by reason, how many of those tried were no good after all.
    """

    best: list[Choice]
    layouts: int
    fit: int
    dropped: Counter[str]


class Chooser:
    """Chooses settings for ``flags``.

    Args:
        flags: of the entry script; those that are chosen are left out of them.
        gpus: of the job.
        machine: of which kind.
        memory: bytes of a GPU that may be used.
        keep: names of ``settings.KEEPABLE`` that stay as ``flags`` have them.

    Raises:
        UserError: for a model that cannot be searched, or that the entry script refuses.
    """

    def __init__(
        self, flags: Sequence[str], gpus: int, machine: Machine, memory: float, keep: Collection[str] = ()
    ) -> None:
        self.gpus, self.machine, self.memory = gpus, machine, memory
        load()
        unit, pattern = _unit(flags)
        self._pattern = pattern
        experts = settings.whole_of(flags, "--num-experts", "1")
        probe = _Probe(
            flags=settings.not_chosen(flags),
            unit=unit,
            pattern=pattern,
            context=settings.whole_of(flags, "--context-parallel-size", "1"),
            ep=next((size for size in range(2, experts + 1) if experts % size == 0), 1),
        )
        from megatron_scmoe.training.arguments import scmoe_config_from_args

        with progress("dry runs", len(PROBED), in_bytes=False) as advance:
            first = PROBED[0]
            probes = {first: probe(*first)}
            self._args = probes[first].args
            check_precision(self._args, machine.hardware)
            self._scmoe = scmoe_config_from_args(self._args)
            self.model = _model(flags, unit, self._args, self._scmoe, keep)
            for pair in PROBED[1:] if settings.can_share(self.model, 2) else ():
                advance(1)
                probes[pair] = probe(*pair)
        self._footprints = Footprints(self.model, probes, gpus)

    def choose(self, top: int) -> Choices:
        """The ``top`` fastest settings. Raises UserError where none fits, with the nearest."""
        layouts = list(settings.layouts(self.model, self.gpus))
        if not layouts:
            raise UserError(
                f"no layout has {self.gpus} GPUs: {self.model.units} units of {self.model.unit} layers, "
                f"{self.model.experts} experts and a global batch of {self.model.global_batch} do not divide so; "
                "give another --gpus or --global-batch-size, or keep less"
            )
        sizes = {layout: self._footprints.nbytes(layout) for layout in layouts}
        fit = [layout for layout in layouts if sizes[layout] <= self.memory]
        if not fit:
            nearest = min(layouts, key=sizes.__getitem__)
            raise UserError(
                f"nothing fits into {self.memory / GIB:.1f} GiB of each of {self.gpus} GPUs: the nearest of "
                f"{len(layouts)} layouts lacks {(sizes[nearest] - self.memory) / GIB:.1f} GiB "
                f"({' '.join(settings.flags_of(nearest, Form(), self.model))}); give more --gpus"
            )
        best, dropped = self._tried(fit, top)
        return Choices(best=best, layouts=len(layouts), fit=len(fit), dropped=dropped)

    def _tried(self, fit: Sequence[Layout], top: int) -> tuple[list[Choice], Counter[str]]:
        """The fastest of the layouts that the entry script takes, and what was dropped."""
        best: list[Choice] = []
        dropped: Counter[str] = Counter()
        for seconds, layout, _ in self._in_order(fit):
            if len(best) == top or len(best) + dropped.total() == TRIES * top:
                break
            ways = settings.simpler(self.model, layout)
            its, simple = search.simplest(layout, seconds, ways, self.step_s)
            try:
                best.append(self._checked(layout, simple, its))
            except UserError as error:
                dropped[re.sub(r"\d[\d.,]*", "N", str(error))] += 1
        return best, dropped

    def _in_order(self, fit: Sequence[Layout]) -> Iterator[tuple[float, Layout, Form]]:
        with progress("search", len(fit), in_bytes=False) as advance:

            def bound(layout: Layout) -> float:
                advance(1)
                return self.bound_s(layout)

            yield from search.fastest(fit, bound, partial(settings.forms, self.model), self.step_s)

    def _checked(self, layout: Layout, form: Form, seconds: float) -> Choice:
        """Settings as the entry script takes them. Raises UserError where it does not, or where they do not fit."""
        chosen = settings.flags_of(layout, form, self.model)
        flags = [*self.model.flags, *chosen]
        dry = dry_run(flags, self.gpus, ENVIRONMENT)
        choice = Choice(layout=layout, form=form, flags=flags, chosen=chosen, dry=dry, step_s=seconds)
        if choice.nbytes > self.memory:
            raise UserError("its dry run needs more memory than was estimated, and than there is")
        return choice

    def step_s(self, layout: Layout, form: Form) -> float:
        """Predicted seconds of a step."""
        return predict(self.workload(layout, form), self.machine).step_s

    def bound_s(self, layout: Layout) -> float:
        """Seconds that no form of ``layout`` beats: its step without any all-to-all."""
        return predict(*without_all_to_all(self.workload(layout, self._any_form), self.machine)).step_s

    @property
    def _any_form(self) -> Form:
        return Form(position=self.model.positions[0], overlap="off")

    def workload(self, layout: Layout, form: Form) -> Workload:
        """What a step of these settings computes."""
        args, model = copy(self._args), self.model
        vars(args).update(
            num_layers=model.unit * model.units,
            world_size=self.gpus,
            tensor_model_parallel_size=layout.tp,
            sequence_parallel=layout.tp > 1,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            micro_batch_size=layout.micro_batch,
            global_batch_size=model.global_batch,
            recompute_granularity="full" if layout.recompute else None,
            recompute_method="uniform" if layout.recompute else None,
            moe_layer_freq=self._pattern * model.units if self._pattern else self._args.moe_layer_freq,
        )
        scmoe = replace(self._scmoe, overlap=Overlap(form.overlap), overlap_chunks=form.chunks)
        if form.position:
            scmoe = replace(scmoe, shortcut_position=(Position(form.position),))
            scmoe = replace(scmoe, shortcut_span=form.span, shortcut_landing=form.landing)
        return workload(args, scmoe, _layers_of_stages(layout, model))


def _layers_of_stages(layout: Layout, model: Model) -> list[list[int]]:
    """As Megatron deals them out: the virtual stages of all stages, then the next ones."""
    size = model.unit * model.units // (layout.pp * layout.vp)
    return [
        [
            first + layer
            for chunk in range(layout.vp)
            for first in [(chunk * layout.pp + stage) * size]
            for layer in range(size)
        ]
        for stage in range(layout.pp)
    ]


def _unit(flags: Sequence[str]) -> tuple[int, list[int]]:
    """Layers that no stage cuts, and which of them have an MoE; the latter empty where a shortcut says that."""
    if "--hybrid-layer-pattern" in flags:
        raise UserError(
            "a search lays out blocks: --hybrid-layer-pattern is set, and where a hybrid model may be cut is yours to "
            "say; plan it without --search"
        )
    num_layers = settings.whole_of(flags, "--num-layers")
    if settings.value_of(flags, "--shortcut", "none") != "none":
        unit = settings.whole_of(flags, "--moe-every", "2") * settings.whole_of(flags, "--moe-share-groups", "1")
        return _divides(unit, num_layers), []
    if "--num-experts" not in flags:
        return 1, []
    from megatron.training.arguments import moe_freq_type

    every = moe_freq_type(settings.value_of(flags, "--moe-layer-freq", "1"))
    pattern = every if isinstance(every, list) else [int(layer % every == 0) for layer in range(num_layers)]
    sizes = (size for size in range(1, num_layers + 1) if num_layers % size == 0)
    unit = next(size for size in sizes if pattern[:size] * (num_layers // size) == pattern)
    return unit, pattern[:unit]


def _divides(unit: int, num_layers: int) -> int:
    if num_layers % unit:
        raise UserError(f"groups are whole: --num-layers is {num_layers} and a group has {unit}; use a multiple")
    return unit


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """Dry runs of three stages of a unit each, of micro-batches of one sequence.

    Attributes:
        flags: without those that are chosen.
        unit: layers.
        pattern: which of them have an MoE, where no shortcut says that.
        context: context-parallel ranks.
        ep: expert-parallel ranks, 2 at least where there are experts: only then Core tells them from the rest.
    """

    flags: Sequence[str]
    unit: int
    pattern: Sequence[int]
    context: int
    ep: int

    def __call__(self, tp: int, etp: int) -> DryRun:
        ranks = lcm(tp * self.context, self.ep * etp)
        words = ["--num-layers", self.unit * STAGES, "--pipeline-model-parallel-size", STAGES, "--micro-batch-size", 1]
        words += ["--global-batch-size", ranks // (tp * self.context), "--tensor-model-parallel-size", tp]
        words += ["--expert-model-parallel-size", self.ep]
        if tp > 1:
            words += ["--sequence-parallel", "--expert-tensor-parallel-size", etp]
        flags = list(self.flags)
        if self.pattern:
            flags = settings.without(flags, ["--moe-layer-freq"])
            words += ["--moe-layer-freq", str([*self.pattern] * STAGES)]
        elif self.unit == 1 and settings.value_of(flags, "--shortcut", "none") != "none":
            words += ["--shortcut-position", Position.POS1]
        return dry_run([*flags, *map(str, words)], STAGES * ranks, ENVIRONMENT)


def _model(flags: Sequence[str], unit: int, args: Namespace, scmoe: ScMoEConfig, keep: Collection[str]) -> Model:
    kept = settings.kept(flags, keep)
    units = settings.whole_of(flags, "--num-layers") // unit
    positions: tuple[str, ...] = ("",)
    spans: tuple[int, ...] = (1,)
    if scmoe.enabled:
        own = settings.value_of(flags, "--shortcut-position", "pos2")
        positions = tuple(sorted(_positions(scmoe, unit * units), key=lambda one: one != own))
        own_span = settings.whole_of(flags, "--shortcut-span", "1")
        may_land = units % 2 == 0 and scmoe.moe_share_groups == 1 and scmoe.shortcut_norms == "none"
        spans = tuple(sorted({1, 2} if may_land else {1}, key=lambda one: one != own_span))
        positions = (kept["position"],) if "position" in keep else positions
        spans = (int(kept["span"]),) if "span" in keep else spans
    return Model(
        flags=tuple(settings.not_chosen(flags)),
        unit=unit,
        units=units,
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


def _positions(scmoe: ScMoEConfig, num_layers: int) -> Iterator[str]:
    """Those that the groups have; farskip is a form of its own, which nobody chooses by speed."""
    for position in (Position.POS1, Position.POS2, Position.POS3):
        try:
            replace(scmoe, shortcut_position=(position,), shortcut_span=1, shortcut_landing=0).validate(num_layers)
        except ConfigError:
            continue
        yield str(position)
