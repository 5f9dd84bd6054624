"""Small checkpoints on disk, and a mapping that changes nothing, for tests of the tools that read and write them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from training import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
from checkpoints import engine, formats  # noqa: E402
from checkpoints.disk.hf_folder import HFFolder  # noqa: E402
from checkpoints.disk.torch_dist import MegatronCheckpoint  # noqa: E402
from checkpoints.plan import Conversion, Piece, Read  # noqa: E402
from checkpoints.tensors import TensorInfo  # noqa: E402

ARGS = {
    **{"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "params_dtype": torch.float32, "moe_every": 2},
    **{"ffn_hidden_size": 6, "padded_vocab_size": 32, "max_position_embeddings": 16},
}
CONFIG = {"model_type": "scmoe", "hidden_size": 8}


def made_tensors() -> dict[str, Tensor]:
    """Tensors of several kinds: of one expert a row, of half precision, a single number, whole numbers."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "embedding.word_embeddings.weight": torch.randn(32, 8, generator=generator),
        "decoder.layers.0.self_attention.linear_qkv.weight": torch.randn(24, 8, generator=generator),
        "decoder.layers.0.self_attention.linear_proj.weight": torch.randn(8, 8, generator=generator),
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": torch.randn(4, 6, 8, generator=generator),
        "decoder.layers.1.mlp.router.weight": torch.randn(4, 8, generator=generator).bfloat16(),
        "decoder.layers.1.mlp.router.expert_bias": torch.randn(4, generator=generator),
        "decoder.final_layernorm.weight": torch.ones(8, dtype=torch.float16),
        "number": torch.tensor(3.5),
        "whole": torch.arange(5),
    }
    return tensors


def write_hf(folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int = 1, config: object = CONFIG) -> Path:
    """A Hugging Face folder, by the library of safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for shard in range(num_shards):
        file = "model.safetensors" if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, by the library of safetensors."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_megatron(folder: Path, tensors: Mapping[str, Tensor], args: Mapping[str, object] = ARGS) -> Path:
    """A checkpoint of Megatron's, by the tools' own writer, each tensor of several rows as two chunks."""
    source = write_hf(folder.with_name(folder.name + "-hf"), tensors)
    convert(source, folder, "megatron", args=args)
    return folder


def read_all(source: HFFolder | MegatronCheckpoint) -> dict[str, Tensor]:
    return {name: source.read(name) for name in source.infos}


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        assert torch.equal(tensor, other[name]), name


def identity(source: HFFolder | MegatronCheckpoint, *, args: Mapping[str, object] | None = None) -> formats.Target:
    """Every tensor as it is, those of several rows as two pieces."""
    pieces = []
    for name, info in source.infos.items():
        rows = info.shape[0] if info.shape else 1
        cuts = [0, rows // 2, rows] if rows > 1 else [0, rows]
        for start, stop in itertools.pairwise(cuts):
            part = TensorInfo((stop - start, *info.shape[1:]) if info.shape else (), info.dtype)
            pieces.append(Piece(name=name, info=part, reads=(Read(name, start, stop),), row=start))
    saved = getattr(source, "args", Namespace(**ARGS))
    return formats.Target(
        conversion=Conversion(pieces=tuple(pieces), expected=dict(source.infos), dropped=source.others),
        args=vars(saved) if args is None else args,
        files={"config.json": json.dumps(CONFIG).encode()},
    )


def opened(path: Path) -> HFFolder | MegatronCheckpoint:
    return HFFolder(path) if (path / "config.json").exists() else MegatronCheckpoint(path)


def job(
    source: Path,
    target: Path,
    target_format: str,
    *,
    shard_bytes: int = 1 << 20,
    args: Mapping[str, object] | None = None,
    die_at: int | None = None,
) -> engine.Job:
    """A conversion without a change; the process kills itself when it makes piece ``die_at``."""
    opened_source = opened(source)
    made = identity(opened_source, args=args)
    if die_at is not None:
        pieces = list(made.conversion.pieces)
        dying = Piece(
            **{name: getattr(pieces[die_at], name) for name in ("name", "info", "reads", "row")}, make=kill_myself
        )
        pieces[die_at] = dying
        made = formats.Target(
            conversion=Conversion(
                pieces=tuple(pieces), expected=made.conversion.expected, dropped=opened_source.others
            ),
            args=made.args,
            files=made.files,
        )
    return engine.Job(
        source=opened_source,
        conversion=made.conversion,
        writer=formats.writer(target_format, made),
        target=target,
        shard_bytes=shard_bytes,
        options={"to": target_format},
    )


def kill_myself(tensor: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return tensor


def convert(source: Path, target: Path, target_format: str, **options) -> dict:
    return engine.run(job(source, target, target_format, **options))


def sparse_hf(folder: Path, num_tensors: int, tensor_bytes: int) -> Path:
    """A Hugging Face folder of zeros that takes no room on the disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shape = [tensor_bytes // 4 // 1024, 1024]
    places = {
        f"decoder.layers.{number}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [number * tensor_bytes, (number + 1) * tensor_bytes],
        }
        for number in range(num_tensors)
    }
    header = json.dumps(places).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_tensors * tensor_bytes)
    return folder


def joined(source: HFFolder) -> formats.Target:
    """All tensors of ``source``, of equal shape, as a single piece: what needs memory for all of them at once."""
    info = next(iter(source.infos.values()))
    whole = TensorInfo((len(source.infos) * info.shape[0], *info.shape[1:]), info.dtype)
    piece = Piece(name="all", info=whole, reads=tuple(map(Read, source.infos)), make=lambda *parts: torch.cat(parts))
    return formats.Target(
        conversion=Conversion(pieces=(piece,), expected={"all": whole}),
        args=ARGS,
        files={"config.json": b"{}"},
    )


def peak_memory_kib() -> int:
    """The most memory that this process ever had, its libraries included."""
    words = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()
    return int(words[0])
