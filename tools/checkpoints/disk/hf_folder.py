"""Hugging Face folders: config.json, and weights in one or several safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.files import Sink, bytes_of, inside, is_plain, read_into, read_json
from checkpoints.disk.safetensors_file import Place, read_header, write_header
from checkpoints.plan import Piece
from checkpoints.tensors import Checkpoint, CheckpointError, TensorInfo

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MODEL_TYPES = {
    "LongcatFlashForCausalLM": "longcat_flash",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "ScMoEForCausalLM": "scmoe",
}


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds; where it does not say its model_type, as LongCat-Flash's does not, its class does."""
    config = read_json(path)
    classes = config.get("architectures")
    names = map(str, classes if isinstance(classes, list) else ())
    kinds = [_MODEL_TYPES[name] for name in names if name in _MODEL_TYPES]
    if config.get("model_type") is None and len(kinds) == 1:
        config["model_type"] = kinds[0]
    return config


class HFFolder(Checkpoint):
    """A Hugging Face folder to read from.

    Attributes:
        config: what config.json holds.
        shards: files with tensors.
    """

    def __init__(self, path: str | Path) -> None:
        """Read headers and nothing else; refuses what is missing, cut short or unsafe."""
        self.folder = Path(path)
        if not (self.folder / CONFIG).is_file():
            raise CheckpointError(f"{path} is no Hugging Face folder: it has no {CONFIG}; name the folder that has it")
        config = inside(self.folder, CONFIG, self.folder)
        self.config = read_config(config)
        index = self.folder / INDEX
        self._places: dict[str, tuple[Path, Place]] = {}
        if (self.folder / WEIGHTS).exists():
            self.shards: tuple[Path, ...] = (inside(self.folder, WEIGHTS, self.folder),)
            self._add(self.shards[0])
            self.files = (config, *self.shards)
        elif index.exists():
            self.shards = self._add_shards(inside(self.folder, INDEX, self.folder))
            self.files = (config, index, *self.shards)
        else:
            raise CheckpointError(_no_weights(self.folder))
        self.infos = {name: info for name, (_, (info, _)) in self._places.items()}
        self.others = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """See ``Checkpoint``."""
        return self.config

    def _read(self, name: str, info: TensorInfo, start: int) -> Tensor:
        path, (whole, offset) = self._places[name]
        result = torch.empty(info.shape, dtype=info.dtype)
        try:
            with path.open("rb", buffering=0) as file:
                read_into(file, offset + start * (whole.nbytes // max(whole.num_rows, 1)), result)
        except EOFError:
            raise CheckpointError(f"{path} is cut short: {name} is not all there; get it anew") from None
        return result

    def _add(self, shard: Path) -> list[str]:
        header = read_header(shard)
        self._places |= {name: (shard, place) for name, place in header.items()}
        return list(header)

    def _add_shards(self, index: Path) -> tuple[Path, ...]:
        """Every shard that the index names, and nothing that it does not."""
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index} has no weight_map of names; get it anew")
        shards = {name: inside(self.folder, name, index) for name in dict.fromkeys(names.values())}
        for shard in shards.values():
            for name in self._add(shard):
                if names.get(name) != shard.name:
                    where = f"in {names[name]!a}" if name in names else "nowhere"
                    raise CheckpointError(f"{shard} holds {name!a}, which {index.name} has {where}; get both anew")
        for name, shard_name in names.items():
            if name not in self._places:
                raise CheckpointError(f"{shards[shard_name]} lacks {name!a}, which {index.name} has there; get it anew")
        return tuple(shards.values())


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
    if pickles:
        return (
            f"{folder} has its weights in a pickle, {pickles[0]!a}, which can run code when it is loaded; if you trust "
            "it, load it with transformers and save it with save_pretrained, as safetensors"
        )
    return f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}; get the whole folder"


class HFWriter:
    """Writes a Hugging Face folder; see ``engine.Writer``."""

    keeps_tensors_whole = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """``files``, by plain file name, are config.json and what else belongs beside weights; others are refused."""
        for name in files:
            if not is_plain(name) or name.endswith((".safetensors", INDEX)):
                raise CheckpointError(f"{name[:80]!a} is no name for a file beside the weights; rename it")
        self._files = files

    def part_path(self, number: int, total: int) -> str:
        """See ``Writer``."""
        return WEIGHTS if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"

    def write_part(self, sink: Sink, pieces: Sequence[Piece], tensors: Iterator[Tensor]) -> list[dict[str, Any]]:
        """See ``Writer``; pieces of one tensor follow one another, row by row."""
        infos: dict[str, TensorInfo] = {}
        for piece in pieces:
            rows = infos[piece.name].num_rows if piece.name in infos else 0
            infos[piece.name] = piece.info.with_rows(rows + piece.info.num_rows)
        write_header(sink, infos)
        for tensor in tensors:
            sink.write(bytes_of(tensor))
        return [{"name": name, "bytes": info.nbytes} for name, info in infos.items()]

    def finish(self, folder: Path, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """See ``Writer``."""
        for name, data in self._files.items():
            (folder / name).write_bytes(data)
        if len(parts) == 1:
            return
        index = {
            "metadata": {"total_size": sum(entry["bytes"] for entries in parts.values() for entry in entries)},
            "weight_map": {entry["name"]: path for path, entries in parts.items() for entry in entries},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
