"""`make test-gpu` without a GPU: its parts run with stand-ins, its runner judges, and documents say what it found."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import run_parts as gpu_run
import torch
from checks import Checks
from test_repository import load
from training import ROOT, train

PARTS = [part.name for part in gpu_run.PARTS if part.dry and part.name != "pretrain"]


def dry(name: str, path: str) -> dict:
    """What a part finds, in a process that has done the slow imports."""
    checks = Checks(path)
    importlib.import_module(f"parts.{name}").part(checks)
    return checks.found


@pytest.mark.parametrize("name", PARTS)
def test_parts_pass_on_the_cpu_and_notice_their_mutants(tmp_path, name):
    (found,) = ranks.run(dry, 1, name, str(tmp_path / "result.json"), distributed=False)
    assert {check: outcome for check, outcome in found["checks"].items() if outcome != "passed"} == {}
    assert len([check for check in found["checks"] if check.startswith("mutant: ")]) >= 2
    assert len(found["checks"]) >= 8


def test_trainings_agree(tmp_path):
    """The part that trains, with ranks of the pool in the place of processes of their own."""
    from parts import pretrain
    from trainings import Trained, parsed

    def on_pool(flags: list[str], _folder: Path, _cuda: bool) -> Trained:
        return parsed(ranks.run(train, 2, [*flags, "--distributed-backend", "gloo"]))

    checks = Checks(str(tmp_path / "result.json"))
    pretrain.compare(checks, tmp_path, on_pool)
    assert len(checks.found["checks"]) == 3 and set(checks.found["checks"].values()) == {"passed"}
    assert checks.found["not_run"] == {"recompilations": "on the CPU nothing is compiled"}


def test_recompilations_are_counted():
    from trainings import parsed

    text = """V1 torch/_dynamo/guards.py:1] [0/1] [__recompiles] Recompiling function weighted_bias_swiglu in a.py:1
 W1 torch/_dynamo/convert_frame.py:9] [0/8] torch._dynamo hit config.recompile_limit (8)
 iteration        2/       4 | lm loss: 4.1E+00 | loss scale: 1.0 | grad norm: 0.5 |"""
    trained = parsed([text, text.replace("2/", "3/")])
    assert trained.losses == {2: 4.1, 3: 4.1} and trained.grad_norms == {2: 0.5, 3: 0.5}
    assert trained.recompiled == ("weighted_bias_swiglu",) * 2 and trained.gave_up == 2


# ---- the runner


def part_of(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, limit_s: float = 60) -> dict:
    """The result of a part with this code."""
    package = folder / "parts"
    package.mkdir()
    (package / "made.py").write_text(f"import sys, checks\n{body}\n")
    monkeypatch.setattr(gpu_run, "HERE", folder)
    (folder / "checks.py").write_text((ROOT / "tests" / "gpu" / "checks.py").read_text())
    return gpu_run.run_part(gpu_run.Part("made", limit_s, "nothing", dry=True), limit_s)


CHECKED = "def part(found):\n    found.holds('one', lambda: None)\n    {}\nchecks.run_part(part)"


def test_a_part_passes(tmp_path, monkeypatch):
    result = part_of(tmp_path, monkeypatch, CHECKED.format("found.must_fail('m', lambda: exec('assert 0'))"))
    assert result["status"] == "passed" and result["checks"] == {"one": "passed", "mutant: m": "passed"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (CHECKED.format("found.must_fail('m', lambda: None)"), "failed: mutant: m"),
        (CHECKED.format("found.must_fail('m', lambda: 1 / 0)"), "failed: mutant: m"),
        (CHECKED.format("found.holds('two', lambda: exec('assert 0'))"), "failed: two"),
        (CHECKED.format("sys.exit(0)"), "ended with code 0"),
        (CHECKED.format("1 / 0"), "ended with code 1"),
        ("checks.run_part(lambda found: None)", "has checked nothing"),
        ("pass", "ended with code 0"),
    ],
)
def test_what_is_no_pass(tmp_path, monkeypatch, body, reason):
    result = part_of(tmp_path, monkeypatch, body)
    assert (result["status"], result["reason"]) == ("failed", reason)


def test_what_cannot_run_is_no_pass(tmp_path, monkeypatch):
    result = part_of(tmp_path, monkeypatch, "checks.run_part(lambda found: found.not_run('one', 'no such device'))")
    assert (result["status"], result["reason"]) == ("not run", "no such device")


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    alive = tmp_path / "child"
    body = CHECKED.format(
        f"import subprocess, time; c = subprocess.Popen(['sleep', '300']); open({str(alive)!r}, 'w').write(str(c.pid));"
        " time.sleep(300)"
    )
    result = part_of(tmp_path, monkeypatch, body, limit_s=10)
    assert result["status"] == "failed" and result["reason"] == "took more than 10 s"
    assert result["checks"] == {"one": "passed"}  # what it had found by then
    deadline = time.monotonic() + 5
    while Path(f"/proc/{alive.read_text()}/cmdline").exists() and time.monotonic() < deadline:
        if "sleep" not in Path(f"/proc/{alive.read_text()}/cmdline").read_text():
            break  # a zombie that nobody has reaped yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{alive.read_text()}/cmdline").exists()


def test_it_says_that_it_is_a_dry_run_and_writes_nothing(tmp_path):
    """As a user calls it, with the parts that take no time here."""
    before = gpu_run.RESULTS.exists()
    done = subprocess.run(
        [sys.executable, "tests/gpu/run_parts.py", "--only", "work_nccl,nccl_ranks"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr  # nothing ran: no evidence
    assert "a DRY RUN" in done.stdout and "proves nothing about GPUs" in done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["part"], line["status"]) for line in lines] == [("work_nccl", "not run"), ("nccl_ranks", "not run")]
    assert gpu_run.RESULTS.exists() == before


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_run.main(["--only", "late_wire,early_wire"])
    assert "there is no part early_wire" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "text"])
def test_a_limit_that_is_no_time_is_refused(capsys, text):
    with pytest.raises(SystemExit):
        gpu_run.main(["--only", "nccl_ranks", "--limit-s", text])
    assert "argument --limit-s: " in capsys.readouterr().err


@pytest.mark.parametrize(("limit_s", "code"), [("60", 0), ("4", 1)])
def test_a_part_for_which_no_time_was_left_has_not_passed(monkeypatch, capsys, limit_s, code):
    """Though it has not failed: parts in front of it that passed are not all that could run."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    passed = {"status": "passed", "on": "CPU"}
    monkeypatch.setattr(gpu_run, "run_part", lambda part, _limit_s: {"part": part.name, **passed})
    assert gpu_run.main(["--only", "late_wire,work_nccl", "--limit-s", limit_s]) == code
    assert (gpu_run.TOO_LATE in capsys.readouterr().out) == bool(code)


def test_limits_fit_into_the_budget():
    assert sum(part.limit_s for part in gpu_run.PARTS) <= gpu_run.BUDGET_S


# ---- what documents say of it

documents = load(ROOT / "docs" / "gpu_results.py")


def agrees(readme: str, document: str, results: dict | None) -> bool:
    """Whether README and docs/gpu.md are those of the results."""
    return readme == documents.readme(readme, results) and document == documents.document(results)


def test_documents_say_what_the_results_say():
    assert agrees(documents.README.read_text(), documents.DOCUMENT.read_text(), documents.found()), "run make docs"


RESULTS = {
    "device": "NVIDIA H200",
    "devices": 1,
    "versions": {"torch": "2.13.0"},
    "date": "2026-12-01",
    "commit": "0123456789abcdef",
    "parts": [
        {
            "part": "late_wire",
            "status": "passed",
            "checks": {"one": "passed", "mutant: m": "passed"},
            "figures": {"f": 1},
        },
        {"part": "kernels", "status": "failed", "reason": "failed: two", "checks": {"two": "AssertionError"}},
        {"part": "nccl_ranks", "status": "not run", "reason": "one GPU"},
    ],
}


def test_other_results_are_noticed_in_the_documents():
    """Negative control of the test above, and what a GPU's results would look like."""
    readme, document = documents.README.read_text(), documents.DOCUMENT.read_text()
    assert not agrees(readme, document, RESULTS)
    said = documents.readme(readme, RESULTS)
    assert "Nothing here has run on a GPU" not in said
    assert "passed: `late_wire`; failed: `kernels`; not run: `nccl_ranks`" in " ".join(said.split())
    table = documents.document(RESULTS)
    assert "| passed | 1 of 1 | 1 of 1 |" in table and "| failed: failed: two | 0 of 1 | 0 of 0 |" in table
    assert "1 x NVIDIA H200, 2026-12-01" in table and "commit 0123456789abcdef." in table
    assert agrees(said, table, RESULTS) and not agrees(said, table, documents.found())


def test_results_of_one_commit_are_put_together(tmp_path, monkeypatch):
    """Those of another one, or of changed files, are not."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _index: "NVIDIA H200")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(gpu_run, "nccl_version", lambda: (2, 28))
    path = tmp_path / "gpu.json"

    def kept(part: str, commit: str) -> list[str]:
        gpu_run.keep([{"part": part, "status": "passed", "log": "long"}], path, commit)
        found = json.loads(path.read_text())
        assert "log" not in found["parts"][0] and found["commit"] == commit
        return [result["part"] for result in found["parts"]]

    assert kept("kernels", "abc") == ["kernels"]
    assert kept("late_wire", "abc") == ["late_wire", "kernels"]  # in the order of their worth
    assert kept("kernels", "abd") == ["kernels"]
    for changed in ("abd, with changes", "unknown"):
        assert kept("kernels", changed) == ["kernels"]
        assert kept("late_wire", changed) == ["late_wire"]


def test_lanes_of_a_trace():
    """Two transfers of 10 us, one of them beside a kernel for 6: 0.3 hidden; 5 us idle."""
    import overlap_steps

    def event(name: str, stream: int, begin: float, duration: float) -> dict:
        return {"name": name, "args": {"stream": stream}, "ts": begin, "dur": duration}

    for transfer in ("spin_kernel", "paced_copy"):
        events = [event("gemm", 7, 0, 10), event(transfer, 20, 4, 8), event("copy", 20, 12, 2)]
        events += [event("gemm", 7, 19, 1), event(transfer, 20, 20, 10), event("gemm", 7, 30, 2)]
        found = overlap_steps.lanes(events)
        assert found["hidden_share"] == pytest.approx(0.3) and found["idle_ms"] == pytest.approx(0.005)
        assert found["kernels"] == 3
    with pytest.raises(AssertionError, match="transfers on streams"):
        overlap_steps.lanes([event("gemm", 7, 0, 10)])


def test_what_the_host_takes_for_a_group():
    """5 us and 3 us in the forwards of two groups, the waits in them apart; what lies between two passes is of none."""
    import overlap_steps

    from megatron_scmoe.overlap.recording import Mark

    def mark(name: str, host_us: float, group: int = 0, backward: bool = False) -> Mark:
        return Mark(name, 0, None, group, backward, 0.0, host_us * 1e-6)

    marks = [mark("begin", 0), mark("wait", 2), mark("MLP", 12), mark("end", 15)]
    marks += [mark("begin", 20, 1), mark("wait", 21, 1), mark("MLP", 23, 1), mark("end", 25, 1)]
    marks += [mark("begin", 30, 1, True), mark("end", 36, 1, True)]
    marks += [mark("begin", 40, 0, True), mark("end", 48, 0, True)]
    found = overlap_steps.host_us(SimpleNamespace(marks=marks))
    expected = {"host_forward_us": 4.0, "host_backward_us": 7.0, "host_waits_us": 6.0}
    assert found == pytest.approx(expected)


def test_transfers_that_keep_no_pace_are_noticed():
    from parts import overlap

    overlap.transfers_last({"transfers_ms": 3.7, "transfers_asked_ms": 3.6})
    for numbers in ({"transfers_ms": 3.7, "transfers_asked_ms": 1.8}, {"transfers_ms": 1.8, "transfers_asked_ms": 3.6}):
        with pytest.raises(AssertionError, match="transfers last"):
            overlap.transfers_last(numbers)


def test_a_setting_that_ended_early_leaves_its_figures(tmp_path):
    """And no traceback for what it had not found yet."""
    from parts import overlap

    checks = Checks(str(tmp_path / "result.json"))
    found = {"steps": {"off, 450 us": {"step_ms": 1.0}}, "orders": {"off": ([], [])}, "costs": {}}
    overlap.judge(checks, "here", found)
    assert checks.found["figures"] == {"here: steps of off, 450 us": {"step_ms": 1.0}}
    assert checks.found["checks"] == {"here: off runs in its order": "passed"}


def test_a_payload_takes_its_part_of_the_time(monkeypatch):
    """On a link: half of the bytes take half of the time; and what is large is carried by multiprocessors."""
    import paced
    import wire

    carried: list[tuple[int, float]] = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: carried.append((0, cycles / 1e9)))
    monkeypatch.setattr(paced, "copy", lambda _output, _input, seconds, ctas: carried.append((ctas, seconds)))
    line = wire.Wire(1e-3, full_bytes=4 << 20, ctas=8)
    line._cycles_per_s = 1e9
    for rows in (1 << 18, 1 << 17, 1 << 10):
        payload = torch.zeros(rows, 4)
        line.carry(torch.empty_like(payload), payload)
    assert carried == [(8, 1e-3), (8, 0.5e-3), (0, pytest.approx(1e-3 / 256, rel=1e-3))]
    assert line.asked_s == pytest.approx(sum(seconds for _, seconds in carried), rel=1e-3)


def test_the_paced_copy_is_a_kernel():
    """NVRTC makes one for an H100 of it, where torch brings it; and none of other words."""
    import paced
    from torch.cuda._utils import _nvrtc_compile

    code, name = _nvrtc_compile(paced.SOURCE, paced.KERNEL, "90")
    assert name == paced.KERNEL and len(code) > 1000
    with pytest.raises(RuntimeError):
        _nvrtc_compile(paced.SOURCE.replace("int4*", "int5*"), paced.KERNEL, "90")


def test_ranks_compute_the_same_twice(tmp_path, monkeypatch):
    """Each rank of a training has cuBLAS in a deterministic form."""
    import trainings

    started: list[dict[str, str]] = []

    class Ended:
        def __init__(self, _command: list[str], *, env: dict[str, str], **_options: object) -> None:
            started.append(env)

        def poll(self) -> int:
            return 0

        kill = wait = poll

    monkeypatch.setattr(trainings.subprocess, "Popen", Ended)
    trainings.train([], 2, backend="nccl", folder=tmp_path, limit_s=9)
    assert [env["CUBLAS_WORKSPACE_CONFIG"] for env in started] == [":4096:8"] * 2
    assert [env["LOCAL_RANK"] for env in started] == ["0", "1"]
