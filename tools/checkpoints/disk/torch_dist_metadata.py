"""What a torch_dist folder says of itself: its file .metadata, a pickle, read without running anything in it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from checkpoints.disk.files import inside
from checkpoints.tensors import CheckpointError, TensorInfo

METADATA = ".metadata"


class Extent(NamedTuple):
    """A range of bytes of a file."""

    path: Path
    offset: int
    length: int


class Chunk(NamedTuple):
    """A block of a tensor, saved on its own.

    Attributes:
        offsets: where in the tensor it begins, for each dimension.
        sizes: of the block.
        extent: what torch.save wrote of it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


class SavedTensor(NamedTuple):
    """A tensor and the chunks that make it up, each element once."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that a folder holds.

    Attributes:
        tensors: of the model, by key.
        other_tensors: keys of all others.
        objects: what torch.save wrote of everything else, by key.
        files: .metadata and all files that it names.
    """

    tensors: Mapping[str, SavedTensor]
    other_tensors: tuple[str, ...]
    objects: Mapping[str, Extent]
    files: tuple[Path, ...]


class _Record:
    """Stands in for the classes of PyTorch and Core that describe a checkpoint: attributes, and nothing that runs."""

    def __init__(self, *_: Any) -> None:
        """Take what an enumeration's member or a path is called with."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        elif isinstance(state, tuple) and state:
            self.dtype = state[0]  # of TensorProperties; nothing else has a tuple


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STAND_INS: dict[tuple[str, str], Any] = {
    (_METADATA_MODULE, "TensorStorageMetadata"): _Tensor,
    (_METADATA_MODULE, "BytesStorageMetadata"): _Bytes,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
}
_STAND_INS |= {
    (module, name): _Record
    for module, names in {
        _METADATA_MODULE: (
            "Metadata",
            "MetadataIndex",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.distributed.checkpoint.planner": (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        ),
        "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }.items()
    for name in names
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _STAND_INS:
            raise CheckpointError(
                f"it names {module[:80]!a} {name[:80]!a}, which no checkpoint needs and which could run code; get it "
                "from a source that you trust"
            )
        return _STAND_INS[module, name]


def read_metadata(folder: Path, *, is_model: Callable[[str], bool]) -> Contents:
    """What lies where in a folder.

    Args:
        folder: that of one iteration.
        is_model: whether the tensor of a key is one of the model.

    Raises:
        CheckpointError: where the file is damaged or unsafe, or a file that it names is missing or cut short.
    """
    path = inside(folder, METADATA, folder)
    try:
        with path.open("rb") as file:
            root = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); get it anew") from None
    places = _Places(folder, path)
    try:
        extents = {
            (index.fqn, getattr(index, "offset", None)): places.extent(index.fqn, info)
            for index, info in root.storage_data.items()
        }
        tensors, objects = {}, {}
        for key, entry in root.state_dict_metadata.items():
            if not key.isprintable():
                raise TypeError(f"{key[:60]!a} is no name")
            if isinstance(entry, _Tensor) and is_model(key):
                tensors[key] = _saved_tensor(key, entry, extents)
            elif isinstance(entry, _Bytes):
                objects[key] = extents[key, None]
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(f"{path} is damaged ({reason}); get it anew") from None
    others = tuple(key for key in root.state_dict_metadata if key not in tensors and key not in objects)
    return Contents(tensors=tensors, other_tensors=others, objects=objects, files=(path, *places.files()))


class _Places:
    """The files of a folder as .metadata names them, each looked at once."""

    def __init__(self, folder: Path, origin: Path) -> None:
        self._folder, self._origin = folder, origin
        self._sizes: dict[str, tuple[Path, int]] = {}

    def extent(self, key: str, info: Any) -> Extent:
        name = info.relative_path
        if name not in self._sizes:
            path = inside(self._folder, name, self._origin)
            self._sizes[name] = path, path.stat().st_size
        path, size = self._sizes[name]
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{path} is compressed or encrypted, by {info.transform_descriptors}; no way known")
        offset, length = _sizes((info.offset, info.length))
        if offset + length > size:
            raise CheckpointError(
                f"{path} is cut short: {key} ends at byte {offset + length}, and the file at {size}; get it anew"
            )
        return Extent(path, offset, length)

    def files(self) -> tuple[Path, ...]:
        return tuple(path for path, _ in self._sizes.values())


def _sizes(numbers: Any) -> tuple[int, ...]:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise TypeError(f"{number!r} is no size")
    return tuple(numbers)


def _saved_tensor(key: str, entry: Any, extents: Mapping[tuple[str, Any], Extent]) -> SavedTensor:
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(f"{key} has no dtype")
    shape = _sizes(entry.size)
    chunks = tuple(
        Chunk(_sizes(chunk.offsets), _sizes(chunk.sizes), extents[key, tuple(chunk.offsets)]) for chunk in entry.chunks
    )
    if not _cover(chunks, shape):
        raise TypeError(f"the chunks of {key} do not make up the tensor")
    if any(math.prod(chunk.sizes) * entry.properties.dtype.itemsize > chunk.extent.length for chunk in chunks):
        raise TypeError(f"{key} is larger than what was saved of it")
    return SavedTensor(TensorInfo(shape, entry.properties.dtype), chunks)


def _cover(chunks: tuple[Chunk, ...], shape: tuple[int, ...]) -> bool:
    """Whether every element of the tensor is in one chunk: none beyond its end, as many as it has, none twice."""
    if any(len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape) for chunk in chunks):
        return False
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        return False
    begins = numpy.array([chunk.offsets for chunk in chunks], dtype=numpy.int64).reshape(len(chunks), len(shape))
    ends = begins + numpy.array([chunk.sizes for chunk in chunks], dtype=numpy.int64).reshape(begins.shape)
    if (ends > numpy.array(shape, dtype=numpy.int64)).any():
        return False
    for number in range(len(chunks) - 1):
        others = slice(number + 1, None)
        if ((begins[number] < ends[others]) & (begins[others] < ends[number])).all(axis=1).any():
            return False
    return True
