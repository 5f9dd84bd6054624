"""The settings that a search chooses among: layouts, and what of the shortcut may differ. As flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile

from command_line import UserError

PATTERN = "--hybrid-layer-pattern"
FULL = ("full",)
"""Of what is computed again: all groups."""
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
    *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
    *("--recompute-activations", "--shortcut-landing", "--overlap", "--overlap-chunks", "--expert-slot", PATTERN),
)
"""Flags that follow from what is chosen."""
_UNEVEN = {
    "--num-layers-per-virtual-pipeline-stage": "vp",
    "--pipeline-model-parallel-layout": "pp",
    "--account-for-embedding-in-pipeline-split": "pp",
    "--account-for-loss-in-pipeline-split": "pp",
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
        sizes: units of each virtual stage, in the order of the model; empty where they are as many everywhere.
        recompute: --recompute-modules, or ``FULL``.
    """

    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    sizes: tuple[int, ...] = ()
    recompute: tuple[str, ...] = ()


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
        unit: layers of the smallest part that no stage cuts; of a hybrid model they differ.
        segments: symbols of each such part of a hybrid model; empty words for blocks.
        behind: what a hybrid model's pattern has behind all stages.
        weights: what each part takes, of a hybrid model, by which it is cut.
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
    segments: tuple[str, ...]
    heads: int
    key_heads: int
    experts: int
    sequence: int
    global_batch: int
    context: int = 1
    positions: tuple[str, ...] = ("",)
    spans: tuple[int, ...] = (1,)
    kept: Mapping[str, str] | None = None
    behind: str = ""
    weights: tuple[float, ...] = ()

    @property
    def units(self) -> int:
        """Of these parts."""
        return len(self.segments)

    @property
    def hybrid(self) -> bool:
        """Whether it has a pattern."""
        return bool(self.segments[0])

    @property
    def num_layers(self) -> int:
        """Of the whole model."""
        return sum(self.layers_of(unit) for unit in range(self.units))

    def layers_of(self, unit: int) -> int:
        """Layers of one part."""
        return len(self.segments[unit]) or self.unit

    def pattern(self, layout: Layout) -> str:
        """--hybrid-layer-pattern with the cuts of ``layout``; empty for blocks."""
        cut = "|".join("".join(self.segments[first:end]) for first, end in pairwise(_ends(layout, self)))
        return cut + self.behind


def _ends(layout: Layout, model: Model) -> list[int]:
    """Units before each virtual stage, and all of them."""
    parts = layout.pp * layout.vp
    return [0, *accumulate(layout.sizes or (model.units // parts,) * parts)]


def units_of_stages(layout: Layout, model: Model) -> list[list[range]]:
    """Units of each stage, a range for each of its virtual stages: as Megatron deals these out, stage by stage."""
    cut = [range(first, end) for first, end in pairwise(_ends(layout, model))]
    return [cut[stage :: layout.pp] for stage in range(layout.pp)]


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
            raise UserError(
                f"a search cuts a model in ways of its own and cannot keep {name} beside {flag}; drop either"
            )
    return {name: _kept(flags, name) for name in names}


def _kept(flags: Sequence[str], name: str) -> str:
    flag = next(flag for flag, its in _CHOSEN.items() if its == name)
    if name == "position":
        after = flags[len(flags) - flags[::-1].index(flag) :] if flag in flags else ["pos2"]
        given = list(takewhile(lambda word: not word.startswith("--"), after))
        if len(set(given)) != 1:
            raise UserError(f"a search gives all groups one position: {flag} is {' '.join(given)}; do not keep it")
        return given[0]
    if name == "vp" and PATTERN in flags:
        stages = value_of(flags, PATTERN).split("/", maxsplit=1)[0].count("|") + 1
        return str(max(1, stages // int(_kept(flags, "pp"))))
    if name == "micro-batch" and flag not in flags:
        raise UserError(f"there is no micro-batch to keep: {flag} is not set; add it, or do not keep micro-batch")
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
    if model.hybrid:
        flags += [PATTERN, model.pattern(layout)]
    elif layout.sizes:
        flags += ["--decoder-first-pipeline-num-layers", layout.sizes[0] * model.unit]
        flags += ["--decoder-last-pipeline-num-layers", layout.sizes[-1] * model.unit]
    elif layout.vp > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", layout.vp]
    if layout.recompute == FULL:
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        # Of a hybrid model's parts, which differ, the last layer runs each, whatever is counted.
        flags += ["--recompute-num-layers", 1 if model.hybrid else model.unit * form.span]
    elif layout.recompute:
        flags += ["--recompute-granularity", "selective", "--recompute-modules", *layout.recompute]
    if form.position:
        flags += ["--shortcut-position", form.position]
    if form.span > 1:
        flags += ["--shortcut-span", form.span, "--shortcut-landing", form.landing]
    if form.position or form.chunks > 1:
        flags += ["--overlap", form.overlap]
    if form.chunks > 1:
        flags += ["--overlap-chunks", form.chunks]
    return [str(word) for word in flags]
