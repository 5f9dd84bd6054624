"""Faults of other people's converters and data tools, found in their public threads: right here, or refused."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import commands
import numpy
import pytest
import ranks
import small_checkpoints
import torch
from safetensors.torch import load_file, save_file
from training import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import convert_checkpoint  # noqa: E402
from checkpoints.disk.torch_dist import MegatronCheckpoint  # noqa: E402
from preprocessing import encoding, output  # noqa: E402
from preprocessing.sources import Reading, iter_documents, list_sources, scan_files  # noqa: E402

# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "documents"),
    [
        ("a.txt", "one\r\ntwo", ["one\r\ntwo"]),
        ("a.jsonl", '{"text": "one"}\r\n\r\n{"text": "t\\u2028wo"}', ["one", "t\u2028wo"]),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_a_byte_order_mark_is_no_text(tmp_path, name, text, documents, mark):
    path = tmp_path / name
    path.write_bytes(mark + text.encode())
    (source,) = scan_files(list_sources([str(path)], (".txt", ".jsonl")), Reading("text", 0))
    assert source.problem is None and source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(iter_documents(source, Reading("text", 0), hashlib.sha256(), [])) == documents


def test_a_mark_inside_a_text_stays(tmp_path):
    """Negative control: there it is a character like others."""
    path = tmp_path / "a.txt"
    path.write_text("one \ufeff two")
    (source,) = list_sources([str(path)], (".txt",))
    assert list(iter_documents(source, Reading("text", 0), hashlib.sha256(), [])) == ["one \ufeff two"]


def test_numbers_beside_the_text_are_not_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one", "id": {"9" * 5000}}}\n{{"text": 7}}\n')
    (source,) = scan_files(list_sources([str(path)], (".jsonl",)), Reading("text", 0))
    assert source.num_documents == 1
    assert [(line, reason.partition(";")[0]) for line, reason in source.bad_lines] == [(2, "no text under key 'text'")]


def written_ids(folder: Path, size: int) -> tuple[str, list[list[int]]]:
    """Type and ids on disk of two documents that end in the last two pieces of a vocabulary of ``size``."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from sentencepiece import sentencepiece_model_pb2

    model, text = folder / "tokenizer.model", folder / "a.jsonl"
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"w{number}x", 1) for number in range(3, size))):
        proto.pieces.add(piece=piece, type=kind, score=0.0)
    proto.normalizer_spec.add_dummy_prefix = False
    model.write_bytes(proto.SerializeToString())
    text.write_text("".join(json.dumps({"text": f"w{size - back}x"}) + "\n" for back in (1, 2)))
    reading = Reading("text", 0)
    sources = scan_files(list_sources([str(text)], (".jsonl",)), reading)
    output.write_dataset(folder, size, [encoding.encode_files(sources, reading, model, folder / "ids")])
    dataset = IndexedDataset(str(folder / output.DATA))
    return dataset.index.dtype.__name__, [ids.tolist() for ids in dataset]


@pytest.mark.parametrize("size", [600, 65537])
def test_ids_above_65535_are_written_whole(tmp_path, size):
    ((kind, documents),) = ranks.run(written_ids, 1, tmp_path, size)
    assert documents == [[size - 1, 2], [size - 2, 2]]  # and each ends in one end of document, which is counted
    assert kind == ("uint16" if size == 600 else "int32")


# --- checkpoints ---------------------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTIZED = {
    "fp8 without scales": (torch.float8_e4m3fn, {}, "down_proj.weight is float8_e4m3fn"),
    "int8": (torch.int8, {}, "down_proj.weight is int8"),
    "described": (torch.bfloat16, {"quantization_config": FP8}, "config.json describes how"),
    "plain": (torch.bfloat16, {"quantization_config": None}, None),
}


def quantized(folder: Path, dtype: torch.dtype, settings: dict) -> Path:
    """A dense model whose projections have another dtype, and nothing beside them."""
    folder = small_checkpoints.dense(folder)
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = {name: tensor.to(dtype) if "_proj" in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


def upcycled(folder: Path, target: Path) -> int:
    way = ["--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change"]
    return convert_checkpoint.main([*way, "--load", str(folder), "--save", str(target)])


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_no_plain_numbers(tmp_path, capsys, case):
    *what, says = QUANTIZED[case]
    folder = quantized(tmp_path / "dense", *what)
    code, said = upcycled(folder, tmp_path / "made"), capsys.readouterr().err
    if says is None:
        assert code == 0 and "is quantized" not in said
    else:
        assert code == 2 and says in said and len(said.splitlines()) == 1 and not (tmp_path / "made").exists()


def test_quantized_weights_are_not_scored_without_their_scales(tmp_path):
    folder = quantized(tmp_path / "dense", torch.float8_e4m3fn, {})
    numpy.save(tmp_path / "ids.npy", numpy.arange(8))
    words = ("--load", folder, "--input", tmp_path / "ids.npy", "--output", tmp_path / "scores")
    done = commands.run(TOOLS / "score.py", *words)
    assert done.returncode == 2 and "is quantized, and its scales are not read" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "scores").exists()


@pytest.mark.parametrize("beside", [{}, {"rope_theta": 10000.0}], ids=["inside", "inside and outside"])
def test_the_base_of_positions_is_found_where_newer_folders_have_it(tmp_path, beside):
    """Both together are what transformers 5 reads as the inner one."""
    folder = small_checkpoints.dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    inside = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    (folder / "config.json").write_text(json.dumps(config | inside | beside))
    assert upcycled(folder, tmp_path / "made") == 0
    assert MegatronCheckpoint(tmp_path / "made").args.rotary_base == 500000
