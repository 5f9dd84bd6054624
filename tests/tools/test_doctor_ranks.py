"""tools/doctor.py on several ranks: right ones, ones that are made wrong, ones that end, and a slow link."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from training import SCMOE, with_flags

TOOL = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"
sys.path.insert(0, str(TOOL.parent))
from command_line import UserError  # noqa: E402
from slow_network.network import SlowNetwork  # noqa: E402

COMMUNICATING = ("clocks", "groups", "network", "step")

Found = dict[str, list[tuple[str, str]]]
"""Of each check the status and words of its findings."""


def examined(names: tuple[str, ...], wrong: Callable[[], None] | None = None, **sizes: int) -> Found:
    """What checks find on these ranks, after ``wrong`` was called on each; ``sizes`` are those of a layout."""
    from doctoring.examination import Examination
    from doctoring.job import Job, Layout, layout_of
    from doctoring.rank import CHECKS
    from doctoring.watch import Watch

    from megatron_scmoe.job.beats import Pulse
    from megatron_scmoe.job.meeting import Meeting

    place = Namespace(rank=dist.get_rank(), world_size=dist.get_world_size(), distributed_timeout_minutes=1)
    layout = Layout(**sizes) if sizes else layout_of(None, dist.get_world_size())
    job = Job(Meeting(place), None, layout, network_s=2.0, free_bytes=1)
    if wrong is not None:
        wrong()
    examination = Examination(job, [one for one in CHECKS if one.name in names], 60.0)
    store = job.meeting.store.clone()

    def report(why: str) -> None:
        for one in examination.cut_short(why, store):
            print(one.name, [finding.in_words() for finding in one.findings], file=sys.__stdout__, flush=True)

    pulse = Pulse(store, job.rank)

    def look() -> str:
        pulse.say(0, "examination")
        return examination.lost_hope(store) if job.rank == 0 else ""

    with Watch(report, look, job.rank) as watch:
        examination.run(watch)
    return {one.name: [(str(f.status), f.in_words()) for f in one.findings] for one in examination.outcomes}


def problems(found: Found) -> list[str]:
    return [words for findings in found.values() for status, words in findings if status == "problem"]


@pytest.fixture(scope="module")
def right() -> Found:
    return ranks.run(examined, 4, COMMUNICATING, alike)[0]


def test_right_ranks_have_no_problem(right):
    assert problems(right) == [] and tuple(right) == COMMUNICATING
    words = {name: " | ".join(words for _, words in findings) for name, findings in right.items()}
    assert "wall clocks are within 0." in words["clocks"]
    assert "groups of 4 ranks (expert 4) have met" in words["groups"]
    assert "6 links within a host" in words["network"]
    assert "ep all-to-all: 1 x 4 ranks" in words["network"] and "ep all-reduce" in words["network"]
    assert "on every rank; groups of 4 replicas agree before they are reduced" in words["step"]


def test_what_there_is_no_gpu_for_is_not_tried(right):
    untried = [words for findings in right.values() for status, words in findings if status == "not tried"]
    assert untried == ["GPU clocks: no GPU here", "NCCL: no GPU here; what was timed is gloo"]


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"context_parallel_size": 2},
    ],
)
def test_every_layout_has_its_groups_and_its_step(layout):
    found = ranks.run(examined, 4, ("groups", "step"), **layout)[0]
    assert problems(found) == []
    (_, words), *_ = found["groups"]
    assert all(f"{name.split('_')[0]} {size}" in words for name, size in layout.items())


def on_rank(rank: int, change: Callable[[], None]) -> None:
    if dist.get_rank() == rank:
        change()


def alike() -> None:
    """Every exchange takes 10 ms more: a network that this machine's load is small beside."""
    _delay(lambda _other: False)


def slow_rank() -> None:
    """Those of rank 2 take 60 ms more."""
    _delay(lambda other: 2 in (dist.get_rank(), other))


def slow_link() -> None:
    """Those of ranks 0 and 3 with one another do."""
    _delay(lambda other: {dist.get_rank(), other} == {0, 3})


def _delay(is_slow: Callable[[int], bool]) -> None:
    exchange = dist.batch_isend_irecv

    def delayed(operations: list[Any]) -> list[dist.Work]:
        time.sleep(0.06 if is_slow(operations[0].peer) else 0.01)
        return exchange(operations)

    dist.batch_isend_irecv = delayed


def interleaved() -> None:
    """The flags have two virtual stages on each, as Core remembers when it makes their groups."""
    from megatron.core import parallel_state

    make = parallel_state.initialize_model_parallel
    parallel_state.initialize_model_parallel = partial(make, virtual_pipeline_model_parallel_size=2)


def test_a_layout_with_virtual_stages_has_its_step():
    found = ranks.run(examined, 2, ("step",), interleaved, pipeline_model_parallel_size=2)[0]
    assert problems(found) == [] and "on every rank" in found["step"][0][1]


def wrong_clock() -> None:
    now = time.time
    on_rank(1, lambda: setattr(time, "time", lambda: now() + 100.0))


def wrong_arithmetic() -> None:
    """Rank 3 multiplies a little wrong."""
    product = torch.matmul
    on_rank(3, lambda: setattr(torch, "matmul", lambda *args, **options: product(*args, **options) * 1.001))


def fails() -> None:
    """Rank 1 has no memory left, while rank 0 waits for it."""
    from doctoring import examination

    examination.PATIENCE_S = 0.5

    def barrier(*_args: object, **_options: object) -> None:
        raise MemoryError("no memory for a communicator")

    on_rank(1, lambda: setattr(dist, "barrier", barrier))


@pytest.mark.parametrize(
    ("wrong", "check", "words"),
    [
        (slow_rank, "network", ["rank 2 (", "most links within a host are slow", "ethtool"]),
        (slow_link, "network", ["the link within a host from rank 0 (", "to rank 3 (", "ethtool"]),
        (wrong_clock, "clocks", ["rank 1 on ", "the clock is 100.0 s ahead of the others", "chrony"]),
        (wrong_arithmetic, "step", ["rank 3 on ", "computed a gradient norm of", "leave that machine out"]),
    ],
)
def test_what_is_wrong_on_a_rank_is_named(wrong, check, words):
    found = ranks.run(examined, 4, (check,), wrong)[0]
    (line,) = problems(found)
    assert all(word in line for word in words), line


def test_a_rank_that_fails_ends_the_others_which_wait_for_it():
    with pytest.raises(ranks.RankError) as error:
        ranks.run(examined, 2, ("groups", "network", "step"), fails)
    for line in (
        "groups ['rank 1: MemoryError: no memory for a communicator; see ",
        "step ['check groups was not over']",
    ):
        assert line in str(error.value), error.value


def late() -> None:
    """All-to-alls take 5 ms more, one behind the other, as on a slow link."""
    from megatron_scmoe.cpu import gloo

    follow = gloo.Work.follow

    def late(work: Any, parts: list[Any]) -> None:
        time.sleep(0.005)
        follow(work, parts)

    gloo.Work.follow = late


def late_and_alone() -> None:
    """The host stands still while they travel, as with a variable that makes it wait."""
    late()
    exchange = dist.all_to_all_single

    def standing_still(*args: Any, **options: Any) -> Any:
        work = exchange(*args, **options)
        if work is not None:
            work.wait()
        return work

    dist.all_to_all_single = standing_still


@pytest.mark.alone
def test_overlap_that_is_not_there_is_named():
    (right, *_), (wrong, *_) = (
        ranks.run(examined, 2, ("overlap",), change)[0]["overlap"] for change in (late, late_and_alone)
    )
    assert right[0] == "ok" and " predicted" in right[1], right
    assert wrong[0] == "problem" and " 0% of " in wrong[1] and "see check environment" in wrong[1], wrong


# --- as a user calls it ----------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | more


ENDS = """
import os, signal, sys, time
sys.path.insert(0, {tools!r})
import doctor
from doctoring import rank, watch
watch.LATER_S = 1.0
if os.environ["RANK"] == "0":
    {moment} = lambda *_: time.sleep(2) or os.kill(os.getpid(), signal.{signal})  # all have met
sys.exit(doctor.main(["--only", "clocks", "--check-seconds", "5"]))
"""


IN_A_CHECK, BEHIND_THE_LAST = "rank.Clocks.look", "rank.print_report"
FROZEN = "not over after 5 s; rank 0 has not ended it: see whether it is stopped"
GONE = r"(check clocks: |between checks, or after them: )?the job's store is gone, with the first node: "


@pytest.mark.parametrize(
    ("moment", "number", "line"),
    [
        (IN_A_CHECK, "SIGSTOP", f"check clocks: {FROZEN}"),
        (IN_A_CHECK, "SIGKILL", GONE),
        (BEHIND_THE_LAST, "SIGSTOP", f"between checks, or after them: {FROZEN}"),
        (BEHIND_THE_LAST, "SIGKILL", GONE),
    ],
)
def test_ranks_end_with_a_line_where_the_first_one_is_frozen_or_gone(moment, number, line):
    """And with it the store, which is rank 0's where no torchrun has one."""
    code = ENDS.format(tools=str(TOOL.parent), moment=moment, signal=number)
    with socket.create_server(("localhost", 0)) as server:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{server.getsockname()[1]}", "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**place, RANK=f"{rank}", LOCAL_RANK=f"{rank}", TORCH_CPP_LOG_LEVEL="ERROR"),
        )
        for rank in range(3)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes[1:]]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes[1:]] == [1, 1], errors
    said = [[one for one in error.splitlines() if one.startswith("doctor.py: ")] for error in errors]
    assert len(said[0]) == 1 and re.match(f"doctor.py: ended: {line}", said[0][0]) and said[1] == [], said
    assert "Traceback" not in "".join(errors)


def test_under_torchrun_with_flags(tmp_path):
    """All checks but those whose result is up to what else this machine does; what is found is written."""
    flags = with_flags(
        SCMOE, f"--save {tmp_path / 'save'}", "--save-interval 5", "--expert-model-parallel-size 2", "--moe-every 2"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOL]
    options = ["--skip", "binding,overlap", "--network-seconds", "2", "--free-space", "1MB", "--json", tmp_path / "x"]
    done = subprocess.run(
        [*map(str, command), *map(str, options), "--", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready, as far as was tried; 8 checks on 2 ranks" in done.stdout and "8 of 8: step" in done.stderr
    found = json.loads((tmp_path / "x").read_text())
    assert found["ready"] and found["ranks"] == 2 and len(found["checks"]) == 8
    by_name = {one["name"]: one for one in found["checks"]}
    assert by_name["network"]["status"] == by_name["storage"]["status"] == "ok"
    assert f"--save is in {tmp_path}" in by_name["storage"]["findings"][0]["text"]
    assert not (tmp_path / "save").exists() and list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_flags_with_virtual_stages_are_examined():
    flags = with_flags(
        SCMOE,
        "--num-layers 8",
        "--moe-every 2",
        "--eval-iters 0",
        "--pipeline-model-parallel-size 2",
        "--num-virtual-stages-per-pipeline-rank 2",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", TOOL]
    done = subprocess.run(
        [*map(str, command), "--only", "flags,groups,step", "--", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrain_gpt_scmoe.py takes them" in done.stdout and "groups of 2 ranks (pipeline 2)" in done.stdout
    assert "on every rank; there are no replicas" in done.stdout


@pytest.mark.alone
def test_the_slow_one_of_four_links_is_named(tmp_path):
    """A link of a tenth of the others' rate."""
    try:
        with SlowNetwork(4, "100mbit") as network:
            network.set_rate("10mbit", rank=2)
            processes = [
                network.popen(
                    rank,
                    [
                        sys.executable,
                        str(TOOL),
                        "--only",
                        "network",
                        "--network-seconds",
                        "8",
                        "--json",
                        str(tmp_path / "x"),
                    ],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(4)
            ]
            printed = [process.communicate(timeout=120) for process in processes]
    except UserError as error:
        pytest.skip(f"no slow links on this machine: {error}")
    assert [process.returncode for process in processes] == [1] * 4, printed
    lines = [line for line in printed[0][0].splitlines() if line.startswith("problem: ")]
    assert (
        len(lines) == 1 and "problem: network: rank 2 (" in lines[0] and "most links within a host are slow" in lines[0]
    )
    assert not any(out for out, _ in printed[1:])
    assert not json.loads((tmp_path / "x").read_text())["ready"]
