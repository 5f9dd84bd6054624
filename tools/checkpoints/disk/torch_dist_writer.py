"""Writes Megatron's format torch_dist: weights as a release, for iteration 0, or all that a run goes on from."""

from __future__ import annotations

import io
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # the name that is in every such file

from checkpoints.disk import companions
from checkpoints.disk.files import Sink
from checkpoints.disk.torch_dist import COMMON, CONFIG, TRACKER, iteration_name
from checkpoints.disk.torch_dist_metadata import METADATA, Extent
from checkpoints.disk.torch_saved import copy_object, safe_globals
from checkpoints.plan import Piece
from checkpoints.tensors import CheckpointError, TensorInfo

RELEASE = "release"
"""Of a release Megatron loads no optimizer, no random numbers and no iteration, with --finetune and without."""
_OBJECTS = "__0_objects.distcp"
_MODULE_WITH_STATE = re.compile(r"(?:.*\.)?(?:linear_\w+|fc[12]_latent_proj|eh_proj|mixer\.(?:in|out)_proj|\w*norm)")
_OF_THE_RUN = """
tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size
expert_model_parallel_size expert_tensor_parallel_size data_parallel_size world_size rank local_rank overlap_plans
"""
"""Layout of the run that saved the source, and plans measured on its machine; the weights alone fit any other."""
_FRESH = {
    **{"ckpt_format": "torch_dist", "no_save_optim": True, "no_save_rng": True},
    **dict.fromkeys(("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"), 0),
}


class MegatronWriter:
    """Writes a torch_dist folder; see ``engine.Writer``."""

    keeps_tensors_whole = False

    def __init__(
        self,
        expected: Mapping[str, TensorInfo],
        args: Mapping[str, Any],
        tokenizer: Mapping[str, bytes] | None = None,
        *,
        common: Mapping[str, Any] | None = None,
        carried: Mapping[str, Extent] | None = None,
    ) -> None:
        """All tensors are ``expected``; ``args`` of other than builtin types and torch.dtype are refused.

        ``tokenizer`` has files of the folder of that name, by plain file name. ``common`` is what is saved with the
        arguments, and ``carried`` what lies beside the tensors; None: those of a release.
        """
        self._expected = expected
        self._tokenizer = tokenizer or {}
        self._carried = carried
        self._tracked = RELEASE if common is None else str(common["iteration"])
        self._folder = RELEASE if common is None else iteration_name(common["iteration"])
        self._common = _saved(_released(args) if common is None else [{**common, "args": Namespace(**args)}])
        try:
            with safe_globals([Namespace]):
                torch.load(io.BytesIO(self._common), weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise CheckpointError(
                f"saved arguments have builtin types, and one has {found[1] if found else 'another'}; no way known"
            ) from None

    def part_path(self, number: int, total: int) -> str:
        """See ``Writer``."""
        return f"{self._folder}/__0_{number:0{len(str(total))}d}.distcp"

    def write_part(self, sink: Sink, pieces: Sequence[Piece], tensors: Iterator[Tensor]) -> list[dict[str, Any]]:
        """See ``Writer``; each piece becomes a chunk of its tensor."""
        entries = []
        for piece, tensor in zip(pieces, tensors, strict=True):
            offset = sink.position
            # torch.save would save all of the storage that a view belongs to
            is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
            _save(tensor.clone() if is_view else tensor, sink)
            extent = {"offset": offset, "length": sink.position - offset}
            entries.append({"name": piece.name, "row": piece.row, "shape": piece.info.shape, **extent})
        return entries

    def finish(self, folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """See ``Writer``."""
        chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {name: [] for name in self._expected}
        storage = {}
        for path, entries in parts.items():
            for entry in entries:
                shape = torch.Size(entry["shape"])
                offsets = torch.Size((entry["row"], *(0 for _ in shape[1:])) if shape else ())
                chunks[entry["name"]].append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=shape))
                info = _StorageInfo(Path(path).name, entry["offset"], entry["length"])
                storage[dcp.MetadataIndex(entry["name"], offsets)] = info
        described: dict[str, Any] = {
            name: dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=info.dtype), size=torch.Size(info.shape), chunks=chunks[name]
            )
            for name, info in self._expected.items()
        }
        for key, (offset, length) in self._write_objects(folder / self._folder / _OBJECTS).items():
            described[key] = dcp.BytesStorageMetadata()
            storage[dcp.MetadataIndex(key)] = _StorageInfo(_OBJECTS, offset, length)
        metadata = dcp.Metadata(
            described, planner_data={}, storage_data=storage, storage_meta=dcp.StorageMeta(), version="1.0.0"
        )
        (folder / self._folder / METADATA).write_bytes(pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / self._folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        for name, data in self._tokenizer.items():
            (folder / companions.FOLDER).mkdir(exist_ok=True)
            (folder / companions.FOLDER / name).write_bytes(data)
        (folder / TRACKER).write_text(self._tracked, encoding="utf-8")

    def _write_objects(self, path: Path) -> dict[str, tuple[int, int]]:
        """Write all that is no tensor, and return the offset and length of each by its key."""
        extents = {COMMON: (0, len(self._common))}
        with path.open("wb") as file:
            file.write(self._common)
            if self._carried is None:
                length = file.write(_saved([None]))
                return extents | dict.fromkeys(_states(self._expected), (len(self._common), length))
            for key, extent in self._carried.items():
                extents[key] = file.tell(), extent.length
                copy_object(key, extent, file)
        return extents


def _released(args: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What Megatron saves of a release beside tensors, as the list of one object that it is saved in."""
    kept = {name: value for name, value in args.items() if name not in _OF_THE_RUN.split()}
    # Core would otherwise expect models whose blocks are all alike as one tensor of all blocks.
    content = {"non_homogeneous_layers": True, "singleton_local_shards": False}
    state = {"args": Namespace(**{**kept, **_FRESH}), "checkpoint_version": 3.0, "iteration": 0}
    return [{**state, "content_metadata": content}]


def _states(names: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Keys under which Core looks for states of FP8 modules, of either spec: it loads nothing where one is missing."""
    modules = {name.rpartition(".")[0]: info for name, info in names.items()}
    for module, info in modules.items():
        if not _MODULE_WITH_STATE.fullmatch(module):
            continue
        if ".experts.experts." in module:
            yield from (f"{module}._extra_state/shard_{expert}_{info.shape[0]}" for expert in range(info.shape[0]))
        else:
            yield f"{module}._extra_state/shard_0_1"
        if module.endswith(".self_attention.linear_proj"):
            yield f"{module.removesuffix('linear_proj')}core_attention._extra_state/shard_0_1"
    if any(name.startswith("decoder.final_norm.") for name in names):  # a hybrid model keeps what a GPT leaves out
        yield "output_layer._extra_state/shard_0_1"


def _save(tensor: Tensor, sink: Sink) -> None:
    try:
        torch.save(tensor, cast(IO[bytes], sink))
    except RuntimeError as error:
        # Whatever ends a write, a full disk or a signal, torch buries under a complaint about the file's position.
        raise (error.__context__ or error) from None


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
