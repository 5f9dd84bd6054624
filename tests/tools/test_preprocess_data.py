"""tools/preprocess_data.py: nothing lost, nothing half-written, and ids that Megatron's own tokenizer agrees with."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
sys.path.insert(0, str(TOOL.parent))
import preprocess_data as tool  # noqa: E402  (the workers find it through sys.path, too)
from preprocessing import output as output_folder  # noqa: E402
from preprocessing import sources, workers  # noqa: E402

EXACT = "def f(x):\n\tif x:\r\n        return  'a   b'  # \u00e9 \u2581\u2581x\n\n\n"


def command(*words: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, words)]


def run_command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), check=False, capture_output=True, text=True, timeout=60)


def tree_sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Python source, text with awkward white space, and JSONL: several tasks for the workers."""
    folder = tmp_path_factory.mktemp("corpus") / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("argparse", "ast", "inspect", "typing", "subprocess", "tarfile"):
        source = Path(os.__file__).with_name(f"{name}.py").read_bytes()
        (folder / "sub" / f"{name}.py").write_bytes(source * 6)
    (folder / "exact.txt").write_bytes(EXACT.encode())
    (folder / "b.jsonl").write_text('{"text": "one\\n  two", "id": 1}\n\n{"text": "\\ud83d\\ude00 three"}')
    (folder / "c.bin").write_bytes(b"\xff")  # another suffix: not read
    (folder / "sub" / "loop").symlink_to(folder)
    return folder


@pytest.fixture(scope="module")
def built(corpus) -> Path:
    output = corpus.parent / "out"
    assert tool.main(["--input", str(corpus), "--output", str(output), "--vocab-size", "600", "--workers", "1"]) == 0
    return output


@pytest.fixture(scope="module")
def megatron_tokenizer(built):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(tokenizer_args(built / "tokenizer.model"))


def tokenizer_args(model: Path) -> types.SimpleNamespace:
    """Megatron's own defaults (training_config.TokenizerConfig) with the two flags that the tool prints."""
    from megatron.training.config.training_config import TokenizerConfig

    values = vars(TokenizerConfig())
    values |= {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model), "pad_vocab_size": False}
    return types.SimpleNamespace(**values)


# --- what Megatron reads ---------------------------------------------------------------------------------------------


def test_dataset_is_what_megatrons_tokenizer_encodes(corpus, built, megatron_tokenizer):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(built / "text_document"))
    names = sorted(f"sub/{path.name}" for path in (corpus / "sub").glob("*.py"))
    texts = ["one\n  two", "\U0001f600 three", EXACT] + [(corpus / name).read_bytes().decode() for name in names]
    assert len(dataset) == len(texts) == len(dataset.document_indices) - 1
    for ids, text in zip(dataset, texts, strict=True):
        assert ids[-1] == megatron_tokenizer.eod and megatron_tokenizer.eod not in ids[:-1]
        assert ids[:-1].tolist() == megatron_tokenizer.tokenize(text)
        assert megatron_tokenizer.detokenize(ids[:-1].tolist()) == text
    assert dataset.index.dtype.__name__ == "uint16"


def test_manifest_states_what_is_there(corpus, built, megatron_tokenizer):
    manifest = manifest_of(built)
    hashes = tree_sha256(built)
    assert manifest["vocabulary"] == {"size": megatron_tokenizer.vocab_size, "eod_id": megatron_tokenizer.eod}
    assert manifest["vocabulary"]["size"] == 600 and megatron_tokenizer.pad == 3
    assert {name: entry["sha256"] for name, entry in manifest["outputs"].items()} | {
        "manifest.json": hashes["manifest.json"]
    } == hashes
    for entry in manifest["inputs"]:
        assert entry["sha256"] == hashlib.sha256(Path(entry["name"]).read_bytes()).hexdigest()
    totals = manifest["totals"]
    assert totals["documents"] == 9 and totals["files"] == 8 and totals["inexact_documents"] == 0
    assert totals["tokens"] * 2 == manifest["outputs"]["text_document.bin"]["bytes"]  # uint16


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
@example(text=" \u2581\t\t   \r\n\n x  ")
@example(text="\x00\ufeff\u2585\u2028</s><unk><0x41>\U0010ffff")
def test_any_text_round_trips(megatron_tokenizer, text):
    ids = megatron_tokenizer.tokenize(text)
    assert megatron_tokenizer.detokenize(ids) == text
    assert megatron_tokenizer.eod not in ids  # not even from a literal "</s>"


def test_round_trip_can_fail(corpus):
    """Negative control: SentencePiece's own defaults lose white space, so the tests above are no tautology."""
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = (corpus / "sub" / "ast.py").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=600, model_type="bpe", minloglevel=2
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("a  b", "a\tb\n", "\u2581", "\x00"):
        assert tokenizer.decode(tokenizer.encode(text)) != text


# --- documents -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("ab\u00e9\U0001f600\r\n\n\f\u2028"), max_size=200), limit=st.integers(1, 40)
)
@example(text="a" * 50 + "\n\n" + "b" * 50, limit=7)
@example(text="\n" * 9, limit=3)
def test_cutting_loses_nothing_and_keeps_lines_whole(text, limit):
    parts = list(sources.cut(text, limit))
    assert "".join(parts) == text and "" not in parts
    assert all(part.endswith("\n") for part in parts[:-1])
    for part in parts:
        assert len(part.encode()) <= limit or "\n" not in part[:-1]  # longer only where one line is
    for part, following in itertools.pairwise(parts):  # and as long as they may be
        line = following[: following.find("\n") + 1] or following
        assert len((part + line).encode()) > limit


def test_zero_does_not_cut():
    assert list(sources.cut("a\nb\n" * 999, 0)) == ["a\nb\n" * 999]


def test_one_large_file_becomes_many_documents(corpus, built, megatron_tokenizer, tmp_path):
    """From another working directory and with two spawned workers, too; output folders are created on the way."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    output = tmp_path / "new" / "folder" / "o"
    names = ["exact.txt", "b.jsonl", "sub/ast.py", "sub/tarfile.py"]
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "a line\n" * 999}))
    words = ["--input", *(corpus / name for name in names), tmp_path / "long.jsonl", "--output", "new/folder/o"]
    words += ["--tokenizer-model", built / "tokenizer.model", "--document-kib", 4, "--workers", 2]
    subprocess.run(command(*words), cwd=tmp_path, check=True, timeout=60)

    manifest = manifest_of(output)
    assert manifest["settings"]["document_kib"] == 4
    counts = [entry["documents"] for entry in manifest["inputs"]]
    assert counts[:2] == [1, 2] and counts[4] == 1 and min(counts[2:4]) > 90
    dataset = IndexedDataset(str(output / "text_document"))
    assert len(dataset) == len(dataset.document_indices) - 1 == sum(counts)
    documents = [megatron_tokenizer.detokenize(ids[:-1].tolist()) for ids in dataset]
    assert all(ids[-1] == megatron_tokenizer.eod for ids in dataset)
    for name, count in zip(names, counts, strict=False):
        of_file, documents = documents[:count], documents[count:]
        if not name.endswith(".jsonl"):
            assert "".join(of_file).encode() == (corpus / name).read_bytes()
            assert max(len(document.encode()) for document in of_file) <= 4096
    assert documents == ["a line\n" * 999]


# --- the same bytes, once --------------------------------------------------------------------------------------------


def test_workers_do_not_change_the_bytes(corpus, built, tmp_path):
    assert (
        tool.main(["--input", str(corpus), "--output", str(tmp_path / "o"), "--vocab-size", "600", "--workers", "3"])
        == 0
    )
    assert tree_sha256(tmp_path / "o") == tree_sha256(built)
    assert len(workers.plan_tasks(sources.list_sources([str(corpus)], sources.SUFFIXES))) >= 2  # else no order to keep


def test_given_tokenizer_is_copied_and_suffixes_chosen(corpus, built, tmp_path):
    model = built / "tokenizer.model"
    words = ["--input", corpus, corpus / "b.jsonl", "--tokenizer-model", model, "--suffix", ".TXT"]
    assert tool.main([*map(str, words), "--output", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "tokenizer.model").read_bytes() == model.read_bytes()
    names = [Path(entry["name"]).name for entry in manifest_of(tmp_path / "o")["inputs"]]
    assert names == ["exact.txt", "b.jsonl"]  # the order of the words


def test_second_call_does_nothing(corpus, built, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    request = ["--input", str(corpus), "--output", str(built), "--vocab-size", "600"]
    assert tool.main(request) == 0
    assert "already done" in capsys.readouterr().out
    os.utime(corpus / "exact.txt")  # another time, the same bytes: the hashes decide
    assert tool.main(request) == 0
    assert "already done" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--vocab-size", "601"], "vocab_size was 600, now 601"),
        (["--document-kib", "8"], "document_kib was 0, now 8"),
        (["--suffix", ".txt"], "its input .*b.jsonl, now"),
    ],
)
def test_another_request_is_refused(corpus, built, capsys, extra, expected):
    before = tree_sha256(built)
    request = ["--input", str(corpus), "--output", str(built), "--vocab-size", "600", *extra]
    assert tool.main(request) == 2
    error = capsys.readouterr().err
    assert re.search(expected, error) and "--overwrite" in error and error.count("\n") == 1
    assert tree_sha256(built) == before


def test_changed_input_damage_and_overwrite(tmp_path, built, capsys):
    source, output = tmp_path / "a.txt", tmp_path / "o"
    source.write_text("first text")
    request = ["--input", str(source), "--output", str(output), "--tokenizer-model", str(built / "tokenizer.model")]
    assert tool.main(request) == 0
    first = tree_sha256(output)
    source.write_text("other text")  # as long as the first
    os.utime(source, ns=(1, 1))
    assert tool.main(request) == 2
    assert "a.txt has other contents now" in capsys.readouterr().err
    assert tree_sha256(output) == first
    assert tool.main([*request, "--overwrite"]) == 0
    assert tree_sha256(output)["text_document.bin"] != first["text_document.bin"]
    (output / "text_document.bin").write_bytes(b"")
    assert tool.main(request) == 2
    assert "text_document.bin is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- bad input -------------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty.txt": (b"", "empty"),
    "blank.md": (b" \n\t\n", "empty"),
    "latin1.txt": (b"caf\xe9", "not UTF-8 (byte 0xe9 at offset 3)"),
    "empty.jsonl": (b"\n", "empty"),
    "broken.jsonl": (b'{"text": "fine"}\n\n{"text": \n', "line 3: not valid JSON"),
    "pretty.jsonl": (b'{\n "text": "x"\n}\n', "line 1: not valid JSON"),
    "key.jsonl": (b'{"body": "x"}\n{"body": "y"}\n', "line 1: no key 'text'; set --json-key (keys: 'body') (and 1"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: no text under key 'text'"),
    "list.jsonl": (b'["x"]\n', "line 1: a JSON list, not an object"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: a lone surrogate"),
    "nested.jsonl": (b"[" * 100_000, "line 1: not "),
    "void.jsonl": (b'{"text": "fine"}\n{"text": ""}\n', "line 2: empty"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "line 1: not UTF-8"),
}


@pytest.fixture
def bad_folder(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (content, _) in BAD_FILES.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "twin.txt").symlink_to("good.txt")
    os.mkfifo(folder / "pipe.txt")  # opening it would wait for ever
    (folder / "good.txt").write_text("good")
    return folder


EXPECTED = {name: reason for name, (_, reason) in BAD_FILES.items()} | {
    "dangling.txt": "cannot be read (No such file or directory)",
    "twin.txt": "the same file as",
    "pipe.txt": "cannot be read (not a regular file)",
}


def test_every_bad_file_gets_one_line_and_nothing_is_written(bad_folder):
    output = bad_folder.parent / "out"
    missing = bad_folder.parent / "missing.txt"
    result = run_command("--input", bad_folder, missing, "--output", output)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    for name, reason in (EXPECTED | {"missing.txt": "cannot be read (No such file"}).items():
        named = [line for line in lines if line.startswith("bad: ") and f"/{name}: {reason}" in line]
        assert len(named) == 1, (name, lines)
    assert len(lines) == len(EXPECTED) + 2  # good.txt is not among them; the last line is the refusal
    assert f"{len(EXPECTED) + 1} of {len(EXPECTED) + 2} input files are bad" in lines[-1] and "--skip-bad" in lines[-1]
    assert [path.name for path in bad_folder.parent.iterdir()] == ["in"]


def test_skip_bad_keeps_all_that_is_good(bad_folder, built, capsys):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    output = bad_folder.parent / "out"
    model = built / "tokenizer.model"
    request = ["--input", str(bad_folder), "--output", str(output), "--tokenizer-model", str(model)]
    assert tool.main([*request, "--skip-bad"]) == 0
    assert capsys.readouterr().err.count("skipped: ") == len(EXPECTED)
    entries = {Path(entry["name"]).name: entry for entry in manifest_of(output)["inputs"]}
    assert entries["broken.jsonl"]["documents"] == 1 and entries["broken.jsonl"]["skipped_lines"][0][0] == 3
    assert EXPECTED["latin1.txt"] in entries["latin1.txt"]["skipped"]
    assert sorted(name for name, e in entries.items() if not e["skipped"]) == ["broken.jsonl", "good.txt", "void.jsonl"]
    assert len(IndexedDataset(str(output / "text_document"))) == 3
    assert tool.main([*request, "--skip-bad"]) == 0  # the second call knows the bad files
    assert "already done" in capsys.readouterr().out
    assert tool.main(request) == 2  # and does not hide them from who did not agree to skip


def test_only_bad_files_fail_even_when_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    result = run_command("--input", tmp_path / "a.txt", "--output", tmp_path / "o", "--skip-bad")
    assert result.returncode == 2 and "all 1 input files are bad" in result.stderr
    assert not (tmp_path / "o").exists()


def test_file_that_changes_after_the_scan_is_refused(tmp_path, built, monkeypatch, capsys):
    source = tmp_path / "a.txt"
    source.write_text("before")
    scan = tool.scan

    def scan_then_change(*args):
        reports = scan(*args)
        source.write_text("after.")
        return reports

    monkeypatch.setattr(tool, "scan", scan_then_change)
    request = ["--input", str(source), "--output", str(tmp_path / "o")]
    assert tool.main([*request, "--tokenizer-model", str(built / "tokenizer.model")]) == 2
    assert "a.txt changed while it was read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--input {in} --output {in}/no/o", "in.txt is no folder; name a new folder"),
        ("--input {in} --output {in}", "it is a file; name a new folder"),
        ("--input {t} --output {t}/o", "contain each other"),
        ("--input {t}/full/x.txt --output {t}/full --overwrite", "contain each other"),
        ("--input {in} --output {t}/full --overwrite", "not a result of this tool"),
        ("--input {t}/full --output {t}/o --suffix .zip", "no file in it ends in .zip"),
        ("--input {in} --output {t}/o --suffix zip", "write .zip"),
        ("--input {in} --output {t}/o --tokenizer-model {in}", "not a SentencePiece model"),
        ("--input {in} --output {t}/o --tokenizer-model {t}/none", "cannot be read (No such file"),
        ("--input {in} --output {t}/o --tokenizer-model {in} --vocab-size 500", "--vocab-size 500 only matters"),
        ("--input {in} --output {t}/o --vocab-size 12", "argument --vocab-size: '12' is not a whole number from 300"),
        ("--input {in} --output {t}/o --document-kib x", "argument --document-kib: 'x' is not a whole number from 0"),
        ("--input {in} --output {t}/o --workers 0", "argument --workers: '0'"),
        ("--input {in} --output {t}/o --vocab-size 9000", "Vocabulary size too high (9000). Please set it to a value"),
        ("--output {t}/o", "required: --input"),
    ],
)
def test_bad_requests_are_refused_in_one_line(tmp_path, capsys, words, expected):
    source = tmp_path / "in.txt"
    source.write_text("a few words of text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    argv = words.replace("{in}", str(source)).replace("{t}", str(tmp_path)).split()
    try:
        code = tool.main(argv)
    except SystemExit as exc:  # argparse
        code = exc.code
    error = capsys.readouterr().err
    assert code == 2 and expected in error and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in.txt"]
    assert (tmp_path / "full" / "x.txt").read_text() == "mine"


# --- stopped runs ----------------------------------------------------------------------------------------------------


def start_until_partial(request: list[object], parent: Path) -> subprocess.Popen[str]:
    """Start the tool as its own process group and return once it is writing."""
    process = subprocess.Popen(
        command(*request), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(3000):
        if list(parent.glob(".o.partial-*/shard-*")):
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the tool never started to write")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_run_leaves_nothing_finished_and_can_be_repeated(corpus, built, tmp_path):
    request = ["--input", corpus, "--output", tmp_path / "o", "--tokenizer-model", built / "tokenizer.model"]
    process = start_until_partial(request, tmp_path)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()  # communicate() would wait for workers that survive
    assert not (tmp_path / "o").exists()
    assert list(tmp_path.glob(".o.partial-*"))  # it really was in the middle
    for _ in range(500):
        if not any(map(running, children)):
            break
        time.sleep(0.01)
    orphans = [pid for pid in children if running(pid)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans, "workers outlived the run"
    assert tool.main(list(map(str, request))) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert tree_sha256(tmp_path / "o")["text_document.bin"] == tree_sha256(built)["text_document.bin"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_cleans_up(corpus, built, tmp_path, number, code):
    request = ["--input", corpus, "--output", tmp_path / "o", "--tokenizer-model", built / "tokenizer.model"]
    process = start_until_partial(request, tmp_path)
    statuses = [Path(f"/proc/{child}/status").read_text() for child in children_of(process.pid)]
    masks = [int(re.search(r"SigBlk:\s*(\w+)|$", status)[1], 16) for status in statuses]
    assert sum(mask >> signal.SIGINT - 1 & 1 for mask in masks) >= 2  # workers print no traceback at Ctrl-C
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()  # Ctrl-C reaches the workers
    _, error = process.communicate(timeout=20)
    assert process.returncode == code
    assert error.splitlines() == [f"preprocess_data.py: error: stopped by {number.name}; {tmp_path}/o was not written"]
    assert list(tmp_path.iterdir()) == []


def test_folder_of_an_interrupted_overwrite_comes_back(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    output = tmp_path / "o"
    for kind, pid in (("replaced", dead.pid), ("partial", dead.pid), ("partial", os.getpid())):
        path = output_folder.beside(output, kind, pid)
        path.mkdir()
        (path / "content").write_text(kind)
    output_folder.remove_stale(output)
    assert (output / "content").read_text() == "replaced"
    assert [path.name.split(".")[2].split("-")[0] for path in tmp_path.glob(".o.*")] == ["partial"]  # ours is alive


# --- help and progress -----------------------------------------------------------------------------------------------


def test_help_teaches_and_imports_nothing_heavy():
    result = run_command("--help")
    assert result.returncode == 0
    for word in ("examples:", "--input stdlib", "--skip-bad", "--tokenizer-type SentencePieceTokenizer", "Exit codes"):
        assert word in result.stdout
    code = "import sys, preprocess_data; print({'torch', 'numpy', 'sentencepiece', 'rich'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=TOOL.parent, text=True) == "set()\n"


def test_terminal_gets_a_bar(tmp_path):
    (tmp_path / "a.txt").write_text("")
    parent, child = pty.openpty()
    process = subprocess.Popen(command("--input", tmp_path / "a.txt", "--output", tmp_path / "o"), stderr=child)
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other end was closed
            break
        seen += part
    os.close(parent)
    assert process.wait() == 2
    assert b"scan" in seen and b"100%" in seen and b"ETA" in seen


def test_stdlib_word_means_sources_without_tests():
    found = sources.list_sources(["stdlib"], sources.SUFFIXES)
    names = [source.name for source in found]
    assert "stdlib/argparse.py" in names and names == sorted(names)
    assert all(source.num_bytes > 0 and source.problem is None for source in found)
    assert not any(re.search("/(test|tests|site-packages|__pycache__)/", name) for name in names)
    assert len(names) > 300
