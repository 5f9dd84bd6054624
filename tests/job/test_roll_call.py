"""Ranks meet in attempts that no rank of an earlier one takes part in, and none waits for one that has ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch.distributed as dist
from training import ROOT

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import last_words, meeting, neighbours, roll_call
from megatron_scmoe.job.last_words import LastWords
from megatron_scmoe.job.meeting import Meeting


@pytest.fixture(autouse=True)
def first_of_its_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


class Starting(threading.Thread):
    """A rank of three on its way to the others; ``came`` is where it met them, or how it ended."""

    def __init__(self, store: dist.Store, rank: int, limit_s: float = 20.0) -> None:
        super().__init__(daemon=True)
        self._start = (store, rank, 3, limit_s)
        self.came = ""
        self.start()

    def run(self) -> None:
        try:
            self.came = roll_call.answered(*self._start)
        except ConfigError as refused:
            self.came = f"refused: {refused}"
        except SystemExit as ended:
            self.came = f"exit code {ended.code}"

    def is_waiting(self, seconds: float = 0.3) -> bool:
        self.join(seconds)
        return self.is_alive()


def started(store: dist.Store, *ranks: int) -> list[Starting]:
    return [Starting(store, rank) for rank in ranks]


def came(ranks: list[Starting]) -> set[str]:
    for rank in ranks:
        rank.join(20)
    return {rank.came for rank in ranks}


def left(store: dist.Store, said: LastWords) -> None:
    """What ``last_words.leave`` writes."""
    store.set(f"megatron_scmoe/left/{said.rank}", json.dumps(asdict(said)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_of_all_is_an_attempt_of_its_own(store, order):
    assert came(started(store, *order)) == {"megatron_scmoe/1"}
    assert came(started(store, *order)) == {"megatron_scmoe/2"}


def test_nobody_meets_before_all_are_there(store):
    two = started(store, 0, 2)
    assert all(rank.is_waiting() for rank in two)
    assert came([*two, *started(store, 1)]) == {"megatron_scmoe/1"}


def test_a_rank_that_is_started_again_ends_the_attempt_under_way_and_waits_for_the_next(store):
    came(started(store, 0, 1, 2))
    (second,) = started(store, 2)
    assert second.is_waiting()
    over = last_words.heard(dist.PrefixStore("megatron_scmoe/1", store))
    assert over is not None and over.in_words() == "rank 2 has ended: it was started again"
    assert came([second, *started(store, 0, 1)]) == {"megatron_scmoe/2"}
    assert last_words.heard(dist.PrefixStore("megatron_scmoe/2", store)) is None


def test_rank_0_started_again_ends_the_attempt_under_way(store):
    came(started(store, 0, 1, 2))
    (first,) = started(store, 0)
    assert first.is_waiting()
    assert last_words.heard(dist.PrefixStore("megatron_scmoe/1", store)) == LastWords(0, "it was started again")
    assert came([first, *started(store, 2, 1)]) == {"megatron_scmoe/2"}


def test_who_died_before_all_were_there_may_come_again(store):
    """Rank 0 and rank 1, whose earlier processes had called and answered; rank 2 has answered the first call."""
    store.set("megatron_scmoe/1/here/1", "")
    store.add("megatron_scmoe/attempt", 1)
    (waits,) = started(store, 2)
    assert waits.is_waiting()
    assert came([waits, *started(store, 0, 1)]) == {"megatron_scmoe/2"}


def test_all_refuse_where_one_does(store):
    left(store, LastWords(1, "--lr is 0", is_refusal=True))
    assert came(started(store, 0, 2)) == {"refused: rank 1 refuses: --lr is 0"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_has_ended_is_not_waited_for(store, rank, capsys):
    left(store, LastWords(rank, "ImportError: no such module"))
    assert came(started(store, *{0, 1, 2} - {rank})) == {"exit code 3"}
    line = f"pretrain_gpt_scmoe.py: ended: rank {rank} has ended: ImportError: no such module\n"
    assert set(capsys.readouterr().err.splitlines(keepends=True)) == {line}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_its_torchrun_starts_again_is_waited_for(store, rank):
    left(store, LastWords(rank, "ImportError: no such module", comes_back=True))
    two = started(store, *{0, 1, 2} - {rank})
    assert all(one.is_waiting() for one in two)
    assert came([*two, *started(store, rank)]) == {"megatron_scmoe/1"}


def test_ranks_that_do_not_come_are_named(store, monkeypatch, capsys):
    monkeypatch.setattr(roll_call, "SAY_EVERY_S", 0.1)
    with pytest.raises(ConfigError, match=r"ranks 1-2 of 3 did not come within --distributed-timeout-minutes"):
        roll_call.answered(store, 0, 3, 0.5)
    assert " > waiting for ranks 1-2 for 0 s" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="rank 0 did not call them within --distributed-timeout-minutes"):
        roll_call.answered(store, 1, 3, 0.5)
    with pytest.raises(ConfigError, match="rank 0 did not call them within 10 minutes"):
        roll_call.answered(store, 1, 3, 0.1, "10 minutes")


# --- meetings --------------------------------------------------------------------------------------------------------


def meetings(store: dist.Store, monkeypatch: pytest.MonkeyPatch, minutes: float = 1.0) -> list[Meeting]:
    """Of two ranks that have met."""
    monkeypatch.setattr(meeting, "job_store", lambda _args: store)
    args = [Namespace(rank=rank, world_size=2, distributed_timeout_minutes=minutes) for rank in (0, 1)]
    both = [Meeting(one) for one in args]
    other = threading.Thread(target=lambda: both[1].store)
    other.start()
    assert both[0].store is not None
    other.join()
    return both


def test_who_waits_for_a_decision_ends_where_rank_0_has(store, monkeypatch, capsys):
    both = meetings(store, monkeypatch)
    last_words.end(both[0].store, LastWords(0, "MemoryError"))
    with pytest.raises(SystemExit, match="3"):
        both[1].told("step", lambda: 1)
    assert capsys.readouterr().err == "pretrain_gpt_scmoe.py: ended: rank 0 has ended: MemoryError\n"


def test_a_decision_that_does_not_come_is_missed_in_a_line(store, monkeypatch):
    both = meetings(store, monkeypatch, minutes=0.01)
    with pytest.raises(ConfigError, match="rank 0 decides for all: it has not said within --distributed-timeout"):
        both[1].told("step", lambda: 1)


def test_decisions_of_an_earlier_attempt_are_not_those_of_a_later_one(store, monkeypatch):
    for step in (100, 200):
        both = meetings(store, monkeypatch)
        assert both[0].told("step", lambda step=step: step) == both[1].told("step", lambda: -1) == step


# --- last words ------------------------------------------------------------------------------------------------------

ENDS = {
    "import time, no_such_module": (1, "ModuleNotFoundError: No module named 'no_such_module'"),
    "import sys; sys.exit(2)": (2, "see what it printed"),
    "last_words.leave('--lr is 0', is_refusal=True)": (0, "--lr is 0"),
    "last_words.all_is_said()": (0, None),
}


def rank_that_ends(code: str, port: int, restarts: int = 0) -> int:
    """Exit code of a rank that runs ``code``, under a torchrun that has started it again twice."""
    environment = {"RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    environment |= {"TORCHELASTIC_MAX_RESTARTS": str(2 + restarts)}
    program = "from megatron_scmoe.job import witness; witness.begin()\n"
    program += f"from megatron_scmoe.job import last_words; last_words.begin(); {code}"
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, timeout=120
    ).returncode


@pytest.mark.parametrize("code", ENDS)
def test_a_rank_says_why_it_ends(code):
    """Also where it ends in an import."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    exit_code, words = ENDS[code]
    assert rank_that_ends(code, server.port) == exit_code
    said = last_words.of_rank(server, 1)
    assert said == (None if words is None else LastWords(1, words, is_refusal="is_refusal" in code))


KILL = "import os; os.kill(os.getpid(), 9)"


def said_soon(look: Callable[[], LastWords | None]) -> LastWords | None:
    """What a witness says, who speaks after the rank has ended."""
    deadline_s = time.monotonic() + 10
    while (said := look()) is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return said


def test_a_witness_speaks_for_a_rank_that_is_killed():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert rank_that_ends(KILL, server.port, restarts=1) == -9
    said = said_soon(lambda: last_words.of_rank(server, 1))
    assert said is not None and said.words.startswith("a signal has ended it") and said.comes_back


def test_a_witness_speaks_to_the_attempt_that_a_killed_rank_took_part_in():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    rank_that_ends(f"last_words.takes_part('attempt'); {KILL}", server.port)
    said = said_soon(lambda: last_words.heard(dist.PrefixStore("attempt", server)))
    assert said is not None and said.rank == 1


def test_a_rank_whose_witness_is_gone_runs_on():
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    end_it = (
        "import os, signal; os.kill(witness._OWN[0]._pid, signal.SIGKILL); os.waitid(os.P_PID, witness._OWN[0]._pid, "
    )
    end_it += "os.WEXITED); last_words.takes_part('attempt'); last_words.all_is_said(); os._exit(5)"
    assert rank_that_ends(end_it, server.port) == 5


@pytest.mark.parametrize("code", ["witness.dismiss()", "last_words.all_is_said()"])
def test_a_witness_that_is_dismissed_says_nothing(code):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert rank_that_ends(f"{code}; {KILL}", server.port) == -9
    time.sleep(1)
    assert last_words.of_rank(server, 1) is None


@pytest.mark.parametrize("is_refusal", [False, True])
def test_a_rank_says_whether_it_comes_back(is_refusal):
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    rank_that_ends(f"last_words.leave('', is_refusal={is_refusal})", server.port, restarts=1)
    assert last_words.of_rank(server, 1) == LastWords(1, "without words", is_refusal, comes_back=not is_refusal)


def test_where_no_store_is_a_rank_ends_all_the_same():
    began_s = time.monotonic()
    assert rank_that_ends("import sys; sys.exit(4)", port=1) == 4
    assert time.monotonic() - began_s < 60


# --- the store -------------------------------------------------------------------------------------------------------


def test_what_listens_and_never_answers_is_waited_for_aloud_and_not_for_ever(monkeypatch, capsys):
    """As where the first node is frozen: torch's own constructor has no limit for an answer."""
    monkeypatch.setattr(roll_call, "SAY_EVERY_S", 0.2)
    monkeypatch.setattr(meeting, "ANSWERS_WITHIN_S", 0.3)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", f"{port}")
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=f"what listens at localhost:{port} has not answered within 2 s; see"):
            Meeting(Namespace(rank=1, world_size=2, distributed_timeout_minutes=0.01), limit="2 s").store  # noqa: B018
    assert time.monotonic() - began_s < 20
    assert f" > waiting for the job's store at localhost:{port} for 0 s" in capsys.readouterr().out


def test_what_the_store_says_is_not_lost():
    def fails() -> dist.Store:
        raise ConfigError("no such node; give another")

    with pytest.raises(ConfigError, match="no such node; give another"):
        meeting._reached(fails, 5.0, "5 s")
    store = dist.HashStore()
    assert meeting._reached(lambda: store, 5.0, "5 s") is store


# --- who speaks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("local_rank", "speaks"), [(0, True), (1, False)])
def test_where_places_cannot_be_seen_the_first_speaks(monkeypatch, local_rank, speaks):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert neighbours.is_spokesman() == speaks


@pytest.mark.parametrize(
    ("first_rank", "number", "speaks"),
    [
        ({"LOCAL_RANK": "0"}, None, False),
        ({"LOCAL_RANK": "0"}, signal.SIGSTOP, True),
        ({"LOCAL_RANK": "0"}, signal.SIGKILL, True),
        ({"LOCAL_RANK": "2"}, None, True),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "2"}, None, True),  # another job's
    ],
)
def test_the_first_rank_of_a_machine_that_can_speak_does(first_rank, number, speaks):
    job = os.environ | {"MASTER_ADDR": "node0", "MASTER_PORT": "1", "WORLD_SIZE": "3"}
    ask = "from megatron_scmoe.job import neighbours; print(neighbours.is_spokesman())"
    first = subprocess.Popen(["sleep", "60"], env=job | first_rank)
    try:
        if number is not None:
            first.send_signal(number)
            time.sleep(0.2)
        second = subprocess.run(
            [sys.executable, "-c", ask], env=job | {"LOCAL_RANK": "1"}, capture_output=True, text=True, check=True
        )
    finally:
        first.kill()
        first.wait()
    assert second.stdout == f"{speaks}\n"
