"""The space of a search: every layout of a model, what may be computed again, and every form of the shortcut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cache
from itertools import accumulate, combinations, pairwise, product
from math import comb

from planning.settings import Form, Layout, Model

MICRO_BATCHES = (1, 2, 4, 8)
TENSOR = (1, 2, 4, 8)
MOST_CUTS = 40
"""Ways to cut a hybrid model into so many parts up to which all are searched."""


def layouts(model: Model, gpus: int) -> Iterator[Layout]:
    """Every layout of ``model`` on so many GPUs, computing nothing again; what the entry script says is another
    question.
    """
    by_tensor = [tp for tp in TENSOR if can_share(model, tp)]
    sizes = (by_tensor, range(1, model.units + 1), _divisors(model.experts or 1))
    for tp, pp, ep in product(*sizes):
        if gpus % (tp * pp * model.context):
            continue
        data = gpus // (tp * pp * model.context)
        for etp in sorted({1, tp}) if model.experts else (tp,):
            if gpus % (ep * etp * pp):
                continue
            for micro_batch in MICRO_BATCHES:
                if model.global_batch % (micro_batch * data):
                    continue
                interleaves = pp > 1 and model.global_batch // (micro_batch * data) % pp == 0
                for vp, cut in _stages(model, pp, interleaves):
                    layout = Layout(tp=tp, pp=pp, vp=vp, ep=ep, etp=etp, micro_batch=micro_batch, sizes=cut)
                    if _as_kept(layout, model.kept or {}):
                        yield layout


def _stages(model: Model, pp: int, interleaves: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Virtual stages of each rank, and units of each of them; none where they are as many."""
    if pp == 1:
        yield 1, ()
    elif model.hybrid:
        for vp in range(1, model.units // pp + 1 if interleaves else 2):
            for cut in cuts(model.units, pp * vp, model.weights):
                yield vp, cut
    elif model.units % pp == 0:
        for vp in _divisors(model.units // pp) if interleaves else (1,):
            yield vp, ()
    else:
        yield from ((1, cut) for cut in uneven(model.units, pp))


def uneven(units: int, pp: int) -> Iterator[tuple[int, ...]]:
    """Units of ``pp`` stages, of which those between the first and the last have as many: Megatron has flags for that.

    The ones between have the whole number below or above the mean.
    """
    for middle in sorted({units // pp, -(-units // pp)}) if pp > 2 else (0,):
        left = units - middle * (pp - 2)
        for first in range(1, left):
            yield (first, *(middle,) * (pp - 2), left - first)


@cache
def cuts(units: int, parts: int, weights: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    """Units of each of ``parts``: all ways, or, of more than ``MOST_CUTS``, the one whose heaviest part is lightest."""
    if comb(units - 1, parts - 1) > MOST_CUTS:
        return (balanced(weights, parts),)
    return tuple(
        tuple(end - first for first, end in pairwise((0, *inner, units)))
        for inner in combinations(range(1, units), parts - 1)
    )


def balanced(weights: tuple[float, ...], parts: int) -> tuple[int, ...]:
    """How many of ``weights`` to put into each of ``parts``, in their order, so that the heaviest part is lightest."""
    return _balancer(weights)(len(weights), parts)[1]


@cache
def _balancer(weights: tuple[float, ...]) -> Callable[[int, int], tuple[float, tuple[int, ...]]]:
    so_far = [0.0, *accumulate(weights)]

    @cache
    def best(end: int, parts: int) -> tuple[float, tuple[int, ...]]:
        """Of the first ``end`` weights: that of the heaviest part, and the numbers."""
        if parts == 1:
            return so_far[end], (end,)
        return min(
            (max(heaviest, so_far[end] - so_far[first]), (*sizes, end - first))
            for first in range(parts - 1, end)
            for heaviest, sizes in [best(first, parts - 1)]
        )

    return best


def cuts_left_out(model: Model, layouts: Iterable[Layout]) -> bool:
    """Whether a hybrid model can be cut in more ways than ``layouts`` are."""
    numbers = {layout.pp * layout.vp for layout in layouts}
    return model.hybrid and any(comb(model.units - 1, parts - 1) > MOST_CUTS for parts in numbers)


def recomputed(modules: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Everything that may be computed again of ``modules``, but nothing and all groups: fewer of them first."""
    for number in range(1, len(modules) + 1):
        yield from combinations(modules, number)


def forms(model: Model, layout: Layout) -> Iterator[Form]:
    """Every form of ``model`` at ``layout`` with the most that an overlap can do: solved, and in chunks."""
    for position, span in product(model.positions, model.spans):
        if all(end % span == 0 for end in accumulate(layout.sizes or (model.units // (layout.pp * layout.vp),))):
            yield Form(position=position, span=span, overlap="adaptive" if position else "fixed", chunks=4)


def simpler(model: Model, layout: Layout) -> Iterator[Form]:
    """Every form at ``layout``, in the order of preference: the model as it is, and the least of an overlap."""
    ways = (("fixed", 1), ("adaptive", 1), ("fixed", 2), ("fixed", 4), ("adaptive", 4))
    for form in forms(model, layout):
        for overlap, chunks in ways if form.position else [way for way in ways if way[0] == "fixed"]:
            yield replace(form, overlap=overlap, chunks=chunks)


def can_share(model: Model, tp: int) -> bool:
    """Whether so many tensor parallel ranks share ``model``."""
    return tp <= max(TENSOR) and not (model.heads % tp or model.key_heads % tp or model.sequence % (tp * model.context))


def _as_kept(layout: Layout, values: Mapping[str, str]) -> bool:
    found = {name.replace("_", "-"): str(value) for name, value in asdict(layout).items()}
    return all(found[name] == value for name, value in values.items() if name in found)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
