"""A rank that hangs ends the job and is named; one that computes does not."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import ranks
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from megatron_scmoe.config import ConfigError, ScMoEConfig
from megatron_scmoe.job import beats, hangs, last_words
from megatron_scmoe.job.beats import Beat, Ear, Pulse, diagnosis

# --- what follows from signs of life ---------------------------------------------------------------------------------


def beat(number: int = 1, step: int = 7, section: str = "step", still_s: float = 100.0) -> Beat:
    return Beat(number, step, section, still_s, "host", 1)


@pytest.mark.parametrize(
    ("after", "words", "named"),
    [
        ({0: beat(2), 1: beat(1)}, "silent for 15 s or more, in step 7", [1]),
        ({0: beat(2), 1: beat(2)}, "standing still for 30 s or more, in step 7, as all ranks do", [0, 1]),
        ({0: beat(2, step=8), 1: beat(2)}, "in step 7, behind all others", [1]),
        # another rank computes, saves for less than ten times as long, or has ended and says nothing more
        ({0: beat(2), 1: beat(2, still_s=1.0)}, None, None),
        ({0: beat(2), 1: beat(2, section="checkpointing")}, None, None),
        ({0: beat(2), 1: beat(2, section="checkpointing", still_s=301.0)}, "standing still", [0, 1]),
        ({0: beat(2, still_s=1.0), 1: beat(1, section="ended")}, None, None),
    ],
)
def test_who_is_to_blame(after, words, named):
    found = diagnosis({0: beat(), 1: beat(section=after[1].section)}, after, limit_s=30.0)
    assert (found is None) is (words is None)
    if found is not None:
        assert words in found.words and found.ranks == named and found.are_silent is ("silent" in words)


def test_limit_follows_the_slowest_of_the_last_steps():
    limit = hangs.StepLimit(-1.0)
    assert limit.seconds == hangs.FLOOR_S
    limit.add(1, 20.0)
    for step in range(2, 2 + hangs.REMEMBERED_STEPS - 1):
        limit.add(step, 5.0)
        limit.add(step, 0.1)  # evaluation's steps do not crowd out what training takes
    assert limit.seconds == 200.0
    limit.add(100, 5.0)
    assert limit.seconds == 50.0
    assert hangs.StepLimit(12.0).seconds == 12.0


def test_a_main_thread_that_moves_is_told_from_one_that_stands_still():
    store, go_on = dist.HashStore(), threading.Event()
    pulse = Pulse(store, 0)

    def speak(seconds: float) -> Beat:
        speaker = threading.Timer(seconds, lambda: (pulse.say(1, "step"), go_on.set()))
        speaker.start()
        go_on.wait()
        speaker.join()
        go_on.clear()
        found = beats.heard(store, 0)
        assert found is not None
        return found

    stands = [speak(0.1) for _ in range(3)]
    assert stands[-1].still_s > 0.15
    pulse.say(2, "step")  # from here it is another place
    moved = beats.heard(store, 0)
    assert moved is not None and moved.still_s < 0.05


def test_a_rank_that_falls_silent_ends_the_job_within_a_minute():
    """In a step of any length that was seen before, between steps and in a save, by what each look takes at most."""
    leaving_s = 2 * hangs.BEAT_S  # for stacks
    heard_s = max(beats.SILENT_S[section] for section in ("step", "checkpointing", "between")) + 2 * beats.BEAT_S
    asked_s = hangs.FLOOR_S + beats.ASKED_AGAIN_S + 2 * beats.BEAT_S
    assert max(heard_s, asked_s) + leaving_s < 60


def test_silence_counts_but_where_data_are_indexed(monkeypatch):
    for section in ("setup", "step"):
        monkeypatch.setitem(beats.SILENT_S, section, 0.05)
    store = dist.HashStore()
    ear = Ear(store, 0)
    for section, words in (("setup", "setup, step 3"), ("data", ""), ("step", "in step 3"), ("ended", "")):
        Pulse(store, 0).say(3, section)
        assert ear.silence() is None
        time.sleep(0.1)
        found = ear.silence()
        assert (found is not None) is bool(words)
        if found is not None:
            assert found.ranks == [0] and f"last heard of {words}" in found.words


@pytest.mark.parametrize("section", ["setup", "data", "step"])
@pytest.mark.parametrize("how", ["stopped", "gone", "lives", "elsewhere"])
def test_a_stopped_process_is_missed_after_the_time_of_a_step_wherever_it_was(section, how, monkeypatch):
    """One that lives may keep Python's lock for long; of one on another machine nobody here can tell."""
    monkeypatch.setitem(beats.SILENT_S, "step", 0.05)
    process = subprocess.Popen(["sleep", "60"])
    machine = "elsewhere" if how == "elsewhere" else beats.this_machine()
    store = dist.HashStore()
    store.set("beat/0", json.dumps(asdict(Beat(1, 3, section, 0.0, machine, process.pid))))
    ear = Ear(store, 0)
    assert ear.silence() is None
    if how in ("stopped", "elsewhere"):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    if how == "gone":
        process.kill()
        process.wait()
    time.sleep(0.1)
    assert (ear.silence() is not None) is (section == "step" or how in ("stopped", "gone"))
    process.kill()
    process.wait()


def test_a_rank_listens_to_the_next_of_the_job_and_of_its_machine(monkeypatch):
    listens = {}
    for rank in range(6):
        monkeypatch.setenv("LOCAL_RANK", str(rank % 3))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        listens[rank] = hangs._next_to(rank, 6)
    assert listens == {0: {1}, 1: {2}, 2: {3, 0}, 3: {4}, 4: {5}, 5: {0, 3}}
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert hangs._next_to(1, 2) == {0} and hangs._next_to(0, 1) == set()


def test_data_are_indexed_in_a_section_of_their_own(tmp_path):
    """Start-up, data, start-up again, the first step, and between steps."""
    watch = hangs.HangWatch(Namespace(rank=0, world_size=1), dist.HashStore(), hangs.StepLimit(-1.0))
    seen = [watch._section]
    for name in ("data", "step"):
        watch.start_section(name)
        seen.append(watch._section)
        watch.end_section(name)
        seen.append(watch._section)
    assert seen == ["setup", "data", "setup", "step", "between"]


def test_a_rank_is_heard_from_its_first_moment(monkeypatch, tmp_path):
    """One that stops before it was ever heard would not be missed."""
    monkeypatch.setattr(hangs, "BEAT_S", 60.0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    args = Namespace(rank=0, world_size=1, save=str(tmp_path), curr_iteration=0)
    watch = hangs.HangWatch(args, store, hangs.StepLimit(1.0))
    watch.start()
    deadline_s = time.monotonic() + 10
    while (beat := beats.heard(store, 0)) is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    watch.stop()
    assert beat is not None and (beat.number, beat.section) == (1, "setup")


@pytest.mark.parametrize("value", [-2.0, float("nan")])
def test_limits_that_are_none_are_refused(value):
    with pytest.raises(ConfigError, match="--hang-limit is"):
        ScMoEConfig(hang_limit=value).validate(num_layers=0)


# --- processes -------------------------------------------------------------------------------------------------------


SLOW = ("computes", "saves", "computes beside its writer")
"""What rank 1 does that is no hang."""


class Ended(NamedTuple):
    """Exit codes of both ranks, None for one that still ran; what they printed; which wrote stacks."""

    exit_codes: list[int | None]
    printed: str
    stacks: list[str]


def both(what_rank_1_does: str, folder: Path) -> Ended:
    """Two ranks in a step, of which rank 0 waits for ever."""
    dist.destroy_process_group()
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, what_rank_1_does, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    if what_rank_1_does == "stopped":
        while not (folder / "1").exists():
            time.sleep(0.01)
        os.kill(processes[1].pid or 0, signal.SIGSTOP)
    processes[0].join(6 if what_rank_1_does in SLOW else 60)
    processes[1].join(1 if what_rank_1_does in SLOW else 60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    printed = "".join((folder / f"{rank}.err").read_text() for rank in (0, 1))
    return Ended(codes, printed, sorted(path.name for path in folder.glob("hangs/*/*")))


def _rank(rank: int, what_rank_1_does: str, folder: Path) -> None:
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    hangs.BEAT_S = 0.2
    beats.SILENT_S["step"] = hangs.ASKED_AGAIN_S = 2.0
    hangs.ENDS_WITHIN_S = 0.5
    args = Namespace(rank=rank, world_size=2, save=str(folder), curr_iteration=6)
    store = dist.FileStore(str(folder / "store"), 2)
    watch = hangs.HangWatch(args, store, hangs.StepLimit(1.0))
    watch.start()
    watch.start_section("checkpointing" if what_rank_1_does == "saves" and rank == 1 else "step")
    time.sleep(0.3)
    (folder / str(rank)).touch()
    if rank == 1 and what_rank_1_does == "ends":
        last_words.end(store, last_words.LastWords(1, "MemoryError"))
        os._exit(1)
    if rank == 1 and "writer" in what_rank_1_does:
        lives_s = 0 if what_rank_1_does == "lost its writer" else 60
        PersistentAsyncCaller._persistent_process = multiprocessing.get_context("fork").Process(
            target=time.sleep, args=(lives_s,), daemon=True
        )
        PersistentAsyncCaller._persistent_process.start()
    if rank == 1 and what_rank_1_does.startswith("computes"):
        while True:  # as a compilation does, in many functions
            copy.deepcopy([{number: [str(number)]} for number in range(1000)])
    time.sleep(60)


@pytest.mark.parametrize(
    ("what_rank_1_does", "words"),
    [("stopped", ["hang: rank 1: silent for", "in step 7"]), ("waits", ["hang: ranks 0-1: standing still", "as all"])],
)
def test_a_hang_ends_the_job_and_names_the_rank(what_rank_1_does, words, tmp_path):
    (found,) = ranks.run(both, 1, what_rank_1_does, tmp_path)
    assert found.exit_codes == [
        last_words.EXIT_ENDED,
        -signal.SIGKILL if what_rank_1_does == "stopped" else last_words.EXIT_ENDED,
    ]
    assert found.printed.count("hang:") == 1 and all(word in found.printed for word in words)
    assert found.stacks == ["rank00000.txt", "rank00001.txt"][: 1 if what_rank_1_does == "stopped" else 2]
    (stack,) = tmp_path.glob("hangs/*/rank00000.txt")
    assert "in _rank" in stack.read_text()


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path):
    (found,) = ranks.run(both, 1, "ends", tmp_path)
    line = "pretrain_gpt_scmoe.py: ended: rank 1 has ended: MemoryError; this is rank 0, in step 7\n"
    assert found == Ended([last_words.EXIT_ENDED, 1], line, [])


def test_a_rank_ends_that_would_wait_for_a_writer_that_died(tmp_path):
    (found,) = ranks.run(both, 1, "lost its writer", tmp_path)
    assert found.exit_codes[1] == last_words.EXIT_ENDED
    assert "ended: the process that writes for --async-save has died" in found.printed
    assert "this is rank 1, in step 7" in found.printed


@pytest.mark.parametrize("what_rank_1_does", SLOW)
def test_what_is_slow_is_no_hang(what_rank_1_does, tmp_path):
    (found,) = ranks.run(both, 1, what_rank_1_does, tmp_path)
    assert found == Ended([None, None], "", [])
