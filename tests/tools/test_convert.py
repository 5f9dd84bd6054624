"""tools/convert_checkpoint.py: nothing lost, nothing half-written, nothing overwritten, and little memory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from checkpoint_files import (
    TOOLS,
    Conversion,
    HFFolder,
    MegatronCheckpoint,
    Piece,
    Read,
    TensorInfo,
    assert_same,
    convert,
    engine,
    formats,
    made_tensors,
    read_all,
    write_hf,
    write_megatron,
)
from training import ROOT

sys.path.insert(0, str(TOOLS))
import convert_checkpoint as tool
from checkpoints import journal, plan
from checkpoints.running import verify
from checkpoints.tensors import CheckpointError


@pytest.fixture
def source(tmp_path) -> Path:
    return write_hf(tmp_path / "hf", made_tensors())


def run_python(program: str, *words: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own that can import the tools and the tests."""
    paths = os.pathsep.join([str(TOOLS), str(ROOT / "tests/support")])
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# --- the account -----------------------------------------------------------------------------------------------------


def a_piece(name: str, shape=(2, 3), read: str | None = None, row: int = 0) -> Piece:
    return Piece(name=name, info=TensorInfo(shape, torch.float32), reads=(Read(read or name),), row=row)


def an_account(pieces, *, source=("a", "b"), expected=("a", "b"), dropped=()) -> plan.Account:
    info = TensorInfo((2, 3), torch.float32)
    conversion = Conversion(
        pieces=tuple(pieces), expected=dict.fromkeys(expected, info), dropped=dict.fromkeys(dropped, "why")
    )
    return plan.account(conversion, dict.fromkeys(source, info))


def test_account_is_balanced():
    assert an_account([a_piece("a"), a_piece("b")]).balanced
    halves = [a_piece("b", (1, 3), row=1), a_piece("b", (1, 3), row=0)]
    assert an_account([a_piece("a"), *halves]).balanced
    assert an_account([a_piece("a")], expected="a", dropped="b").balanced


UNBALANCED = {
    "nothing takes b": (an_account([a_piece("a")], expected="a"), "unread", "b"),
    "b is not there": (an_account([a_piece("a"), a_piece("b")], source="a"), "absent", "b"),
    "nothing makes b": (an_account([a_piece("a", read="b"), a_piece("a")]), "missing", "b"),
    "half of b": (an_account([a_piece("a"), a_piece("b", (1, 3))]), "unexpected", "b"),
    "b twice": (an_account([a_piece("a"), a_piece("b"), a_piece("b")]), "unexpected", "b"),
    "b in another shape": (an_account([a_piece("a"), a_piece("b", (3, 2))]), "unexpected", "b"),
    "c is not wanted": (an_account([a_piece("a"), a_piece("b"), a_piece("c", read="a")]), "unexpected", "c"),
}


@pytest.mark.parametrize("case", UNBALANCED)
def test_account_is_not_balanced(case):
    found, fault, name = UNBALANCED[case]
    assert not found.balanced and name in getattr(found, fault)


def test_nothing_is_written_of_what_is_not_accounted_for(tmp_path, source):
    job = files.job(source, tmp_path / "new", "hf")
    pieces = job.conversion.pieces
    rest = [piece for piece in pieces if piece.name != "whole"]
    too_far = Piece(name="whole", info=TensorInfo((5,), torch.int64), reads=(Read("whole", 0, 9),))
    for changed, message in ((pieces[1:], "not every tensor is accounted for"), ((*rest, too_far), "has 5 rows")):
        conversion = Conversion(pieces=tuple(changed), expected=job.conversion.expected)
        with pytest.raises(CheckpointError, match=message):
            engine.run(changed_job(job, conversion=conversion))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def changed_job(job: engine.Job, **changes) -> engine.Job:
    names = ("source", "conversion", "writer", "target", "shard_bytes", "options", "verify")
    return engine.Job(**{name: getattr(job, name) for name in names} | changes)


@pytest.mark.parametrize("make", [lambda t: t[:1], lambda t: t.double(), lambda t: t[None]])
def test_a_tensor_that_comes_out_differently_is_refused(tmp_path, source, make):
    job = files.job(source, tmp_path / "new", "hf")
    first, *rest = job.conversion.pieces
    first = Piece(name=first.name, info=first.info, reads=first.reads, row=first.row, make=make)
    conversion = Conversion(pieces=(first, *rest), expected=job.conversion.expected)
    with pytest.raises(CheckpointError, match="came out as .* and should be"):
        engine.run(changed_job(job, conversion=conversion))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [300, 1 << 20])
def test_there_and_back_is_bit_equal(tmp_path, source, shard_bytes):
    convert(source, tmp_path / "megatron", "megatron", shard_bytes=shard_bytes, args=files.ARGS)
    convert(tmp_path / "megatron", tmp_path / "back", "hf", shard_bytes=shard_bytes)
    assert_same(read_all(HFFolder(tmp_path / "back")), made_tensors())
    assert list(tmp_path.glob(".*")) == []


def test_receipt_accounts_for_everything(tmp_path):
    source = write_megatron(tmp_path / "megatron", made_tensors())
    receipt = convert(source, tmp_path / "new", "hf", shard_bytes=600)
    assert receipt == json.loads((tmp_path / "new" / "conversion.json").read_text())
    num_parameters = sum(tensor.numel() for tensor in made_tensors().values())
    assert receipt["converted"] == {"tensors": len(made_tensors()), "parameters": num_parameters}
    assert receipt["target"]["parameters"] == num_parameters
    reasons = {entry["reason"]: entry["names"] for entry in receipt["dropped"]}
    assert len(reasons) == 2 and ["common_state/shard_0_1"] in reasons.values()
    listed = {entry["path"]: entry for entry in receipt["files"]}
    on_disk = {path.name for path in (tmp_path / "new").iterdir()} - {"conversion.json"}
    assert set(listed) == on_disk
    for name, entry in listed.items():
        assert entry["sha256"] == engine.file_sha256(tmp_path / "new" / name)
        assert entry["bytes"] == (tmp_path / "new" / name).stat().st_size
    assert {entry["name"] for entry in receipt["source"]["files"]} >= {".metadata", "metadata.json", "__0_0.distcp"}
    assert torch.__version__.startswith(receipt["versions"]["torch"]) and receipt["options"] == {"to": "hf"}


def test_numbers_that_are_not_finite_are_counted_and_kept(tmp_path):
    tensors = made_tensors()
    tensors["embedding.word_embeddings.weight"][3, 2:4] = float("nan")
    tensors["decoder.layers.1.mlp.router.weight"][0, 0] = float("inf")
    receipt = convert(write_hf(tmp_path / "hf", tensors), tmp_path / "new", "hf", shard_bytes=300)
    counts = {"embedding.word_embeddings.weight": 2, "decoder.layers.1.mlp.router.weight": 1}
    assert receipt["not_finite"] == counts
    again = read_all(HFFolder(tmp_path / "new"))
    assert again["embedding.word_embeddings.weight"].isnan().sum() == 2


def test_nothing_is_overwritten(tmp_path, source):
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        target = tmp_path / "new"
        make(target)
        with pytest.raises(CheckpointError, match="exists, and nothing is overwritten"):
            convert(source, target, "hf")
        target.rmdir() if target.is_dir() else target.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_noticed_before_work(tmp_path, source, monkeypatch):
    monkeypatch.setattr(journal, "missing_bytes", lambda folder, needed: needed - 1000)
    with pytest.raises(CheckpointError, match="has too little room: .* are missing"):
        convert(source, tmp_path / "new", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    monkeypatch.undo()
    assert journal.missing_bytes(tmp_path / "not" / "there", 1) == 0
    assert journal.missing_bytes(tmp_path, 1 << 60) > 0


# --- killed and continued --------------------------------------------------------------------------------------------


def killed(source: Path, target: Path, kind: str, die_at: int) -> None:
    """Convert in a process that kills itself when it makes piece ``die_at``."""
    pid = os.fork()
    if pid == 0:
        try:
            convert(source, target, kind, shard_bytes=300, die_at=die_at, args=files.ARGS)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the receipt, which has times, and .metadata, in whose pickle equal objects may be one or two."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in ("conversion.json", ".metadata")
    }


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_killed_conversion_leaves_nothing_that_loads_and_continues(tmp_path, source, kind, capsys):
    """Killed in the first file, between two files and in the last one, one after the other."""
    target = tmp_path / "new"
    pieces = files.job(source, target, kind, args=files.ARGS).conversion.pieces
    for die_at in (1, len(pieces) // 2, len(pieces) - 1):
        killed(source, target, kind, die_at)
        assert not target.exists()
        growing = tmp_path / ".new.partial" / "checkpoint"
        for folder in (target, growing, growing / "release"):
            with pytest.raises(CheckpointError):
                files.opened(folder)
    receipt = convert(source, target, kind, shard_bytes=300, args=files.ARGS)
    assert "continued: " in capsys.readouterr().out
    assert_same(read_all(files.opened(target)), made_tensors())
    assert list(tmp_path.glob(".*")) == []
    convert(source, tmp_path / "at once", kind, shard_bytes=300, args=files.ARGS)
    assert contents(target) == contents(tmp_path / "at once")
    assert len(receipt["files"]) == len(contents(target)) + (kind == "megatron")


def test_a_damaged_part_is_written_again(tmp_path, source, capsys):
    killed(source, tmp_path / "new", "hf", 8)
    growing = tmp_path / ".new.partial" / "checkpoint"
    os.truncate(next(iter(sorted(growing.iterdir()))), 10)
    convert(source, tmp_path / "new", "hf", shard_bytes=300, args=files.ARGS)
    assert_same(read_all(HFFolder(tmp_path / "new")), made_tensors())
    assert "continued: " in capsys.readouterr().out


def test_a_damaged_note_costs_its_part_and_no_more(tmp_path, source, capsys):
    """As a power cut leaves files whose bytes were on their way."""
    killed(source, tmp_path / "new", "hf", 8)
    partial = tmp_path / ".new.partial"
    os.truncate(partial / "part-00000.json", 0)
    others = {path: path.stat().st_mtime_ns for path in (partial / "checkpoint").iterdir() if "00001" not in path.name}
    assert others
    written = []
    write_part = journal.Journal.write_part

    def counted(self, number, *args):
        written.append(number)
        return write_part(self, number, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "write_part", counted)
        convert(source, tmp_path / "new", "hf", shard_bytes=300, args=files.ARGS)
    assert written[0] == 0 and written[1] == 1 + len(others)
    assert_same(read_all(HFFolder(tmp_path / "new")), made_tensors())


def test_a_damaged_plan_does_not_continue(tmp_path, source):
    killed(source, tmp_path / "new", "hf", 8)
    os.truncate(tmp_path / ".new.partial" / "plan.json", 0)
    with pytest.raises(CheckpointError, match=r"or remove it and begin anew: rm -r .*\.new\.partial"):
        convert(source, tmp_path / "new", "hf", shard_bytes=300)


def test_another_request_does_not_continue(tmp_path, source):
    killed(source, tmp_path / "new", "hf", 8)
    partial = tmp_path / ".new.partial"
    before = sorted(path.name for path in partial.rglob("*"))
    with pytest.raises(CheckpointError, match=r"differs in its options; .*: rm -r .*\.new\.partial"):
        convert(source, tmp_path / "new", "hf", shard_bytes=400)
    (source / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match="differs in its source"):
        convert(source, tmp_path / "new", "hf", shard_bytes=300)
    assert sorted(path.name for path in partial.rglob("*")) == before


def test_killed_when_all_was_done(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "remove", lambda self: None)
        convert(source, tmp_path / "new", "hf")
    assert (tmp_path / ".new.partial").exists()
    assert_same(read_all(HFFolder(tmp_path / "new")), made_tensors())
    with pytest.raises(CheckpointError, match="exists, and nothing is overwritten"):
        convert(source, tmp_path / "new", "hf")
    assert not (tmp_path / ".new.partial").exists()


def test_one_process_at_a_time(tmp_path, source):
    with (
        journal.opened(tmp_path / "new", {"source": 1}),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        convert(source, tmp_path / "new", "hf")
    assert (tmp_path / ".new.partial" / "plan.json").exists()


def test_without_locks_nothing_is_begun(tmp_path, source, monkeypatch):
    """As on Lustre without -o flock."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(journal.fcntl, "flock", no_locks)
    with pytest.raises(CheckpointError, match=r"has no locks \(Function not implemented\).* -o flock"):
        convert(source, tmp_path / "new", "hf")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, source):
    job = files.job(source, tmp_path / "new", "hf")

    def touch(tensor):
        (source / "config.json").write_text("{}")
        return tensor

    *rest, last = job.conversion.pieces
    last = Piece(name=last.name, info=last.info, reads=last.reads, row=last.row, make=touch)
    conversion = Conversion(pieces=(*rest, last), expected=job.conversion.expected)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        engine.run(changed_job(job, conversion=conversion))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, checkpoint_files as files
from pathlib import Path
folder, shard_bytes, mapping = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
files.convert(files.write_hf(folder / "tiny", files.made_tensors()), folder / "warm", "megatron")
before = files.peak_memory_kib()
for number, (source, kind) in enumerate((("zeros", "megatron"), ("0", "hf"))):
    job = files.job(folder / source, folder / str(number), kind, shard_bytes=shard_bytes, args=files.ARGS)
    if mapping == "joined":
        made = files.joined(job.source)
        job = files.engine.Job(
            source=job.source, conversion=made.conversion, writer=files.formats.writer(kind, made),
            target=job.target, shard_bytes=shard_bytes, options={},
        )
    files.engine.run(job)
    if mapping == "joined":
        break
print(before, files.peak_memory_kib())
"""


def measured_mib(folder: Path, shard_bytes: int, mapping: str) -> tuple[float, float]:
    """Peak memory before and after a conversion there and back, in MiB."""
    done = run_python(MEASURE, folder, shard_bytes, mapping, timeout_s=1800)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split()[-2:])
    return before / 1024, after / 1024


@pytest.mark.full
def test_memory_depends_on_pieces_alone(tmp_path):
    """128 MiB in tensors of 4 MiB and files of 8 MiB; negative control: a mapping that needs all at once."""
    files.sparse_hf(tmp_path / "zeros", 32, 1 << 22)
    before, after = measured_mib(tmp_path, 1 << 23, "identity")
    assert after - before < 48
    (tmp_path / "again").mkdir()
    (tmp_path / "zeros").rename(tmp_path / "again" / "zeros")
    before, after = measured_mib(tmp_path / "again", 1 << 23, "joined")
    assert after - before > 128


@pytest.mark.full
def test_memory_of_a_large_checkpoint(tmp_path):
    """At most twice the largest file and 1 GB, libraries included, of a checkpoint five times that size."""
    shard_bytes, tensor_bytes = 1 << 26, 1 << 25
    limit = 2 * shard_bytes + 10**9
    num_tensors = 5 * limit // tensor_bytes + 1
    files.sparse_hf(tmp_path / "zeros", num_tensors, tensor_bytes)
    _, after = measured_mib(tmp_path, shard_bytes, "identity")
    assert after * 2**20 <= limit


# --- the command -----------------------------------------------------------------------------------------------------


def to_megatron(source) -> formats.Target:
    return files.identity(source, args=files.ARGS)


def from_megatron(source) -> formats.Target:
    return files.identity(source)


@pytest.fixture
def mapped(monkeypatch):
    """Mappings that change nothing, under the names of real ones."""
    monkeypatch.setitem(formats.PAIRS, ("hf-scmoe", "megatron"), (__name__, "to_megatron"))
    monkeypatch.setitem(formats.PAIRS, ("megatron", "hf-scmoe"), (__name__, "from_megatron"))


def call(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code and output of a call in this process."""
    try:
        code = tool.main(list(map(str, words)))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


TO = ("--from", "hf-scmoe", "--to", "megatron")
BACK = ("--from", "megatron", "--to", "hf-scmoe")


def test_command_there_and_back(tmp_path, source, mapped, capsys):
    code, out, err = call(capsys, *TO, "--load", source, "--save", tmp_path / "megatron", "--shard-size", "300B")
    assert code == 0, err
    num_tensors = len(made_tensors())
    assert f"converted {num_tensors:>10}" in out and f"done: {tmp_path / 'megatron'}: " in out
    code, out, err = call(capsys, *BACK, "--load", tmp_path / "megatron", "--save", tmp_path / "back")
    assert code == 0 and "state of Transformer Engine's FP8 modules" in out, err
    assert_same(read_all(HFFolder(tmp_path / "back")), made_tensors())
    assert json.loads((tmp_path / "back" / "conversion.json").read_text())["options"]["from"] == "megatron"


def test_dry_run_writes_nothing_and_names_all(tmp_path, source, mapped, monkeypatch, capsys):
    words = (*TO, "--load", source, "--save", tmp_path / "new", "--dry-run", "--shard-size", "300")
    code, out, _ = call(capsys, *words)
    assert code == 0 and "dry run: " in out and "converted" in out

    def lossy(source) -> formats.Target:
        made = files.identity(source, args=files.ARGS)
        pieces = tuple(piece for piece in made.conversion.pieces if piece.name not in ("number", "whole"))
        conversion = Conversion(pieces=pieces, expected=made.conversion.expected)
        return formats.Target(conversion=conversion, args=made.args, files={})

    monkeypatch.setattr(sys.modules[__name__], "to_megatron", lossy)
    code, out, err = call(capsys, *words)
    assert code == 2 and "not every tensor is accounted for" in err
    assert set(out.split("\n")) >= {"unread: number", "unread: whole", "missing: number", "missing: whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no Hugging Face folder"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 900), "cut short"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_command_refuses_bad_sources_in_one_line(tmp_path, source, mapped, capsys, damage):
    do, message = DAMAGE[damage]
    do(source)
    code, out, err = call(capsys, *TO, "--load", source, "--save", tmp_path / "new")
    assert code == 2 and not out
    assert err.startswith("convert_checkpoint.py: error: ") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


REFUSED = {
    "two steps": (("--from", "hf-longcat", "--to", "hf-scmoe"), "take two steps: --from hf-longcat --to megatron"),
    "the same": (("--from", "hf-scmoe", "--to", "hf-scmoe"), "nothing needs to be done"),
    "no change": (("--from", "megatron", "--to", "megatron"), "add --experts N to upcycle or --transformer-impl"),
    "dense as it is": (("--from", "hf-dense", "--to", "megatron"), "add --experts N to upcycle"),
    "upcycling what is upcycled": ((*TO, "--experts", "4"), "--experts 4 asks for another; drop --experts 4, or"),
    "upcycling by other options": (
        (*TO, "--seed", "3", "--shortcut-combine", "add"),
        "drop --shortcut-combine add --seed 3, or upcycle first",
    ),
    "spec of others": ((*TO, "--transformer-impl", "local"), "in a step of its own"),
    "both at once": (
        ("--from", "megatron", "--to", "megatron", "--topk", "2", "--transformer-impl", "local"),
        "in a step of its own: it is local with --from megatron --to megatron --topk 2; drop it",
    ),
    "not its format": (("--from", "megatron", "--to", "hf-scmoe"), "seems to be hf-scmoe, and --from is megatron; use"),
    "size": ((*TO, "--shard-size", "5XB"), "'5XB' is not a size like 5GB or 512MiB"),
    "no size": ((*TO, "--shard-size", "0"), "'0' is not a size"),
    "share": ((*TO, "--drop-ratio", "1.5"), "'1.5' is not a number from 0 to 1"),
    "no number": ((*TO, "--verify-tolerance", "nan"), "'nan' is not a number from 0 to 1e+09"),
    "format": (("--from", "gguf", "--to", "megatron"), "invalid choice: 'gguf'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_command_refuses_bad_requests_in_one_line(tmp_path, source, mapped, capsys, case):
    words, message = REFUSED[case]
    (source / "empty").mkdir()  # of no format: a wrong one would be named first
    load = source if case == "not its format" else source / "empty"
    code, out, err = call(capsys, *words, "--load", load, "--save", tmp_path / "new")
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_other_format_is_named(tmp_path, mapped, capsys):
    source = write_megatron(tmp_path / "megatron", made_tensors())
    code, _, err = call(capsys, *TO, "--load", source, "--save", tmp_path / "new")
    assert code == 2 and "seems to be megatron, and --from is hf-scmoe; use --from megatron" in err


def test_settings_of_another_model_are_refused_in_one_line(tmp_path, source, monkeypatch, capsys):
    def hungry(source) -> formats.Target:
        return source.config["num_layers"]

    monkeypatch.setitem(formats.PAIRS, ("hf-scmoe", "megatron"), (__name__, "to_megatron"))
    monkeypatch.setattr(sys.modules[__name__], "to_megatron", hungry)
    code, _, err = call(capsys, *TO, "--load", source, "--save", tmp_path / "new")
    assert code == 2 and "of which no hf-scmoe model can be made (KeyError: 'num_layers')" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("size, num_bytes", {"5GB": 5 * 10**9, "512MiB": 2**29, "7": 7, "3K": 3000}.items())
def test_sizes(size, num_bytes):
    assert tool.size(size) == num_bytes


def test_verify_decides_before_the_result_has_its_name(tmp_path, source, mapped, monkeypatch, capsys):
    calls = []

    def differing(source, source_format, target, target_format, *, tolerance, trust_remote_code):
        calls.append((source, source_format, target, target_format, tolerance, trust_remote_code))
        assert MegatronCheckpoint(target).infos and not (tmp_path / "new").exists()
        return {"passed": False, "largest_difference": 0.5}

    monkeypatch.setattr(verify, "verify", differing)
    words = (*TO, "--load", source, "--save", tmp_path / "new", "--verify", "--verify-tolerance", "0.25")
    code, _, err = call(capsys, *words)
    assert code == 1 and "logits differ by 0.5, --verify-tolerance is 0.25; what was written stays in" in err
    assert not (tmp_path / "new").exists()
    partial = tmp_path / ".new.partial" / "checkpoint"
    assert calls == [(source, "hf-scmoe", partial, "megatron", 0.25, False)]

    def failing(*args, **kwargs):
        raise CheckpointError("cannot verify, megatron does not run: out of memory")

    monkeypatch.setattr(verify, "verify", failing)
    code, _, err = call(capsys, *words)
    assert code == 1 and "out of memory; what was written stays in" in err and partial.exists()
    monkeypatch.setattr(verify, "verify", lambda *a, **k: {"passed": True, "largest_difference": 1e-6})
    code, out, _ = call(capsys, *words)
    assert code == 0 and "continued: 1 of 1 files" in out and "verified: logits differ by 1e-06 at most" in out
    receipt = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert receipt["verified"]["largest_difference"] == 1e-6


@pytest.mark.alone
def test_help_teaches_and_is_fast():
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(TOOLS / "convert_checkpoint.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start_s < 2  # torch alone takes longer
    for source, target in formats.PAIRS:
        assert f"--from {source} --to {target}" in done.stdout


def test_signals_stop_it_and_it_continues(tmp_path, source, mapped, monkeypatch, capsys):
    write_part = formats.HFWriter.write_part

    def interrupted(self, sink, pieces, tensors):
        os.kill(os.getpid(), signal.SIGTERM)
        return write_part(self, sink, pieces, tensors)

    megatron = write_megatron(tmp_path / "megatron", made_tensors())
    words = (*BACK, "--load", megatron, "--save", tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr(formats.HFWriter, "write_part", interrupted)
        code, _, err = call(capsys, *words)
    assert code == 143 and "stopped by SIGTERM; the same call continues" in err
    assert not (tmp_path / "new").exists()
    assert call(capsys, *words)[0] == 0
