"""The settings that a search chooses among: layouts, and what of the shortcut may differ. As flags, and as a space."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product, takewhile

from command_line import UserError

MICRO_BATCHES = (1, 2, 4, 8)
MOST_TENSOR = 8
_CHOSEN = {
    "--tensor-model-parallel-size": "tp",
    "--pipeline-model-parallel-size": "pp",
    "--num-virtual-stages-per-pipeline-rank": "vp",
    "--expert-model-parallel-size": "ep",
    "--expert-tensor-parallel-size": "etp",
    "--micro-batch-size": "micro-batch",
    "--shortcut-position": "position",
    "--shortcut-span": "span",
}
"""Flags by the name of what a search chooses, and --keep keeps."""
_FOLLOW = (
    *("--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-layout", "--sequence-parallel"),
    *("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
    *("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-modules"),
    *("--recompute-activations", "--shortcut-landing", "--overlap", "--overlap-chunks", "--expert-slot"),
)
"""Flags that follow from what is chosen."""
_UNEVEN = {
    "--num-layers-per-virtual-pipeline-stage": "vp",
    "--pipeline-model-parallel-layout": "pp",
    "--decoder-first-pipeline-num-layers": "pp",
    "--decoder-last-pipeline-num-layers": "pp",
}
"""Flags that cut a model in ways that no search tries, and what cannot be kept beside them."""
KEEPABLE = tuple(_CHOSEN.values())


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Layout:
    """What a rank's memory depends on, and the least time of a step.

    Attributes:
        tp: --tensor-model-parallel-size, with --sequence-parallel.
        pp: --pipeline-model-parallel-size.
        vp: --num-virtual-stages-per-pipeline-rank.
        ep: --expert-model-parallel-size.
        etp: --expert-tensor-parallel-size.
        micro_batch: --micro-batch-size.
        recompute: whether all groups are computed again.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    recompute: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Form:
    """What of the shortcut a search chooses.

    Attributes:
        position: --shortcut-position; empty without a shortcut.
        span: --shortcut-span; from 2 on outputs land behind the next group's first op.
        overlap: --overlap.
        chunks: --overlap-chunks.
    """

    position: str = ""
    span: int = 1
    overlap: str = "fixed"
    chunks: int = 1

    @property
    def landing(self) -> int:
        """--shortcut-landing."""
        return int(self.span > 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What of a model's flags decides which layouts there are.

    Attributes:
        flags: without those that a search chooses.
        unit: layers of the smallest part that no stage cuts.
        units: of these.
        heads: of queries.
        key_heads: of keys and values.
        experts: of each MoE; 0 without any.
        sequence: tokens.
        global_batch: sequences of a step.
        context: context-parallel ranks.
        positions: that the groups have, the flags' own first; one empty one without a shortcut.
        spans: of groups that a search tries, the flags' own first.
        kept: by name, what is not chosen.
    """

    flags: tuple[str, ...]
    unit: int
    units: int
    heads: int
    key_heads: int
    experts: int
    sequence: int
    global_batch: int
    context: int = 1
    positions: tuple[str, ...] = ("",)
    spans: tuple[int, ...] = (1,)
    kept: Mapping[str, str] | None = None


def split_values(flags: Sequence[str]) -> list[str]:
    """``flags`` with each ``--name=value`` as two words."""
    return [
        part for word in flags for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]


def value_of(flags: Sequence[str], name: str, default: str | None = None) -> str:
    """The value that ``flags`` give ``name`` last. Raises UserError where there is none and no default."""
    places = [place for place, word in enumerate(flags[:-1]) if word == name]
    if not places and default is None:
        raise UserError(f"a search needs to know {name}: it is not among the flags; add {name} N")
    return flags[places[-1] + 1] if places else str(default)


def whole_of(flags: Sequence[str], name: str, default: str | None = None) -> int:
    """The same, a whole number from 1."""
    value = value_of(flags, name, default)
    if not (value.isascii() and value.isdigit() and int(value)):
        raise UserError(f"{name} is a whole number from 1: it is {value[:40]!a}; give such a number")
    return int(value)


def without(flags: Sequence[str], names: Collection[str]) -> list[str]:
    """``flags`` without those of ``names``, and without their values."""
    left, dropped = [], False
    for word in flags:
        if word.startswith("--"):
            dropped = word in names
        if not dropped:
            left.append(word)
    return left


def not_chosen(flags: Sequence[str]) -> list[str]:
    """``flags`` without those that a search chooses, and what follows from them."""
    return without(flags, (*_CHOSEN, *_FOLLOW))


def kept(flags: Sequence[str], names: Collection[str]) -> dict[str, str]:
    """What ``flags`` say of ``names``, some of ``KEEPABLE``, or Megatron and this project where they say nothing.

    Raises:
        UserError: for what no layout of a search is like.
    """
    for flag, name in _UNEVEN.items():
        if flag in flags and name in names:
            raise UserError(f"a search cuts a model evenly and cannot keep {name} beside {flag}; drop either")
    return {name: _kept(flags, name) for name in names}


def _kept(flags: Sequence[str], name: str) -> str:
    flag = next(flag for flag, its in _CHOSEN.items() if its == name)
    if name == "position":
        after = flags[len(flags) - flags[::-1].index(flag) :] if flag in flags else ["pos2"]
        given = list(takewhile(lambda word: not word.startswith("--"), after))
        if len(set(given)) != 1:
            raise UserError(f"a search gives all groups one position: {flag} is {' '.join(given)}; do not keep it")
        return given[0]
    value = whole_of(flags, flag, _kept(flags, "tp") if name == "etp" else "1")
    if name == "span" and (landing := value_of(flags, "--shortcut-landing", "0")) != str(Form(span=value).landing):
        raise UserError(
            f"a search lands outputs of spans behind one op: {flag} is {value} and --shortcut-landing {landing}; "
            "do not keep span"
        )
    return str(value)


def flags_of(layout: Layout, form: Form, model: Model) -> list[str]:
    """The flags of the entry script that say so."""
    flags = ["--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp]
    flags += ["--expert-model-parallel-size", layout.ep, "--micro-batch-size", layout.micro_batch]
    if layout.tp > 1:
        flags += ["--sequence-parallel", "--expert-tensor-parallel-size", layout.etp]
    if layout.vp > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", layout.vp]
    if layout.recompute:
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        flags += ["--recompute-num-layers", model.unit * form.span]
    if form.position:
        flags += ["--shortcut-position", form.position]
    if form.span > 1:
        flags += ["--shortcut-span", form.span, "--shortcut-landing", form.landing]
    if form.position or form.chunks > 1:
        flags += ["--overlap", form.overlap]
    if form.chunks > 1:
        flags += ["--overlap-chunks", form.chunks]
    return [str(word) for word in flags]


def layouts(model: Model, gpus: int) -> Iterator[Layout]:
    """Every layout of ``model`` on so many GPUs; what the entry script says of it is another question."""
    by_tensor = [tp for tp in (1, 2, 4, 8) if can_share(model, tp)]
    sizes = (by_tensor, _divisors(model.units), _divisors(model.experts or 1))
    for tp, pp, ep in product(*sizes):
        if gpus % (tp * pp * model.context):
            continue
        data = gpus // (tp * pp * model.context)
        for etp in sorted({1, tp}) if model.experts else (tp,):
            if gpus % (ep * etp * pp):
                continue
            for micro_batch, recompute in product(MICRO_BATCHES, (False, True)):
                if model.global_batch % (micro_batch * data):
                    continue
                micro_batches = model.global_batch // (micro_batch * data)
                for vp in _divisors(model.units // pp) if pp > 1 and micro_batches % pp == 0 else (1,):
                    layout = Layout(tp=tp, pp=pp, vp=vp, ep=ep, etp=etp, micro_batch=micro_batch, recompute=recompute)
                    if _as_kept(layout, model.kept or {}):
                        yield layout


def forms(model: Model, layout: Layout) -> Iterator[Form]:
    """Every form of ``model`` at ``layout`` with the most that an overlap can do: solved, and in chunks."""
    for position, span in product(model.positions, model.spans):
        if (model.units // (layout.pp * layout.vp)) % span == 0:
            yield Form(position=position, span=span, overlap="adaptive" if position else "fixed", chunks=4)


def simpler(model: Model, layout: Layout) -> Iterator[Form]:
    """Every form at ``layout``, in the order of preference: the model as it is, and the least of an overlap."""
    ways = (("fixed", 1), ("adaptive", 1), ("fixed", 2), ("fixed", 4), ("adaptive", 4))
    for form in forms(model, layout):
        for overlap, chunks in ways if form.position else [way for way in ways if way[0] == "fixed"]:
            yield replace(form, overlap=overlap, chunks=chunks)


def can_share(model: Model, tp: int) -> bool:
    """Whether so many tensor parallel ranks share ``model``."""
    return tp <= MOST_TENSOR and not (model.heads % tp or model.key_heads % tp or model.sequence % (tp * model.context))


def _as_kept(layout: Layout, values: Mapping[str, str]) -> bool:
    found = {name.replace("_", "-"): str(value) for name, value in asdict(layout).items()}
    return all(found[name] == value for name, value in values.items() if name in found)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
