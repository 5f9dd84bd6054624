"""What becomes of every tensor: decided before anything is written, so that nothing can get lost without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from checkpoints.disk.torch_dist_metadata import Extent
from checkpoints.tensors import CheckpointError, TensorInfo


class Read(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor of the source; None: to its end."""

    name: str
    start: int = 0
    stop: int | None = None


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself: ``Piece.make`` where nothing but the name changes."""
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a tensor of the target: the unit that is in memory at a time.

    Attributes:
        info: shape and dtype of this piece.
        make: makes it, of exactly that shape and dtype, from what was read, in that order.
        row: where along the first dimension of the whole tensor the piece begins.
    """

    name: str
    info: TensorInfo
    reads: tuple[Read, ...]
    make: Callable[..., Tensor] = as_it_is
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What becomes of every tensor of a source, and where every tensor of a target comes from.

    Attributes:
        pieces: of the target, in the order in which they are written.
        expected: every tensor that a target of this configuration has, known without looking at the source's tensors.
        dropped: tensors of the source that are left out, and why.
        carried: what is no tensor and goes into the target byte for byte, by the key that it has in both.
        notes: what a user should know, for the receipt and the terminal.
    """

    pieces: tuple[Piece, ...]
    expected: Mapping[str, TensorInfo]
    dropped: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, Extent] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a mapping makes of a source.

    Attributes:
        args: where the target is Megatron's: the saved arguments, as far as they differ from Megatron's defaults.
        common: where a run is to go on from the target: what Megatron saves with the arguments, such as the iteration.
        files: where the target is a Hugging Face folder: config.json and others, by plain file name.
        tokenizer: where the target is Megatron's: files of its folder of that name, by plain file name.
    """

    conversion: Conversion
    args: Mapping[str, object] | None = None
    common: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)


_FAULTS = {
    "unread": "tensors of the source that nothing takes",
    "absent": "tensors that the source lacks",
    "missing": "tensors that the target would lack",
    "unexpected": "tensors that the target has no place for, or not in this shape",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Both sides of a conversion in names.

    Attributes:
        converted: tensors of the source that went whole into the target.
        unread: those of which rows were neither read nor dropped.
        absent: those that pieces read and that the source lacks.
        missing: tensors of the target that nothing makes.
        unexpected: those that it should not have, or not in this shape.
    """

    converted: tuple[str, ...]
    dropped: Mapping[str, str]
    unread: tuple[str, ...]
    absent: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def faults(self) -> dict[str, tuple[str, ...]]:
        """Names of tensors that are lost or made up, by the attribute that has them."""
        return {fault: names for fault in _FAULTS if (names := getattr(self, fault))}

    @property
    def balanced(self) -> bool:
        """Whether nothing is lost and nothing is made up."""
        return not self.faults


def account(conversion: Conversion, source: Mapping[str, TensorInfo]) -> Account:
    """Compare a conversion with the tensors of its source and of its target."""
    read_rows: dict[str, list[tuple[int, int]]] = {}
    written: dict[str, list[Piece]] = {}
    for piece in conversion.pieces:
        written.setdefault(piece.name, []).append(piece)
        for name, start, stop in piece.reads:
            rows = source[name].num_rows if name in source and stop is None else stop or 0
            read_rows.setdefault(name, []).append((start, rows))
    converted = [name for name, spans in read_rows.items() if name in source and _covers(spans, source[name].num_rows)]
    accounted = {*converted, *conversion.dropped}
    return Account(
        converted=tuple(converted),
        dropped=dict(conversion.dropped),
        unread=tuple(name for name in source if name not in accounted),
        absent=tuple(name for name in read_rows if name not in source),
        missing=tuple(name for name in conversion.expected if name not in written),
        unexpected=tuple(
            name for name, pieces in written.items() if not _is_whole(pieces, conversion.expected.get(name))
        ),
    )


def check(conversion: Conversion, source: Mapping[str, TensorInfo]) -> Account:
    """The account of a conversion; refuses one that is not balanced."""
    result = account(conversion, source)
    if not result.balanced:
        faults = (f"{_FAULTS[fault]}: {_first(names)}" for fault, names in result.faults.items())
        raise CheckpointError(f"not every tensor is accounted for: {'; '.join(faults)}")
    return result


def _first(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _covers(spans: list[tuple[int, int]], rows: int) -> bool:
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= rows


def _is_whole(pieces: list[Piece], expected: TensorInfo | None) -> bool:
    """Whether the pieces, laid one behind the other, are the expected tensor, each row once."""
    reached = 0
    for piece in sorted(pieces, key=lambda piece: piece.row):
        if expected is None or piece.row != reached or piece.info != expected.with_rows(piece.info.num_rows):
            return False
        reached += piece.info.num_rows
    return expected is not None and reached == expected.num_rows
