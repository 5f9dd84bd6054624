"""Inputs that other people's tools took wrongly: right here, or refused in one line, with nothing changed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import commands
import numpy
import pytest
import small_checkpoints
import torch
from training import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))
import convert_checkpoint  # noqa: E402
from checkpoints.disk.hf_folder import HFFolder  # noqa: E402
from checkpoints.disk.torch_dist import MegatronCheckpoint  # noqa: E402
from checkpoints.disk.torch_saved import safe_globals  # noqa: E402
from checkpoints.mappings.tokenizer import _sentencepiece  # noqa: E402
from command_line import one_line  # noqa: E402
from preprocessing.encoding import load_tokenizer  # noqa: E402
from preprocessing.sources import JSON_LINES, Reading, iter_documents, list_sources, scan_files  # noqa: E402
from scoring.inputs import _is_more_than_sentencepiece  # noqa: E402


def converted(*words: object) -> int:
    return convert_checkpoint.main([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- heads, ids and names ------------------------------------------------------------------------------------------


def rewritten(folder: Path, **tensors: torch.Tensor) -> None:
    """The folder with tensors added or replaced."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("differs", [True, False])
def test_a_stored_head_is_kept_where_it_is_not_the_embedding(tmp_path, differs):
    folder = small_checkpoints.dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    source = HFFolder(folder)
    head = source.read("model.embed_tokens.weight")
    if differs:
        head = head.flip(0).contiguous()
    rewritten(folder, **{"lm_head.weight": head})
    way = ("--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change")
    assert converted(*way, "--load", folder, "--save", tmp_path / "made") == 0
    made = MegatronCheckpoint(tmp_path / "made")
    assert ("output_layer.weight" in made.infos) == differs
    assert made.args.untie_embeddings_and_output_weights == differs
    if differs:
        assert torch.equal(made.read("output_layer.weight"), head)


def test_ids_of_special_tokens_come_through(tmp_path):
    """They were in config.json alone, which is no file that comes along."""
    folder = small_checkpoints.dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": [2, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"w{i}": i for i in range(3, 24)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    way = ("--from", "hf-dense", "--to", "megatron", "--experts", "2", "--skip-change")
    assert converted(*way, "--load", folder, "--save", tmp_path / "made") == 0
    assert (
        converted("--from", "megatron", "--to", "hf-scmoe", "--load", tmp_path / "made", "--save", tmp_path / "hf") == 0
    )
    made = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"]) == (1, 2)
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 5]}


def test_a_model_without_its_type_is_known_by_its_class(tmp_path):
    folder = small_checkpoints.longcat(tmp_path / "longcat")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LongcatFlashForCausalLM"]}))
    words = ("--from", "hf-longcat", "--to", "megatron", "--load", folder)
    assert converted(*words, "--save", tmp_path / "made") == 0
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SomethingElse"]}))
    assert converted(*words, "--save", tmp_path / "other") == 2
    (folder / "config.json").write_text(json.dumps(config | {"architectures": True}))
    assert converted(*words, "--save", tmp_path / "other") == 2


def test_a_tokenizer_that_is_put_there_later_gives_its_own_ids(tmp_path):
    """Without our two files AutoTokenizer makes other ids of tokenizer.model, and says nothing."""
    made = _sentencepiece(tmp_path / "gone.model")
    assert {"tokenizer_config.json", "tokenization_scmoe.py"} == set(made.files) and "put the" in made.notes[0]


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({"added_tokens.json": "{}"}, True),
        ({"tokenizer_config.json": "{}"}, True),
        ({"tokenizer_config.json": '{"auto_map": "tokenization_scmoe.ScMoETokenizer"}'}, False),
        ({}, False),
    ],
    ids=["added tokens", "a class of transformers", "ours", "SentencePiece alone"],
)
def test_a_tokenizer_is_more_than_its_sentencepiece_model(tmp_path, files, more):
    for name, text in {"tokenizer.model": "", **files}.items():
        (tmp_path / name).write_text(text)
    assert _is_more_than_sentencepiece(tmp_path) == more


# --- what text files are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", JSON_LINES)
def test_json_lines_have_several_endings(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_text('{"text": "one \\u00e9"}\n{"text": "two"}\n')
    (source,) = list_sources([str(path)], JSON_LINES)
    assert list(iter_documents(source, Reading("text", 0), hashlib.sha256(), [])) == ["one é", "two"]


def test_compressed_text_says_so(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(b"text"))
    (scanned,) = scan_files(list_sources([str(path)], (".txt",)), Reading("text", 0))
    assert scanned.problem == "compressed by gzip; unpack it with gunzip"


# --- what tools write over -----------------------------------------------------------------------------------------


def assert_refuses(script: str, *words: object, says: str) -> None:
    done = commands.run(TOOLS / script, *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["device", "link", "input"])
def test_a_report_replaces_nothing_that_is_no_file_of_its_own(tmp_path, kind):
    folder = small_checkpoints.dense(tmp_path / "dense")
    target = tmp_path / "target"
    if kind == "device":
        os.mknod(target, 0o20666, os.makedev(1, 3))
    elif kind == "link":
        (tmp_path / "mine").write_text("mine")
        target.symlink_to(tmp_path / "mine")
    else:
        target = folder / "config.json"
    before, was = contents(folder), os.lstat(target)
    says = {"device": "no regular file", "link": "it is a link", "input": "which is read"}[kind]
    assert_refuses("inspect_checkpoint.py", folder, "--json", target, says=says)
    now = os.lstat(target)
    assert contents(folder) == before and (now.st_mode, now.st_ino) == (was.st_mode, was.st_ino)


def a_report(folder: Path) -> Path:
    folder.mkdir()
    span = {"name": "attention", "lane": "compute", "start_s": 0.0, "end_s": 1.0, "backward": False, "at": 0}
    of_pass = {"group": 0, "backward": False, "total_s": 1.0, "sent_bytes": 0, "idle": None}
    one = of_pass | {"spans": [span | {"call": None}]}
    line = {"iteration": 1, "rank": 0, "groups": [], "passes": [one]}
    (folder / "rank00000.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_a_trace_does_not_replace_the_report_that_it_draws(tmp_path):
    folder = a_report(tmp_path / "report")
    before = contents(folder)
    words = (folder, "--output", folder / "rank00000.jsonl", "--overwrite")
    assert_refuses("trace.py", *words, says="a part of the report")
    assert contents(folder) == before
    assert commands.run(TOOLS / "trace.py", folder).returncode == 0  # negative control: the report is drawn


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (("1.0}", "1e308}"), None),
        (('"end_s": 1.0', '"end_s": 1e308'), "lasts from 0.0 to 1e+308"),
        (None, "too deeply"),
    ],
    ids=["no change", "long", "deep"],
)
def test_a_damaged_report_is_refused_in_one_line(tmp_path, damage, says):
    folder = a_report(tmp_path / "report")
    path = folder / "rank00000.jsonl"
    path.write_text("[" * 200_000 if damage is None else path.read_text().replace(*damage))
    (folder / "rankx.jsonl").write_text("no report")
    if says is None:
        assert commands.run(TOOLS / "trace.py", folder, "--ranks", "0").returncode == 0
    else:
        assert_refuses("trace.py", folder, "--ranks", "0", says=says)


def test_a_conversion_is_not_written_into_its_source(tmp_path):
    folder = small_checkpoints.longcat(tmp_path / "longcat")
    before = contents(folder)
    words = ("--from", "hf-longcat", "--to", "megatron", "--load", folder, "--save", folder / "deep" / "new")
    assert_refuses("convert_checkpoint.py", *words, says="lies in --load")
    assert contents(folder) == before


def test_memory_of_a_score_is_that_of_its_windows(tmp_path):
    """20 tokens were padded to as many rows as a micro-batch was to have, and took all memory."""
    folder = small_checkpoints.dense(tmp_path / "dense")
    numpy.save(tmp_path / "ids.npy", numpy.arange(20) % 7)
    words = ["--load", folder, "--input", tmp_path / "ids.npy", "--output", tmp_path / "scores"]
    done = subprocess.run(
        [sys.executable, TOOLS / "score.py", *map(str, words), "--micro-batch-size", "999999"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["total"]["scored_tokens"] == 19


# --- folders and files that are damaged, or none -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "proc", "long"])
def test_data_go_to_no_impossible_folder(tmp_path, kind):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    output = {"loop": tmp_path / "loop", "proc": "/proc/x", "long": tmp_path / ("a" * 300)}[kind]
    says = {"loop": "a link that leads to no folder", "proc": "/proc is not writable", "long": "File name too long"}[
        kind
    ]
    assert_refuses("preprocess_data.py", "--input", tmp_path / "a.txt", "--output", output, says=says)


@pytest.mark.parametrize("manifest", ['{"format_version": 1}', "[]", "{", '{"format_version": 1, "inputs": [1]}'])
def test_a_folder_with_a_foreign_manifest_stays(tmp_path, manifest):
    (tmp_path / "a.txt").write_text("text")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    words = ("--input", tmp_path / "a.txt", "--output", folder)
    assert_refuses("preprocess_data.py", *words, says="not a result of this tool")
    assert contents(folder) == {"manifest.json": manifest.encode()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_trace_is_stopped_in_one_line(tmp_path, number):
    (tmp_path / "report").mkdir()
    os.mkfifo(tmp_path / "report" / "rank00000.jsonl")  # to open it takes for ever
    command = [sys.executable, TOOLS / "trace.py", tmp_path / "report"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until_blocked(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (128 + number, f"trace.py: error: stopped by {number.name}\n")


def wait_until_blocked(pid: int) -> None:
    """Until a process waits for the other end of a pipe."""
    for _ in range(400):
        if Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open"):
            return
        time.sleep(0.05)
    raise TimeoutError(Path(f"/proc/{pid}/wchan").read_text())


def test_no_more_experts_than_a_plan_can_hold(tmp_path):
    folder = small_checkpoints.dense(tmp_path / "dense")
    words = ("--from", "hf-dense", "--to", "megatron", "--load", folder, "--save", tmp_path / "new")
    assert_refuses("convert_checkpoint.py", *words, "--experts", 999_999, says="from 1 to 16384")


@pytest.mark.parametrize("damage", ["tracker", ".distcp", ".metadata", "ids"])
def test_a_score_of_damaged_files_is_refused_in_one_line(tmp_path, damage):
    folder = small_checkpoints.longcat(tmp_path / "longcat")
    made, ids = tmp_path / "made", tmp_path / "ids.npy"
    assert converted("--from", "hf-longcat", "--to", "megatron", "--load", folder, "--save", made) == 0
    numpy.save(ids, numpy.arange(8))
    if damage == "tracker":
        (made / "latest_checkpointed_iteration.txt").write_bytes(b"\xff")
    elif damage == "ids":
        ids.write_bytes(b"")
    else:
        found = [path for path in (made / "release").rglob("*") if damage in str(path) and path.is_file()]
        assert found
        for path in found:
            path.write_bytes(b"")
    says = "ids.npy" if damage == "ids" else str(made)
    assert_refuses("score.py", "--load", made, "--input", ids, "--output", tmp_path / "scores", says=says)
    assert not (tmp_path / "scores").exists()


# --- what a fuzzer has found ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """A checkpoint as Megatron wrote it before its settings lay beside the tensors."""
    home = tmp_path_factory.mktemp("older")
    folder = small_checkpoints.longcat(home / "longcat")
    assert converted("--from", "hf-longcat", "--to", "megatron", "--load", folder, "--save", home / "made") == 0
    small_checkpoints.with_common_file(home / "made" / "release")
    return home / "made"


def test_settings_in_a_file_of_their_own_do_not_keep_core_from_loading(tmp_path, older):
    """What this tool had allowed torch to load, it took from Core, which had allowed it too."""
    numpy.save(tmp_path / "ids.npy", numpy.arange(8))
    done = commands.run(
        TOOLS / "score.py", "--load", older, "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr


def test_what_torch_may_load_is_left_as_it_was():
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Namespace])
    try:
        with safe_globals([Namespace, Path]):
            assert Path in torch.serialization.get_safe_globals()
        assert Namespace in torch.serialization.get_safe_globals()
        assert Path not in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def without_bool(folder: Path) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    one = next(entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "properties"))
    one.properties.pin_memory = 1
    path.write_bytes(pickle.dumps(metadata))


def other_bytes(folder: Path) -> None:
    path = folder / "release" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [without_bool, other_bytes])
def test_what_core_makes_of_a_damaged_checkpoint_is_said_in_one_line(tmp_path, older, damage):
    shutil.copytree(older, tmp_path / "made")
    damage(tmp_path / "made")
    numpy.save(tmp_path / "ids.npy", numpy.arange(8))
    words = ["--load", tmp_path / "made", "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    done = commands.run(TOOLS / "score.py", *words)
    *loading, said = done.stderr.splitlines()
    assert done.returncode == 2 and len(loading) == 1, done.stderr
    assert "or is damaged" in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_ids_with_a_damaged_header_are_refused_in_one_line(tmp_path, older):
    numpy.save(tmp_path / "ids.npy", numpy.arange(8))
    data = bytearray((tmp_path / "ids.npy").read_bytes())
    data[20:100] = bytes(80)
    (tmp_path / "ids.npy").write_bytes(data)
    words = ("--load", older, "--input", tmp_path / "ids.npy", "--output", tmp_path / "out")
    assert_refuses("score.py", *words, says="no array of numpy.save")


def test_a_tokenizer_without_its_unknown_token_is_refused_in_one_line(tmp_path, older):
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "<unk>"}
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    )
    (tmp_path / "a.txt").write_text("c")
    words = ("--load", older, "--input", tmp_path / "a.txt", "--tokenizer", tmp_path / "words")
    assert_refuses("score.py", *words, "--output", tmp_path / "out", says="Missing [UNK] token")


def test_a_tokenizer_may_lie_where_no_text_can_say(tmp_path):
    """SentencePiece takes names as text; one that is not UTF-8 ended in a traceback."""
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 40)
    first = ("--input", tmp_path / "a.txt", "--output", tmp_path / "data", "--vocab-size", 300, "--workers", 1)
    assert commands.run(TOOLS / "preprocess_data.py", *first).returncode == 0
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    shutil.copy(tmp_path / "data" / "tokenizer.model", odd)
    words = ("--input", tmp_path / "a.txt", "--output", tmp_path / "more", "--workers", 1)
    done = commands.run(TOOLS / "preprocess_data.py", *words, "--tokenizer-model", odd / "tokenizer.model")
    assert done.returncode == 0, done.stderr
    assert load_tokenizer(odd / "tokenizer.model").get_piece_size() == 300
    assert _sentencepiece(odd / "tokenizer.model").files["tokenizer.model"]


@pytest.mark.parametrize("shape", [[1 << 63, 0], [0, 1 << 70], [0, 1 << 40, 1 << 40]])
def test_a_tensor_without_elements_claims_no_sizes_that_torch_cannot_count(tmp_path, shape):
    folder = small_checkpoints.dense(tmp_path / "dense")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8:begin]), len(data) - begin
    for name, sizes in (("fine", [5, 0]), ("empty", shape)):
        text = json.dumps(header | {name: {"dtype": "F32", "shape": sizes, "data_offsets": [end, end]}}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])
        if name == "fine":  # negative control
            assert commands.run(TOOLS / "inspect_checkpoint.py", folder, "--norms").returncode == 0
    assert_refuses("inspect_checkpoint.py", folder, "--norms", says="is no shape")


ODD = "a\nb\x1b[31mc"
NAMED_ODDLY = {
    "inspect_checkpoint.py": (ODD,),
    "convert_checkpoint.py": ("--from", "megatron", "--to", "hf-scmoe", "--load", ODD, "--save", "out"),
    "score.py": ("--load", ODD, "--input", "ids.npy", "--output", "out"),
    "preprocess_data.py": ("--input", ODD, "--output", "out"),
    "trace.py": (ODD,),
    "ablate_overlap.py": ("--from", ODD),
    "ablate_codec.py": ("--from", ODD),
    "slow_link.py": ("--json", ODD, "--", ODD),
}


@pytest.mark.parametrize("script", NAMED_ODDLY)
def test_an_odd_name_stays_on_one_line(tmp_path, script):
    done = commands.run(TOOLS / script, *NAMED_ODDLY[script], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 + (script == "preprocess_data.py") and all(line.isprintable() for line in lines), lines


def test_odd_names_are_printed_such_that_no_terminal_obeys(tmp_path):
    made = small_checkpoints.dense(tmp_path / ODD)
    a_report(tmp_path / f"{ODD} report")
    for script, *words in (("inspect_checkpoint.py", made, made), ("trace.py", tmp_path / f"{ODD} report")):
        done = commands.run(TOOLS / script, *words)
        assert done.returncode == 0 and all(line.isprintable() for line in done.stdout.splitlines()), done.stdout


def test_one_line():
    assert one_line("a\nb\x1b[31m \ud800 caf\u00e9") == "a\\nb\\x1b[31m \\ud800 caf\u00e9"
