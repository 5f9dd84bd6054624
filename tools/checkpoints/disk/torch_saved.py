"""What torch.save wrote into a range of a file: found, checked and loaded without running anything in it."""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import re
import shutil
import signal
import struct
import types
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import PosixPath, PurePath
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from checkpoints.disk.torch_dist_metadata import METADATA, Chunk, Extent
from checkpoints.tensors import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip file's member: the lengths of what stands before its bytes
_STORAGE = re.compile(r"[^/]*/data/\d+")  # the member with the elements of a tensor
_STEP_BYTES = 1 << 22  # of one read of what is only compared with a checksum


class Place(NamedTuple):
    """Where the elements of a saved chunk lie.

    Attributes:
        offset: of the first one, from the begin of the file.
        storage: all bytes that were saved with them; more than those of the elements where these were a view.
        crc: the checksum of ``storage``; None where torch was told to save none.
    """

    offset: int
    storage: Extent
    crc: int | None


class _Window(io.RawIOBase):
    """A part of a file as a file; torch's own, ``_ReaderView``, seeks from the wrong end."""

    def __init__(self, file: io.FileIO, extent: Extent) -> None:
        self._file, self._begin, self._length = file, extent.offset, extent.length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("negative seek position")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        wanted = min(len(buffer), max(self._length - self._position, 0))
        self._file.seek(self._begin + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count


@contextlib.contextmanager
def _opened(extent: Extent, name: str, where: str) -> Iterator[_Window]:
    """The extent as a file; whatever goes wrong with it is said in one line, of ``name`` and ``where`` it is."""
    try:
        with extent.path.open("rb", buffering=0) as file:
            yield _Window(file, extent)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]{1,80})", str(error))
        what = f"asks for {found[1]}" if found else "is no plain data"
        raise CheckpointError(
            f"{extent.path}: {name} {what}, which could run code; get it from a source that you trust"
        ) from None
    except Exception as error:  # torch and zipfile raise all kinds of errors for a damaged file
        if isinstance(error, OSError) and error.errno:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        raise CheckpointError(f"{extent.path} is damaged{where} ({reason}); get it anew") from None


def _loaded(window: _Window, device: str) -> Any:
    """What torch.save wrote, unless it is more than plain data."""
    window.seek(0)
    with warnings.catch_warnings(action="ignore"):  # about damaged files, which are refused
        return torch.load(cast(IO[bytes], window), map_location=device, weights_only=True)


def find_elements(key: str, chunk: Chunk, dtype: torch.dtype) -> Place:
    """Find a chunk's elements, none of which is read; refuses those that are not what .metadata says."""
    extent = chunk.extent
    with _opened(extent, key, f" at {key}") as window:
        with zipfile.ZipFile(window) as archive:
            members = archive.infolist()
            _check_records(archive, (member for member in members if not _STORAGE.fullmatch(member.filename)))
        tensor = _loaded(window, "meta")
        (member,) = [member for member in members if _STORAGE.fullmatch(member.filename)]
        storage = Extent(extent.path, extent.offset + _begin(window, member), member.file_size)
        orders = [member for member in members if member.filename.endswith("/byteorder")]
        is_little = all(_begin(window, order) and window.read(6) == b"little" for order in orders)
    is_plain = isinstance(tensor, Tensor) and tensor.is_contiguous() and is_little
    if not is_plain or tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
        raise CheckpointError(f"{extent.path} is damaged: {key} is not the tensor that {METADATA} says; get it anew")
    skipped = tensor.storage_offset() * dtype.itemsize
    is_stored = member.compress_type == zipfile.ZIP_STORED and skipped + tensor.nbytes <= storage.length
    if not is_stored or storage.offset + storage.length > extent.offset + extent.length:
        raise CheckpointError(f"{extent.path} is damaged: {key} does not lie where it should; get it anew")
    return Place(storage.offset + skipped, storage, member.CRC or None)


def _begin(window: _Window, member: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin; the file is there afterwards."""
    window.seek(member.header_offset)
    return window.seek(sum(_LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))), io.SEEK_CUR)


def _check_records(archive: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo]) -> None:
    """Compare members with their checksums, which torch.load does not look at; raises zipfile.BadZipFile."""
    for member in members:
        if member.CRC:  # else torch was told to save none
            with archive.open(member) as record:
                while record.read(_STEP_BYTES):
                    pass


def copy_object(key: str, extent: Extent, file: BinaryIO) -> None:
    """Copy what was saved of ``key``, which is not loaded, after it has been compared with its checksums."""
    with _opened(extent, key, f" at {key}") as window:
        with zipfile.ZipFile(window) as archive:
            _check_records(archive, archive.infolist())
        window.seek(0)
        shutil.copyfileobj(window, file, _STEP_BYTES)


def crc_of(file: io.FileIO, storage: Extent) -> int:
    """The checksum of what lies there, read in steps: memory does not depend on its size."""
    window, buffer, crc = _Window(file, storage), bytearray(_STEP_BYTES), 0
    while count := window.readinto(buffer):
        crc = zlib.crc32(memoryview(buffer)[:count], crc)
    return crc


def _value(*values: Any) -> Any:
    """Stands in for Core's enumerations: their value."""
    return values[0] if values else None


class _State:
    """Stands in for Core's classes that only Core has a use for."""


_CORE_ENUMS = ("AttnBackend", "CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope", "ModelType")
_SAFE_NAMES: list[Any] = [
    *(Namespace, types.SimpleNamespace, PosixPath, signal.Signals),
    *((_value, f"megatron.core.{module}.{name}") for module in ("transformer.enums", "enums") for name in _CORE_ENUMS),
    *((_value, f"megatron.core.rerun_state_machine.{name}") for name in ("RerunMode", "RerunState", "RerunDiagnostic")),
    (_State, "megatron.core.optimizer.optimizer_config.OptimizerConfig"),
]


@contextlib.contextmanager
def safe_globals(names: list[Any]) -> Iterator[None]:
    """torch.load takes ``names`` alone inside, whatever was imported, and behind it what it took before."""
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(names)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_plain(extent: Extent) -> Any:
    """Load an object that consists of builtin types, tensors and Core's enumerations."""
    with _opened(extent, "the common state", ": no common state") as window, safe_globals(_SAFE_NAMES):
        with zipfile.ZipFile(window) as archive:
            _check_records(archive, archive.infolist())
        return _loaded(window, "cpu")


def as_builtin(value: Any) -> Any:
    """Builtin types for enumerations and paths, wherever in ``value``."""
    if isinstance(value, enum.Enum):
        return as_builtin(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {as_builtin(key): as_builtin(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(as_builtin, value))
    return value
