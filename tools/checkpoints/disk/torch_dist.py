"""Megatron's checkpoints in the format torch_dist, read without Megatron and without running anything in them.

Not by torch.distributed.checkpoint: its reader gives .metadata to pickle without limits, loads whole chunks where rows
are needed, and compares nothing with the checksums that are there.
"""

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
from checkpoints.tensors import Checkpoint, CheckpointError, TensorInfo

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"
COMMON = "common_state/shard_0_1"
_OLDER_COMMON = "common.pt"
_STACKED = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")
OPTIMIZER, RERUN = "state of the optimizer", "state of Megatron's rerun machine"
_OTHERS = {
    r"(chained_\d+\.)?optimizer\.": OPTIMIZER,
    r".*_extra_state(/|$)": "state of Transformer Engine's FP8 modules",
    r"rng_state": "state of the random numbers",
    r"rerun_state_machine": RERUN,
    r"common_state/": "settings and counters, of which the arguments are read",
}


class MegatronCheckpoint(Checkpoint):
    """One iteration of a torch_dist checkpoint to read from. Its folder is that of the iteration.

    Each block's tensors have a name of their own, also where Megatron has saved all blocks as one tensor.

    Attributes:
        iteration: of training; 0 for a release.
        args: the saved arguments, as builtin types and torch.dtype.
        common: what Megatron saves beside tensors, once for all ranks, without the arguments.
        objects: what was saved of all else that is no tensor, by key.
    """

    def __init__(self, path: str | Path, *, as_saved: bool = False) -> None:
        """Read what says where everything lies, and the arguments; refuses what is missing, cut short or unsafe.

        Args:
            path: a folder as Megatron's --save has it, or that of one iteration.
            as_saved: every tensor, those of the optimizer too, under the key that it was saved under.
        """
        self.folder = _iteration_folder(Path(path))
        config = inside(self.folder, CONFIG, self.folder)
        if (found := read_json(config).get("sharded_backend")) != "torch_dist":
            raise CheckpointError(
                f"{self.folder} has the format {found!a}; load it and save it with --ckpt-format torch_dist"
            )
        contents = read_metadata(self.folder, is_model=lambda key: as_saved or other_reason(key) is None)
        self._tensors = contents.tensors
        self._keys = {key: (key, None) for key in contents.tensors} if as_saved else _names(contents.tensors)
        self._places: dict[Extent, Place] = {}
        self._checked: set[Extent] = set()
        infos = {name: (self._tensors[key].info, block) for name, (key, block) in self._keys.items()}
        self.infos = {
            name: info if block is None else TensorInfo(info.shape[1:], info.dtype)
            for name, (info, block) in infos.items()
        }
        others = () if as_saved else contents.others
        self.others = {key: other_reason(key) or "no tensor of the model" for key in others}
        self.files = (config, *contents.files)
        common = self._common_state(contents.objects.get(COMMON))
        if not isinstance(common.get("args"), Namespace):
            raise CheckpointError(f"{self.folder} has no saved arguments; save it with Megatron's training script")
        try:
            self.args = Namespace(**as_builtin(vars(common["args"])))
            self.common = as_builtin({key: value for key, value in common.items() if key != "args"})
        except (RecursionError, TypeError):
            raise CheckpointError(f"{self.folder}: its saved arguments are no table of settings; get it anew") from None
        self.objects = {key: extent for key, extent in contents.objects.items() if key != COMMON}
        iteration = common.get("iteration")
        self.iteration = iteration if isinstance(iteration, int) else 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """See ``Checkpoint``."""
        return vars(self.args)

    def _read(self, name: str, info: TensorInfo, start: int) -> Tensor:
        """Each chunk is compared with its checksum once, when any of it is read."""
        key, block = self._keys[name]
        result = torch.empty(info.shape, dtype=info.dtype)
        offsets = (start, *(0 for _ in info.shape[1:])) if info.shape else ()
        whole, offsets = (result, offsets) if block is None else (result.unsqueeze(0), (block, *offsets))
        for chunk in self._tensors[key].chunks:
            spans = [
                (max(a, b), min(a + size, b + chunk_size))
                for a, size, b, chunk_size in zip(offsets, whole.shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(begin < end for begin, end in spans):
                there = tuple(slice(b - at, e - at) for (b, e), at in zip(spans, offsets, strict=True))
                here = tuple(slice(b - at, e - at) for (b, e), at in zip(spans, chunk.offsets, strict=True))
                self._read_chunk(whole[there], key, chunk, here)
        return result

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
                    self._check_once(key, place, lambda: crc_of(file, place.storage))
                read_into(file, place.offset + rows.start * row_bytes, read)
        except EOFError:
            raise CheckpointError(f"{extent.path} is cut short: {key} is not all there; get it anew") from None
        if is_whole:
            self._check_once(key, place, lambda: zlib.crc32(bytes_of(read)))
        if not is_direct:
            result.copy_(read[tuple(slice(None) if number == axis else one for number, one in enumerate(part))])

    def _check_once(self, key: str, place: Place, crc: Callable[[], int]) -> None:
        """Compare a chunk with its checksum when the first part of it is read, and never again."""
        if place.storage in self._checked:
            return
        if place.crc is not None and crc() != place.crc:
            path = place.storage.path
            raise CheckpointError(f"{path} is damaged: {key} is not what its checksum says; get it anew")
        self._checked.add(place.storage)

    def _common_state(self, extent: Extent | None) -> Mapping[str, Any]:
        if extent is None:
            path = inside(self.folder, _OLDER_COMMON, self.folder / METADATA)
            extent = Extent(path, 0, path.stat().st_size)
            self.files = (*self.files, path)
        value = load_plain(extent)
        if isinstance(value, list) and value:  # as it lies beside tensors
            value = value[0]
        if not isinstance(value, dict):
            raise CheckpointError(f"{extent.path} is damaged: its common state is no dictionary; get it anew")
        return value


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
    folder = path / (words if words == "release" else iteration_name(int(words)))
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} has Megatron's older format; load it and save it with --ckpt-format torch_dist"
        )
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{folder / METADATA} is missing, and {tracker} names it; get the whole checkpoint")
    return folder


def iteration_name(iteration: int) -> str:
    """The folder of an iteration."""
    return f"iter_{iteration:07d}"


def other_reason(key: str) -> str | None:
    """Why ``key`` is that of no tensor of the model; None where it is one."""
    return next((reason for pattern, reason in _OTHERS.items() if re.match(pattern, key)), None)


def _names(tensors: Mapping[str, SavedTensor]) -> dict[str, tuple[str, int | None]]:
    """Where each tensor is: a key, and the block's place in it where all blocks are one tensor."""
    names: dict[str, tuple[str, int | None]] = {}
    for key, (info, _) in tensors.items():
        stacked = _STACKED.fullmatch(key)
        if stacked and info.shape and info.nbytes:
            prefix, rest = stacked.groups()
            names |= {f"{prefix}{block}.{rest}": (key, block) for block in range(info.shape[0])}
        else:
            names[key] = key, None
    return names
