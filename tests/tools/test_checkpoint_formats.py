"""tools/checkpoints: what is read is what was saved, by others' libraries too; what is damaged or unsafe is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import ranks
import torch
import training
from cases import cases
from checkpoint_files import (
    ARGS,
    HFFolder,
    MegatronCheckpoint,
    TensorInfo,
    assert_same,
    convert,
    made_tensors,
    read_all,
    read_hf,
    write_hf,
    write_megatron,
)
from checkpoints.disk import torch_dist
from checkpoints.disk.torch_dist_metadata import Extent
from checkpoints.disk.torch_dist_writer import MegatronWriter
from checkpoints.disk.torch_saved import crc_of
from checkpoints.tensors import CheckpointError
from training import SCMOE, STOCK, with_flags

# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3])
def test_hf_reads_what_the_library_saved(tmp_path, num_shards):
    tensors = made_tensors() | {
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
        "b": torch.ones(3).byte(),
    }
    source = HFFolder(write_hf(tmp_path / "hf", tensors, num_shards=num_shards))
    assert_same(read_all(source), tensors)
    assert source.config["model_type"] == "scmoe"
    embedding = "embedding.word_embeddings.weight"
    assert torch.equal(source.read(embedding, 3, 7), tensors[embedding][3:7])
    assert source.infos[embedding] == TensorInfo((32, 8), torch.float32)
    with pytest.raises(CheckpointError, match="has 32 rows, and rows 3 to 33"):
        source.read(embedding, 3, 33)


@pytest.mark.parametrize("shard_bytes", [1 << 20, 600])
def test_hf_writes_what_the_library_reads(tmp_path, shard_bytes):
    tensors = made_tensors()
    source = write_hf(tmp_path / "hf", tensors)
    convert(source, tmp_path / "new", "hf", shard_bytes=shard_bytes)
    assert_same(read_hf(tmp_path / "new"), tensors)
    assert_same(read_all(HFFolder(tmp_path / "new")), tensors)
    files = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    if shard_bytes > 600:
        assert files == ["model.safetensors"]
        return
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)


def test_hf_links_of_the_cache_are_followed_and_others_are_not(tmp_path):
    folder = write_hf(tmp_path / "models--a--b" / "snapshots" / "1234", made_tensors())
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    weights = folder / "model.safetensors"
    weights.rename(blobs / "f00d")
    weights.symlink_to("../../blobs/f00d")
    assert_same(read_all(HFFolder(folder)), made_tensors())
    (blobs / "f00d").rename(tmp_path / "f00d")
    weights.unlink()
    weights.symlink_to("../../../f00d")
    with pytest.raises(CheckpointError, match="a link that leads out of its folder"):
        HFFolder(folder)


def rewrite_header(path: Path, change) -> None:
    """Let ``change`` change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rewrite_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def cut(path: Path, num_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HF_DAMAGE = {
    "cut tensors": (lambda d: cut(d / FIRST, 4), "damaged or cut short: it has"),
    "cut header": (lambda d: os.truncate(d / FIRST, 30), "its header is not there"),
    "empty file": (lambda d: os.truncate(d / FIRST, 0), "its header is not there"),
    "something behind": (lambda d: (d / FIRST).write_bytes((d / FIRST).read_bytes() + b"x"), "it has"),
    "no safetensors": (lambda d: (d / FIRST).write_bytes(b"\x10" + bytes(7) + b"{" * 90), "its header is damaged"),
    "huge header": (lambda d: (d / FIRST).write_bytes(b"\xff" * 100), "its header is not there"),
    "missing shard": (lambda d: (d / SECOND).unlink(), "is missing, and"),
    "wrong shape": (
        lambda d: rewrite_header(d / FIRST, lambda h: h["whole"].update(shape=[6])),
        "40 bytes for a tensor of 48",
    ),
    "huge shape": (
        lambda d: rewrite_header(d / FIRST, lambda h: h["whole"].update(shape=[2**70, 2**70])),
        "its header is damaged",
    ),
    "shape that overflows": (
        lambda d: rewrite_header(
            d / FIRST, lambda h: h.update(none={"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]})
        ),
        rf"\({2**32}, {2**32}\) is no shape",
    ),
    "negative shape": (
        lambda d: rewrite_header(d / FIRST, lambda h: h["whole"].update(shape=[-1, -5])),
        "-1 is no size",
    ),
    "unknown dtype": (
        lambda d: rewrite_header(d / FIRST, lambda h: h["whole"].update(dtype="F1")),
        "dtype 'F1' is not read",
    ),
    "overlap": (
        lambda d: rewrite_header(d / FIRST, lambda h: h["whole"].update(data_offsets=[8, 48])),
        "does not begin where the one before it ends",
    ),
    "twice": (
        lambda d: (d / FIRST).write_bytes(struct.pack("<Q", 16) + b'{"a":{},"a":{}} '),
        "a name occurs twice",
    ),
    "extra in shard": (lambda d: rewrite_index(d, lambda m: m.pop("whole")), "holds 'whole', which .* has nowhere"),
    "extra in index": (lambda d: rewrite_index(d, lambda m: m.update(other=FIRST)), "lacks 'other', which"),
    "another shard": (lambda d: rewrite_index(d, lambda m: m.update(whole=SECOND)), "holds 'whole', which .* has in"),
    "path upwards": (lambda d: rewrite_index(d, lambda m: m.update(whole="../x.safetensors")), "not in its folder"),
    "absolute path": (lambda d: rewrite_index(d, lambda m: m.update(whole="/etc/passwd")), "not in its folder"),
    "path of two lines": (lambda d: rewrite_index(d, lambda m: m.update(whole="a\nb")), "not in its folder"),
    "no names": (lambda d: rewrite_index(d, lambda m: m.update(whole=["x"])), "has no weight_map of names"),
    "a name with a line break": (
        lambda d: rewrite_header(d / FIRST, lambda h: h.update({"a\nb": h.pop("whole")})),
        r"a.nb. is no name of a tensor",
    ),
    "no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "is not JSON"),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "holds no JSON object but list"),
    "no config": (lambda d: (d / "config.json").unlink(), "is no Hugging Face folder"),
    "no weights": (
        lambda d: [path.unlink() for path in d.glob("model*")],
        "has no weights: neither model.safetensors nor",
    ),
    "pickle": (
        lambda d: [path.unlink() for path in d.glob("model*")] + [(d / "pytorch_model.bin").write_bytes(b"")],
        "has its weights in a pickle, 'pytorch_model.bin'",
    ),
}


@pytest.mark.parametrize("damage", HF_DAMAGE)
def test_hf_damage_is_refused(tmp_path, damage):
    tensors = {"whole": torch.arange(5), **made_tensors()}  # the first tensor of the first shard
    folder = write_hf(tmp_path / "hf", tensors, num_shards=2)
    HFFolder(folder)
    do, message = HF_DAMAGE[damage]
    do(folder)
    with pytest.raises(CheckpointError, match=message) as refused:
        HFFolder(folder)
    assert "\n" not in str(refused.value)


def test_hf_cut_behind_our_back_is_noticed(tmp_path):
    """A file that gets shorter after it was opened gives an error, not numbers."""
    source = HFFolder(write_hf(tmp_path / "hf", made_tensors()))
    cut(tmp_path / "hf" / "model.safetensors", 300)
    with pytest.raises(CheckpointError, match="is cut short: .* is not all there"):
        read_all(source)


# --- Megatron --------------------------------------------------------------------------------------------------------


def plain_tensors(folder):
    """On a rank: what Core reads of a checkpoint, and its common state."""
    from megatron.core import dist_checkpointing

    plain = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: value for key, value in plain.items() if isinstance(value, torch.Tensor)}


def common_state(folder):
    from megatron.core import dist_checkpointing
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    return dist_checkpointing.load_common_state_dict(str(folder))


@pytest.mark.parametrize("shard_bytes", [1 << 20, 300])
def test_core_reads_what_we_write(tmp_path, shard_bytes):
    source = write_hf(tmp_path / "hf", made_tensors())
    convert(source, tmp_path / "megatron", "megatron", args=ARGS, shard_bytes=shard_bytes)
    (found,) = ranks.run(plain_tensors, 1, tmp_path / "megatron" / "release")
    assert_same(found, made_tensors())
    assert_same(read_all(MegatronCheckpoint(tmp_path / "megatron")), made_tensors())
    files = list((tmp_path / "megatron" / "release").glob("*.distcp"))
    assert (len(files) == 2) == (shard_bytes > 300)  # one part, and the file of objects
    (common,) = ranks.run(common_state, 1, tmp_path / "megatron" / "release")
    assert common["iteration"] == 0 and common["checkpoint_version"] == 3.0
    assert {name: getattr(common["args"], name) for name in ARGS} == ARGS
    assert common["args"].no_save_optim and common["args"].no_save_rng


def test_rows_of_chunks(tmp_path):
    """Rows within one chunk, over two, none, and a scalar; each as a tensor of its own."""
    source = MegatronCheckpoint(write_megatron(tmp_path / "megatron", made_tensors()))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    for start, stop in [(0, 24), (2, 5), (10, 14), (12, 24), (23, 24), (7, 7)]:
        rows = source.read(name, start, stop)
        assert torch.equal(rows, made_tensors()[name][start:stop])
        assert rows.untyped_storage().nbytes() == rows.nbytes
    assert source.read("number") == 3.5
    with pytest.raises(CheckpointError, match="has no tensor elsewhere"):
        source.read("elsewhere")


def test_checksums_that_torch_was_told_to_leave_out(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        folder = write_megatron(tmp_path / "megatron", made_tensors())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_all(MegatronCheckpoint(folder)), made_tensors())


def rank_parts(folder):
    """On each of two ranks: save a tensor split along its columns, one along its rows, and stacked blocks."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, tensors = dist.get_rank(), made_tensors()
    qkv = tensors["decoder.layers.0.self_attention.linear_qkv.weight"]
    stacked = tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]  # four blocks
    columns = qkv.chunk(2, dim=1)[rank].contiguous()
    parts = {
        "columns": ShardedTensor.from_rank_offsets("columns", columns, (1, rank, 2)),
        "rows": ShardedTensor.from_rank_offsets("rows", qkv.chunk(2)[rank].contiguous(), (0, rank, 2)),
    }
    for block in range(rank, 4, 2):
        key = "decoder.layers.mlp.linear_fc1.weight"
        parts[f"{block}"] = ShardedTensor.from_rank_offsets(
            key, stacked[block].contiguous(), (0, block, 4), prepend_axis_num=1
        )
    dist_checkpointing.save({**parts, "args": torch_namespace(), "iteration": 7}, str(folder))


def torch_namespace():
    from argparse import Namespace

    from megatron.core.transformer.enums import AttnBackend

    return Namespace(**ARGS, attention_backend=AttnBackend.flash, folder=Path("a/b"), sizes=[(1, AttnBackend.flash)])


def test_chunks_of_any_layout_and_stacked_blocks(tmp_path):
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    ranks.run(rank_parts, 2, folder)
    source = MegatronCheckpoint(folder)
    qkv = made_tensors()["decoder.layers.0.self_attention.linear_qkv.weight"]
    stacked = made_tensors()["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    names = {f"decoder.layers.{block}.mlp.linear_fc1.weight" for block in range(4)}
    assert set(source.infos) == {"columns", "rows", *names}
    assert torch.equal(source.read("columns"), qkv) and torch.equal(source.read("rows"), qkv)
    assert torch.equal(source.read("columns", 5, 19), qkv[5:19])
    for block in range(4):
        assert torch.equal(source.read(f"decoder.layers.{block}.mlp.linear_fc1.weight"), stacked[block])
        assert torch.equal(source.read(f"decoder.layers.{block}.mlp.linear_fc1.weight", 2, 5), stacked[block][2:5])
    assert source.iteration == 7
    assert source.args.params_dtype == torch.float32 and source.args.folder == "a/b"
    flash = source.args.attention_backend
    assert isinstance(flash, int) and source.args.sizes == [(1, flash)]
    assert set(source.others) == {"common_state/shard_0_1"}


TRAINED = {
    "scmoe ep2 bf16": (SCMOE, 2, "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer"),
    "scmoe tp2": (SCMOE, 2, "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 2"),
    "scmoe pp2": (SCMOE, 2, "--pipeline-model-parallel-size 2"),
    # Core saves all blocks as one tensor where they are all alike.
    "stock moe": (STOCK, 2, "--expert-model-parallel-size 2"),
}


def grouped(words: str) -> list[str]:
    """ "--a 1 --b" as ["--a 1", "--b"]."""
    return [f"--{group.strip()}" for group in words.split("--")[1:]]


def train(flags):
    """On a rank: train, and return what was printed."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it under tensor parallelism
    return training.train(flags)


@pytest.mark.parametrize("case", cases(TRAINED, list(TRAINED)[:2]))
def test_trained_checkpoint_reads_and_loads_again(tmp_path, case):
    """What training saved at one layout is read as Core reads it; written anew it continues with the same loss, in
    another layout, with no flag but --load."""
    flags, world_size, layout = TRAINED[case]
    flags = with_flags(flags, "--train-iters 2")
    (output, *_) = ranks.run(
        train,
        world_size,
        with_flags(flags, *grouped(layout), f"--save {tmp_path}/trained", "--save-interval 2"),
        timeout_s=240,
    )
    assert "exit code" not in output, output[-3000:]
    source = MegatronCheckpoint(tmp_path / "trained")
    (by_core,) = ranks.run(training.checkpoint_tensors, 1, tmp_path / "trained", 2)
    model = {key: tensor for key, tensor in by_core.items() if "optimizer." not in key}
    stacked = {key for key in model if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit()}
    assert bool(stacked) == (case == "stock moe")
    for key in stacked:
        tensor = model.pop(key)
        model |= {key.replace("layers.", f"layers.{block}.", 1): rows for block, rows in enumerate(tensor)}
    assert_same(read_all(source), model)
    assert source.iteration == 2 and source.args.hidden_size == 32
    reasons = set(source.others.values())
    assert any("optimizer" in reason for reason in reasons) and any("FP8" in reason for reason in reasons)
    assert set(by_core) - set(model) - stacked <= set(source.others)

    convert(tmp_path / "trained", tmp_path / "release", "megatron", shard_bytes=4000)
    losses = []
    for name, more in {"trained": ["--finetune"], "release": []}.items():
        again = with_flags(flags, "--train-iters 1", f"--load {tmp_path}/{name}", *more)
        (output,) = ranks.run(
            training.train, 1, with_flags(again, f"--tensorboard-dir {tmp_path}/{name}-tb"), timeout_s=240
        )
        assert "exit code" not in output, output[-3000:]
        losses.append(training.scalars(tmp_path / f"{name}-tb", "lm loss")["lm loss"])
    assert losses[0] == losses[1] and len(losses[0]) == 1


def test_use_checkpoint_args_takes_them_from_a_release(tmp_path):
    """Also our own settings: another position than that of the command line."""
    flags = with_flags(SCMOE, "--train-iters 1", "--shortcut-position pos1")
    ranks.run(training.train, 1, with_flags(flags, f"--save {tmp_path}/trained", "--save-interval 1"), timeout_s=240)
    convert(tmp_path / "trained", tmp_path / "release", "megatron")
    flags = with_flags(SCMOE, "--train-iters 1", f"--load {tmp_path}/release")
    (refused,) = ranks.run(training.train, 1, with_flags(flags, "--shortcut-position pos2"), timeout_s=240)
    assert "exit code 2" in refused  # negative control: the settings are there to be compared
    (output,) = ranks.run(training.train, 1, with_flags(flags, "--use-checkpoint-args", "--finetune"), timeout_s=240)
    assert "exit code" not in output and "loading release distributed checkpoint" in output


class Code:
    """A pickle that would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def rewrite_metadata(folder: Path, change) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def part(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def storage(metadata, name: str, row: int = 0):
    return next(
        info for index, info in metadata.storage_data.items() if index.fqn == name and (index.offset or [0])[0] == row
    )


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def replace_tensor(folder: Path, value) -> None:
    """Put ``value`` in the place of the tensor "whole"'s first chunk."""
    data = saved(value)

    def change(metadata):
        info = storage(metadata, "whole")
        info.offset, info.length = part(folder).stat().st_size, len(data)

    rewrite_metadata(folder, change)
    with part(folder).open("ab") as file:
        file.write(data)


def replace_common(folder: Path, value) -> None:
    (folder / "other.distcp").write_bytes(saved(value))

    def change(metadata):
        info = storage(metadata, "common_state/shard_0_1")
        info.relative_path, info.offset, info.length = "other.distcp", 0, (folder / "other.distcp").stat().st_size

    rewrite_metadata(folder, change)


def move(name: str, target: object):
    return lambda d: rewrite_metadata(d, lambda m: setattr(storage(m, name), "relative_path", target))


def grow_chunk(metadata) -> None:
    metadata.state_dict_metadata["whole"].chunks[0].sizes = torch.Size([3])


def grow_tensor(metadata) -> None:
    entry = metadata.state_dict_metadata["number"]
    entry.size = entry.chunks[0].sizes = torch.Size([2**40])
    entry.chunks[0].offsets = torch.Size([0])
    for index in list(metadata.storage_data):
        if index.fqn == "number":
            metadata.storage_data[type(index)("number", (0,))] = metadata.storage_data[index]


def flip_bit(folder: Path, tensor: torch.Tensor) -> None:
    data = bytearray(part(folder).read_bytes())
    at = bytes(data).index(tensor.numpy().tobytes())
    data[at + 5] ^= 1
    part(folder).write_bytes(data)


MEGATRON_DAMAGE = {
    "cut tensors": (lambda d: cut(part(d), 100), "is cut short: .* ends at byte"),
    "missing file": (lambda d: part(d).unlink(), "is missing, and"),
    "no metadata": (lambda d: (d / ".metadata").unlink(), "is missing, and .*latest_checkpointed_iteration.txt names"),
    "cut metadata": (lambda d: cut(d / ".metadata", 40), "is damaged"),
    "empty metadata": (lambda d: (d / ".metadata").write_bytes(b""), "is damaged"),
    "metadata of something else": (lambda d: (d / ".metadata").write_bytes(pickle.dumps([1])), "is damaged"),
    "no settings of the format": (lambda d: (d / "metadata.json").unlink(), "is missing, and"),
    "another format": (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "the format 'zarr'"),
    "older format": (lambda d: (d / "mp_rank_00").mkdir(), "Megatron's older format"),
    "path upwards": (move("whole", "../release/__0_0.distcp"), "not in its folder"),
    "absolute path": (move("whole", "/etc/passwd"), "not in its folder"),
    "no path": (move("whole", 5), "not in its folder"),
    "chunks overlap": (lambda d: rewrite_metadata(d, grow_chunk), "the chunks of whole do not make up the tensor"),
    "chunk missing": (
        lambda d: rewrite_metadata(d, lambda m: m.state_dict_metadata["whole"].chunks.pop()),
        "the chunks of whole do not make up the tensor",
    ),
    "huge tensor": (lambda d: rewrite_metadata(d, grow_tensor), "number is larger than what was saved of it"),
    "negative range": (
        lambda d: rewrite_metadata(d, lambda m: setattr(storage(m, "whole"), "offset", -4)),
        "-4 is no size",
    ),
    "a name with a line break": (
        lambda d: rewrite_metadata(d, lambda m: m.state_dict_metadata.update({"a\nb": m.state_dict_metadata["whole"]})),
        "a.nb. is no name",
    ),
    "compressed": (
        lambda d: rewrite_metadata(d, lambda m: setattr(storage(m, "whole"), "transform_descriptors", ["zstd"])),
        "is compressed or encrypted",
    ),
    "no common state": (lambda d: replace_common(d, 3), "its common state is no dictionary"),
    "no arguments": (lambda d: replace_common(d, [{}]), "has no saved arguments"),
    "tracker of something else": (
        lambda d: (d.parent / "latest_checkpointed_iteration.txt").write_text("../../etc"),
        "names no iteration but",
    ),
    "no tracker": (lambda d: shutil.rmtree(d.parent), "is no Megatron checkpoint"),
    "wrong shape": (lambda d: replace_tensor(d, torch.zeros(3)), "is not the tensor that"),
    "wrong dtype": (lambda d: replace_tensor(d, torch.zeros(2)), "is not the tensor that"),
    "no tensor": (lambda d: replace_tensor(d, {"a": torch.zeros(2)}), "is damaged"),
    "flipped bit": (lambda d: flip_bit(d, made_tensors()["decoder.final_layernorm.weight"][:4]), "its checksum"),
    "code in metadata": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(Code(d.parent / "marker"))),
        "names 'posix' 'system', which no checkpoint needs",
    ),
    "code in a tensor": (lambda d: replace_tensor(d, Code(d.parent / "marker")), "could run code"),
    "code in common state": (
        lambda d: replace_common(d, [{"args": Code(d.parent / "marker")}]),
        "asks for posix.system, which could run code",
    ),
    "link": (
        lambda d: (part(d).rename(d.parent / "x"), part(d).symlink_to("../x")),
        "a link that leads out of its folder",
    ),
}


@pytest.mark.parametrize("damage", MEGATRON_DAMAGE)
def test_megatron_damage_is_refused(tmp_path, damage):
    folder = write_megatron(tmp_path / "megatron", made_tensors())
    read_all(MegatronCheckpoint(folder))
    do, message = MEGATRON_DAMAGE[damage]
    do(folder / "release")
    with pytest.raises(CheckpointError, match=message) as refused:
        read_all(MegatronCheckpoint(folder))
    assert "\n" not in str(refused.value)
    assert not (folder / "marker").exists()


# --- a flipped byte --------------------------------------------------------------------------------------------------


def flip(path: Path, data: bytes, at: int = 0) -> None:
    """Flip a bit of the byte ``at`` behind the begin of ``data`` in a file."""
    contents = bytearray(path.read_bytes())
    assert contents.count(data) == 1
    contents[contents.index(data) + at] ^= 1
    path.write_bytes(contents)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


@pytest.mark.parametrize("name", [QKV, EXPERTS, "embedding.word_embeddings.weight"])
@pytest.mark.parametrize("rows", [(0, 1), (1, 2), (0, None)])
def test_a_flipped_byte_is_noticed_with_any_part_of_its_chunk(tmp_path, name, rows):
    """Whichever rows are read first, and in the chunk that was damaged alone."""
    folder = write_megatron(tmp_path / "megatron", made_tensors())
    tensor = made_tensors()[name]
    half = tensor.shape[0] // 2
    flip(part(folder / "release"), tensor[:half].numpy().tobytes(), at=tensor[:half].nbytes - 1)
    source = MegatronCheckpoint(folder)
    assert torch.equal(source.read(name, half), tensor[half:])  # the other chunk is as it was
    with pytest.raises(CheckpointError, match=f"is damaged: {name} is not what its checksum says; get it anew"):
        source.read(name, *rows)


def test_a_chunk_is_checked_once(tmp_path, monkeypatch):
    """Not again for each part, and what is read as a whole not by reading it twice."""
    checked = []
    monkeypatch.setattr(torch_dist, "crc_of", lambda file, storage: checked.append(storage) or crc_of(file, storage))
    source = MegatronCheckpoint(write_megatron(tmp_path / "megatron", made_tensors()))
    for row in range(4):
        source.read(EXPERTS, row, row + 1)
    assert len(checked) == 2 == len(set(checked))  # of two rows each
    source.read(QKV)
    assert len(checked) == 2


def test_checksums_need_little_memory(tmp_path):
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(1 << 26)
    expected = zlib.crc32(bytes(1 << 26))
    tracemalloc.start()
    with path.open("rb", buffering=0) as file:
        assert crc_of(file, Extent(path, 0, 1 << 26)) == expected
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_flipped_byte_of_a_view_is_noticed(tmp_path):
    """Where torch.save wrote more than the elements, its checksum is that of all of it."""
    folder = write_megatron(tmp_path / "megatron", made_tensors())
    replace_tensor(folder / "release", torch.arange(9)[:2])
    assert torch.equal(MegatronCheckpoint(folder).read("whole", 0, 2), torch.arange(2))
    flip(part(folder / "release"), torch.arange(9).numpy().tobytes())
    with pytest.raises(CheckpointError, match="not what its checksum says"):
        MegatronCheckpoint(folder).read("whole", 0, 2)


def test_a_flipped_byte_of_the_saved_arguments_is_noticed(tmp_path):
    """Which torch.load would take for what was saved: it compares nothing with checksums."""
    folder = write_megatron(tmp_path / "megatron", made_tensors())
    flip(folder / "release" / "__0_objects.distcp", b"num_layersq", at=len(b"num_layersq") + 2)
    with pytest.raises(CheckpointError, match=r"is damaged: no common state \(BadZipFile: Bad CRC-32"):
        MegatronCheckpoint(folder)


def test_a_flipped_byte_beside_a_tensor_is_noticed(tmp_path):
    """Of what says which shape it has."""
    folder = write_megatron(tmp_path / "megatron", {"whole": torch.arange(5)})
    contents = bytearray(part(folder / "release").read_bytes())
    contents[contents.index(b"LongStorage")] ^= 1
    part(folder / "release").write_bytes(contents)
    with pytest.raises(CheckpointError, match="is damaged at whole .BadZipFile: Bad CRC-32"):
        read_all(MegatronCheckpoint(folder))


def test_the_code_would_run(tmp_path):
    """Negative control: Python's own loader runs it."""
    pickle.loads(pickle.dumps(Code(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_what_was_measured_on_another_machine_does_not_travel(tmp_path):
    """Plans do not, and neither does the layout; rates of the codec are about the model."""
    saved = {"overlap_plans": {"0": {"chunks": 2}}, "lsh_levels": {"0": 4.3}, "world_size": 8}
    source = MegatronCheckpoint(write_megatron(tmp_path / "release", made_tensors(), args={**ARGS, **saved}))
    assert saved.keys() & vars(source.args).keys() == {"lsh_levels"}
    assert source.args.lsh_levels == saved["lsh_levels"]


def test_saved_arguments_have_builtin_types():
    with pytest.raises(CheckpointError, match="saved arguments have builtin types, and one has"):
        MegatronWriter({}, {"where": Path("a")})
