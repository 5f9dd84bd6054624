"""What a torch_dist folder says of itself: its file .metadata, a pickle, read without running anything in it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from checkpoints.disk.files import inside
from checkpoints.tensors import CheckpointError, TensorInfo, is_countable

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


class Contents(NamedTuple):
    """All that a folder holds.

    Attributes:
        tensors: of the model, by key.
        objects: what torch.save wrote of all that is no tensor, by key.
        others: keys of all that is no tensor of the model.
        files: .metadata and all files that it names.
    """

    tensors: Mapping[str, SavedTensor]
    objects: Mapping[str, Extent]
    others: tuple[str, ...]
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


_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_CHECKPOINT}.metadata": "Metadata MetadataIndex ChunkStorageMetadata TensorProperties StorageMeta "
    "_MEM_FORMAT_ENCODING",
    f"{_CHECKPOINT}.filesystem": "_StorageInfo",
    f"{_CHECKPOINT}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",
}
_STAND_INS: dict[tuple[str, str], Any] = {
    **{(module, name): _Record for module, names in _RECORDS.items() for name in names.split()},
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Bytes,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
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
    """What lies where in the folder of an iteration; ``is_model`` says whether the tensor of a key is of the model.

    A damaged or unsafe folder is refused, and one of whose files any is cut short.
    """
    path = inside(folder, METADATA, folder)
    try:
        with path.open("rb") as file:
            root = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); get it anew") from None
    files: dict[str, tuple[Path, int]] = {}
    try:
        extents = {
            (index.fqn, getattr(index, "offset", None)): _extent(folder, index.fqn, info, files)
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
    others = tuple(key for key in root.state_dict_metadata if key not in tensors)
    return Contents(tensors, objects, others, (path, *(path for path, _ in files.values())))


def _extent(folder: Path, key: str, info: Any, files: dict[str, tuple[Path, int]]) -> Extent:
    """Where ``info`` says that ``key`` is; paths and sizes of ``files`` are looked at once."""
    if info.relative_path not in files:
        path = inside(folder, info.relative_path, folder / METADATA)
        files[info.relative_path] = path, path.stat().st_size
    path, size = files[info.relative_path]
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(f"{path} is compressed or encrypted, by {info.transform_descriptors}; no way known")
    offset, length = _sizes((info.offset, info.length))
    if offset + length > size:
        raise CheckpointError(
            f"{path} is cut short: {key} ends at byte {offset + length}, and the file at {size}; get it anew"
        )
    return Extent(path, offset, length)


def _sizes(numbers: Any) -> tuple[int, ...]:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise TypeError(f"{number!r} is no size")
    return tuple(numbers)


def _saved_tensor(key: str, entry: Any, extents: Mapping[tuple[str, Any], Extent]) -> SavedTensor:
    if not isinstance(entry.properties.dtype, torch.dtype):
        raise TypeError(f"{key} has no dtype")
    shape = _sizes(entry.size)
    if not is_countable(shape):
        raise TypeError(f"{shape} is no shape of {key}")
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
    return not any(
        ((begins[number] < ends[number + 1 :]) & (begins[number + 1 :] < ends[number])).all(axis=1).any()
        for number in range(len(chunks))
    )
