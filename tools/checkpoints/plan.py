"""What becomes of every tensor: decided before anything is written, so that nothing can get lost without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from checkpoints.tensors import CheckpointError, TensorInfo


class Read(NamedTuple):
    """Rows of a tensor of the source.

    Attributes:
        name: of the tensor.
        start: first row.
        stop: the row behind the last one; None for all.
    """

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
        name: of the target's tensor.
        info: shape and dtype of this piece.
        reads: what it is made of.
        make: makes the piece, of exactly that shape and dtype, from what was read, in that order.
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
        notes: what a user should know, for the receipt and the terminal.
    """

    pieces: tuple[Piece, ...]
    expected: Mapping[str, TensorInfo]
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Both sides of a conversion in numbers and names.

    Attributes:
        converted: tensors of the source that went whole into the target.
        dropped: tensors left out, and why.
        unread: tensors of the source of which rows were neither read nor dropped.
        absent: tensors that pieces read and that the source lacks.
        missing: tensors that the target should have, and that are not whole.
        unexpected: tensors of the target that it should not have, or not in this shape.
    """

    converted: tuple[str, ...]
    dropped: Mapping[str, str]
    unread: tuple[str, ...]
    absent: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def balanced(self) -> bool:
        """Whether nothing is lost and nothing is made up."""
        return not (self.unread or self.absent or self.missing or self.unexpected)


def account(conversion: Conversion, source: Mapping[str, TensorInfo]) -> Account:
    """Compare a conversion with the tensors of its source and of its target."""
    read_rows: dict[str, list[tuple[int, int]]] = {}
    absent: dict[str, None] = {}
    for piece in conversion.pieces:
        for read in piece.reads:
            if read.name not in source:
                absent[read.name] = None
                continue
            rows = _num_rows(source[read.name])
            read_rows.setdefault(read.name, []).append((read.start, rows if read.stop is None else read.stop))
    converted = [name for name, spans in read_rows.items() if _covers(spans, _num_rows(source[name]))]
    accounted = {*converted, *conversion.dropped}
    written: dict[str, list[Piece]] = {}
    for piece in conversion.pieces:
        written.setdefault(piece.name, []).append(piece)
    whole = {name for name, pieces in written.items() if _is_whole(pieces, conversion.expected.get(name))}
    return Account(
        converted=tuple(converted),
        dropped=dict(conversion.dropped),
        unread=tuple(name for name in source if name not in accounted),
        absent=tuple(absent),
        missing=tuple(name for name in conversion.expected if name not in written),
        unexpected=tuple(name for name in written if name not in whole),
    )


def check(conversion: Conversion, source: Mapping[str, TensorInfo]) -> Account:
    """The account of a conversion.

    Raises:
        CheckpointError: where it is not balanced.
    """
    result = account(conversion, source)
    if not result.balanced:
        faults = {
            "tensors of the source that nothing takes": result.unread,
            "tensors that the source lacks": result.absent,
            "tensors that the target would lack": result.missing,
            "tensors that the target has no place for, or not in this shape": result.unexpected,
        }
        raise CheckpointError(
            "not every tensor is accounted for: "
            + "; ".join(f"{what}: {_first(names)}" for what, names in faults.items() if names)
        )
    return result


def _first(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _num_rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def _covers(spans: list[tuple[int, int]], rows: int) -> bool:
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            return False
        reached = max(reached, stop)
    return reached >= rows


def _is_whole(pieces: list[Piece], expected: TensorInfo | None) -> bool:
    """Whether the pieces, laid one behind the other, are the expected tensor, each row once."""
    if expected is None:
        return False
    reached = 0
    for piece in sorted(pieces, key=lambda piece: piece.row):
        if piece.row != reached or piece.info.shape[1:] != expected.shape[1:] or piece.info.dtype != expected.dtype:
            return False
        reached += _num_rows(piece.info)
    return reached == _num_rows(expected)
