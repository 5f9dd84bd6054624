"""Megatron's checkpoints in the format torch_dist, read without Megatron and without running anything in them."""

from __future__ import annotations

import re
import zlib
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.files import bytes_of, inside, read_into, read_json
from checkpoints.disk.torch_dist_metadata import METADATA, Chunk, Extent, SavedTensor, read_metadata
from checkpoints.disk.torch_saved import Place, as_builtin, crc_of, find_elements, load_plain
from checkpoints.tensors import CheckpointError, TensorInfo, row_range

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
COMMON = "common_state/shard_0_1"
_OLDER_COMMON = "common.pt"
_STACKED = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")
_OTHERS = {
    r"(chained_\d+\.)?optimizer\.": "state of the optimizer",
    r".*_extra_state(/|$)": "state of Transformer Engine's FP8 modules",
    r"rng_state": "state of the random numbers",
    r"rerun_state_machine": "state of Megatron's rerun machine",
    r"common_state/": "settings and counters, of which the arguments are read",
}


class MegatronCheckpoint:
    """One iteration of a torch_dist checkpoint to read from.

    Attributes:
        folder: of the iteration.
        iteration: of training; 0 for a release.
        args: the saved arguments, as builtin types and torch.dtype.
        infos: every tensor of the model by its name; each block's tensors have a name of their own, also where Megatron
            has saved all blocks as one tensor.
        others: what is no tensor of the model, and why, by its key.
        files: all that decides what is read.
    """

    def __init__(self, path: str | Path) -> None:
        """Read what says where everything lies, and the arguments.

        Args:
            path: a folder as Megatron's --save has it, or that of one iteration.

        Raises:
            CheckpointError: where anything is missing, cut short or unsafe.
        """
        self.folder = _iteration_folder(Path(path))
        _check_format(self.folder)
        contents = read_metadata(self.folder, is_model=lambda key: _other_reason(key) is None)
        self._tensors = contents.tensors
        self._keys = dict(_names(contents.tensors))
        self._places: dict[Extent, Place] = {}
        self._checked: set[Extent] = set()
        self.infos: Mapping[str, TensorInfo] = {
            name: self._tensors[key].info if block is None else _of_one_block(self._tensors[key].info)
            for name, (key, block) in self._keys.items()
        }
        self.others: Mapping[str, str] = {
            key: _other_reason(key) or "no tensor of the model" for key in (*contents.other_tensors, *contents.objects)
        }
        config = self.folder / CONFIG
        self.files = (config, *contents.files)
        common = self._common_state(contents.objects.get(COMMON))
        if not isinstance(common.get("args"), Namespace):
            raise CheckpointError(f"{self.folder} has no saved arguments; save it with Megatron's training script")
        try:
            self.args = Namespace(**as_builtin(vars(common["args"])))
        except (RecursionError, TypeError):
            raise CheckpointError(f"{self.folder}: its saved arguments are no table of settings; get it anew") from None
        iteration = common.get("iteration")
        self.iteration = iteration if isinstance(iteration, int) else 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor; see ``Tensors``. Each chunk is compared with its checksum once, when any of it is read."""
        if name not in self._keys:
            raise CheckpointError(f"{self.folder} has no tensor {name}; get the whole checkpoint")
        key, block = self._keys[name]
        info = self.infos[name]
        start, stop = row_range(name, info, start, stop)
        sizes = (stop - start, *info.shape[1:]) if info.shape else ()
        offsets = (start, *(0 for _ in sizes[1:])) if info.shape else ()
        result = torch.empty(sizes, dtype=info.dtype)
        if block is None:
            self._fill(result, key, offsets)
        else:
            self._fill(result.unsqueeze(0), key, (block, *offsets))
        return result

    def _fill(self, result: Tensor, key: str, offsets: tuple[int, ...]) -> None:
        """Read the block of tensor ``key`` at ``offsets`` into ``result``."""
        for chunk in self._tensors[key].chunks:
            begins = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            ends = [
                min(a + size, b + chunk_size)
                for a, size, b, chunk_size in zip(offsets, result.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(begin < end for begin, end in zip(begins, ends, strict=True)):
                there = [slice(b - at, e - at) for b, e, at in zip(begins, ends, offsets, strict=True)]
                here = [slice(b - at, e - at) for b, e, at in zip(begins, ends, chunk.offsets, strict=True)]
                self._read_chunk(result[tuple(there)], key, chunk, tuple(here))

    def _read_chunk(self, result: Tensor, key: str, chunk: Chunk, part: tuple[slice, ...]) -> None:
        """Read ``part`` of a chunk: of its first dimension of more than one row what is needed, of the others all."""
        extent = chunk.extent
        if extent not in self._places:
            self._places[extent] = find_elements(key, chunk, result.dtype)
        place = self._places[extent]
        axis = next((axis for axis, size in enumerate(chunk.sizes) if size > 1), 0)
        rows = part[axis] if part else slice(0, 1)
        sizes = list(chunk.sizes)
        sizes[axis : axis + 1] = [rows.stop - rows.start] if part else []
        is_direct = result.is_contiguous() and list(result.shape) == sizes
        read = result if is_direct else torch.empty(sizes, dtype=result.dtype)
        row_bytes = read.nbytes // (rows.stop - rows.start)
        is_whole = read.nbytes == place.storage.length
        try:
            with extent.path.open("rb", buffering=0) as file:
                if not is_whole:
                    self._check_once(key, extent, lambda: crc_of(file, place.storage))
                read_into(file, place.offset + rows.start * row_bytes, read)
        except EOFError:
            raise CheckpointError(f"{extent.path} is cut short: {key} is not all there; get it anew") from None
        if is_whole:
            self._check_once(key, extent, lambda: zlib.crc32(bytes_of(read)))
        if not is_direct:
            inner = [slice(None) if number == axis else one for number, one in enumerate(part)]
            result.copy_(read[tuple(inner)])

    def _check_once(self, key: str, extent: Extent, crc: Callable[[], int]) -> None:
        """Compare a chunk with its checksum when the first part of it is read, and never again."""
        if extent in self._checked:
            return
        expected = self._places[extent].crc
        if expected is not None and crc() != expected:
            raise CheckpointError(f"{extent.path} is damaged: {key} is not what its checksum says; get it anew")
        self._checked.add(extent)

    def _common_state(self, extent: Extent | None) -> Mapping[str, Any]:
        if extent is None:
            path = inside(self.folder, _OLDER_COMMON, self.folder / METADATA)
            extent = Extent(path, 0, path.stat().st_size)
            self.files = (*self.files, path)
            value = load_plain(extent)
        else:
            value = load_plain(extent)
            value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, dict):
            raise CheckpointError(f"{extent.path} is damaged: its common state is no dictionary; get it anew")
        return value


# --- finding things ------------------------------------------------------------------------------------------------


def _iteration_folder(path: Path) -> Path:
    if (path / METADATA).is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{path} is no Megatron checkpoint: it has neither {TRACKER} nor {METADATA}; name the folder of --save, or "
            "one of its iterations"
        )
    words = tracker.read_bytes()[:40].decode("ascii", "replace").strip()
    if words != "release" and not (words.isdecimal() and len(words) < 16):
        raise CheckpointError(f"{tracker} names no iteration but {words!a}; name the folder of one iteration")
    folder = path / (words if words == "release" else f"iter_{int(words):07d}")
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} has Megatron's older format; load it and save it with --ckpt-format torch_dist"
        )
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{folder / METADATA} is missing, and {tracker} names it; get the whole checkpoint")
    return folder


def _check_format(folder: Path) -> None:
    path = inside(folder, CONFIG, folder)
    found = read_json(path).get("sharded_backend")
    if found != "torch_dist":
        raise CheckpointError(f"{folder} has the format {found!a}; load it and save it with --ckpt-format torch_dist")


def _other_reason(key: str) -> str | None:
    """Why ``key`` is that of no tensor of the model; None where it is one."""
    return next((reason for pattern, reason in _OTHERS.items() if re.match(pattern, key)), None)


def _names(tensors: Mapping[str, SavedTensor]) -> Mapping[str, tuple[str, int | None]]:
    """Where each tensor is: a key, and the block's place in it where all blocks are one tensor."""
    names: dict[str, tuple[str, int | None]] = {}
    for key, saved in tensors.items():
        stacked = _STACKED.fullmatch(key)
        if stacked and saved.info.shape and saved.info.nbytes:
            prefix, rest = stacked.groups()
            names |= {f"{prefix}{block}.{rest}": (key, block) for block in range(saved.info.shape[0])}
        else:
            names[key] = key, None
    return names


def _of_one_block(info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.shape[1:], info.dtype)
