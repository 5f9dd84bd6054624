"""The best few settings of a model on so many GPUs: searched by prediction, reported as the entry script takes them."""
# ruff: noqa: PLC0415 - Megatron takes seconds to import, for which a refusal of this tool's need not wait

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from command_line import UserError
from progress import progress, say

from planning import probing, search, settings, space
from planning.dry import DryRun, dry_run, load
from planning.footprint import PROBED, Footprints
from planning.hardware import Machine
from planning.pricing import Pricer
from planning.running import check_precision
from planning.settings import FULL, Form, Layout
from planning.units import model_of, units_of

GIB = 2**30
TRIES = 4
"""Settings that are dry-run for each one that is asked for, where some are refused."""
ROOM = 0.95
"""Part of the memory up to which an estimate needs no other look: what is computed again can only be slower."""


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
        fit: how many of them memory allows, as they are or with something computed again.
        dropped: by reason, how many of those tried were no good after all.
        priced: how many times a step was priced for it.
        not_searched: what there is beside, in words.
    """

    best: list[Choice]
    layouts: int
    fit: int
    dropped: Counter[str]
    priced: int = 0
    not_searched: list[str] = field(default_factory=list)


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
        self.gpus, self.memory = gpus, memory
        settings.kept(flags, keep)  # refused before anything is looked at
        say("search: loads Megatron, tries parts of the model, prices layouts, tries the fastest")
        load()
        units = units_of(flags)
        self._probe = probing.Probe.of(flags, units)
        from megatron_scmoe.training.arguments import scmoe_config_from_args

        with progress("dry runs", len(PROBED), in_bytes=False) as advance:
            first, begin = PROBED[0], time.monotonic()
            probes = {first: self._probe(*first)}
            self._dry_s = time.monotonic() - begin
            advance(1)
            args = probes[first].args
            check_precision(args, machine.hardware)
            scmoe = scmoe_config_from_args(args)
            self.model = model_of(flags, units, args, scmoe, keep)
            self.pricer = Pricer(self.model, args, scmoe, freq=units.freq, gpus=gpus, machine=machine)
            if self.model.hybrid:
                self.model = self.pricer.model = replace(self.model, weights=self.pricer.weights(self._probe.ep))
            for pair in PROBED[1:] if space.can_share(self.model, 2) else ():
                probes[pair] = self._probe(*pair)
                advance(1)
        self._args = args
        self._footprints = Footprints(self.model, probes, gpus)
        self._refused: Mapping[str, str] = {}

    def choose(self, top: int) -> Choices:
        """The ``top`` fastest settings. Raises UserError where none fits, with the nearest."""
        layouts = list(space.layouts(self.model, self.gpus))
        if not layouts:
            parts = "groups" if self.model.hybrid else f"units of {self.model.unit} layers"
            raise UserError(
                f"no layout has {self.gpus} GPUs: {self.model.units} {parts}, {self.model.experts} experts and a "
                f"global batch of {self.model.global_batch} do not divide so; give another --gpus or "
                "--global-batch-size, or keep less"
            )
        fit = [layout for layout in layouts if any(True for _ in self.ways(layout))]
        if not fit:
            self._raise_nearest(layouts)
        best, dropped = self._tried(fit, top)
        return Choices(
            best=best,
            layouts=len(layouts),
            fit=len(fit),
            dropped=dropped,
            priced=self.pricer.priced,
            not_searched=list(self._not_searched(layouts)),
        )

    def ways(self, layout: Layout) -> Iterator[Layout]:
        """``layout`` with each that may be computed again, as far as memory allows."""
        nbytes = self._footprints.nbytes(layout)
        if nbytes <= self.memory:
            yield layout
        if nbytes <= self.memory * ROOM:
            return
        if self._footprints.nbytes(way := replace(layout, recompute=FULL)) <= self.memory:
            yield way
        if self._footprints.nbytes(replace(layout, recompute=self._modules)) > self.memory:
            return  # fewer of them keep more
        for again in space.recomputed(self._modules):
            if self._footprints.nbytes(way := replace(layout, recompute=again)) <= self.memory:
                yield way

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        """What frees memory when it is computed again by itself; asked for where some layout needs it."""
        modules = probing.modules_of(self._args, self.model.segments)
        say(f"search: dry runs that compute each of {len(modules)} modules again, {self._to_go(len(modules))}")
        found, self._refused = probing.accepted(self._probe, modules)
        return self._footprints.computing_again(found)

    def _to_go(self, runs: int) -> str:
        return f"ETA {max(1, round(runs * self._dry_s))} s"

    def _raise_nearest(self, layouts: Sequence[Layout]) -> None:
        sizes = {
            way: self._footprints.nbytes(way) for layout in layouts for way in (layout, replace(layout, recompute=FULL))
        }
        nearest = min(sizes, key=sizes.__getitem__)
        raise UserError(
            f"nothing fits into {self.memory / GIB:.1f} GiB of each of {self.gpus} GPUs: the nearest of "
            f"{len(layouts)} layouts lacks {(sizes[nearest] - self.memory) / GIB:.1f} GiB "
            f"({' '.join(settings.flags_of(nearest, Form(), self.model))}); give more --gpus"
        )

    def _tried(self, fit: Sequence[Layout], top: int) -> tuple[list[Choice], Counter[str]]:
        """The fastest of the layouts that the entry script takes, each as it is fastest, and what was dropped."""
        best: list[Choice] = []
        dropped: Counter[str] = Counter()
        done: set[Layout] = set()
        for seconds, layout, _ in self.in_order(fit):
            if len(best) == top or len(best) + dropped.total() == TRIES * top:
                break
            place = replace(layout, recompute=(), sizes=())
            if place in done or layout in done:
                continue
            done.add(layout)
            say(f"search: dry run of setting {len(best) + 1} of {top}, {self._to_go(top - len(best))}")
            its, simple = search.simplest(layout, seconds, space.simpler(self.model, layout), self.pricer.step_s)
            try:
                best.append(self._checked(layout, simple, its))
                done.add(place)
            except UserError as error:
                dropped[re.sub(r"\d[\d.,]*", "N", str(error))] += 1
        return best, dropped

    def in_order(self, layouts: Sequence[Layout]) -> Iterator[tuple[float, Layout, Form]]:
        """All settings of ``layouts`` in the order of their time."""
        with progress("search", len(layouts), in_bytes=False) as advance:

            def floor_s(layout: Layout) -> float:
                advance(1)
                return self.pricer.floor_s(layout)

            found = search.Space(
                floor=floor_s,
                ways=self.ways,
                bound=self.pricer.bound_s,
                forms=lambda layout: space.forms(self.model, layout),
                predict=self.pricer.step_s,
            )
            yield from search.fastest(layouts, found)

    def _checked(self, layout: Layout, form: Form, seconds: float) -> Choice:
        """Settings as the entry script takes them. Raises UserError where it does not, or where they do not fit."""
        chosen = settings.flags_of(layout, form, self.model)
        flags = [*self.model.flags, *chosen]
        dry = dry_run(flags, self.gpus, probing.ENVIRONMENT)
        choice = Choice(layout=layout, form=form, flags=flags, chosen=chosen, dry=dry, step_s=seconds)
        if choice.nbytes > self.memory:
            raise UserError("its dry run needs more memory than was estimated, and than there is")
        return choice

    def _not_searched(self, layouts: Sequence[Layout]) -> Iterator[str]:
        if space.cuts_left_out(self.model, layouts):
            yield (
                f"of more than {space.MOST_CUTS} ways to cut the pattern into so many stages one alone, whose slowest "
                "stage is fastest"
            )
        if any(layout.pp > 1 for layout in layouts) and not self.model.hybrid:
            yield "uneven stages where the layers divide; other ones than the first and last; several on a rank"
        for module, why in self._refused.items():
            yield f"--recompute-modules {module}: {why}"
