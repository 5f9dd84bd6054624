"""The safetensors format: a header in JSON with names, shapes and places, then the bytes of the tensors.

Not by the package of that name, which maps files into memory: what was read stays resident until the file is closed, a
file that gets shorter ends the process, and to open it anew for every tensor takes 0.3 s with 42,000 names. It writes
only what is all in memory. Here memory does not depend on the size of a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.disk.files import Sink
from checkpoints.tensors import CheckpointError, TensorInfo, is_countable

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the format's own limit


Place = tuple[TensorInfo, int]
"""A tensor of a file, and the offset of its first byte from the file's begin."""


def read_header(path: Path) -> dict[str, Place]:
    """Every tensor of a file, none of which is read; refuses files that are cut short, or none of this format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
            raise CheckpointError(
                f"{path} is cut short, or is no safetensors file: its header is not there; get it anew"
            )
        text = file.read(length)
    begin = _LENGTH_BYTES + length
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        places = {name: _place(name, entry, begin) for name, entry in header.items() if name != "__metadata__"}
        end = _end(places, begin)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(f"{path}: its header is damaged ({reason}); get it anew") from None
    if size != end:
        raise CheckpointError(f"{path} is damaged or cut short: it has {size} bytes and should have {end}; get it anew")
    return places


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _place(name: str, entry: Mapping[str, Any], begin: int) -> Place:
    if not name.isprintable():  # it is shown to people: control characters would reach their terminals
        raise ValueError(f"{name[:60]!a} is no name of a tensor")
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    for number in (*shape, start, stop):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no size")
    if not is_countable(shape):
        raise ValueError(f"{shape} is no shape")
    if (dtype := entry["dtype"]) not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r:.40} is not read here; get the weights in another one, such as BF16")
    info = TensorInfo(shape, _DTYPES[dtype])
    if stop - start != info.nbytes:
        raise ValueError(f"{stop - start} bytes for a tensor of {info.nbytes}")
    return info, begin + start


def _end(places: Mapping[str, Place], begin: int) -> int:
    """Where the last tensor ends; they lie one behind the other."""
    reached = begin
    for name, (info, offset) in sorted(places.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if offset != reached:
            raise ValueError(f"{name!r} does not begin where the one before it ends")
        reached += info.nbytes
    return reached


def write_header(sink: Sink, infos: Mapping[str, TensorInfo]) -> None:
    """Write what stands before the tensors, whose bytes have to follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, info in infos.items():
        if info.dtype not in _WORDS:
            raise CheckpointError(f"safetensors has no word for the dtype of {name}, {info.dtype}; no way known")
        stop = reached + info.nbytes
        header[name] = {"dtype": _WORDS[info.dtype], "shape": info.shape, "data_offsets": [reached, stop]}
        reached = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the tensors begin at a multiple of eight
    sink.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
