"""tools/slow_link.py: links are as slow as asked, bytes are counted, and nothing is left over, however a job ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slow_link.py"
sys.path.insert(0, str(TOOL.parent))
import atomic  # noqa: E402
import slow_link as tool  # noqa: E402
from slow_network import leftovers, network  # noqa: E402
from slow_network.buckets import TokenBucket, UserError, format_rate, parse_rate  # noqa: E402
from slow_network.control import VARIABLE, Control, ControlError, ControlServer  # noqa: E402
from slow_network.job import Outcome  # noqa: E402
from slow_network.network import SlowNetwork  # noqa: E402

AT_ONCE = (16 + 64) << 10  # bytes that an idle link lets through: what it saved up, and one piece of TCP
DEAD_PID = 1 << 22  # Linux gives none that high


@pytest.fixture(scope="module")
def slow_links():
    """Skips where the machine has no slow links to offer, and says why. What breaks in another way is no reason."""
    try:
        with SlowNetwork(1, "1mbit"):
            pass
    except UserError as exc:
        pytest.skip(f"no slow links on this machine: {exc}")


def command(*words: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, words)]


def python(program: str, *words: object) -> list[str]:
    """A job in Python: `send` and `receive` connections to and from rank 0 are ready for it."""
    return ["--", sys.executable, "-c", PRELUDE + program, *map(str, words)]


def run_lab(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), check=False, capture_output=True, text=True, timeout=30)


PRELUDE = f"""
import json, os, signal, socket, subprocess, sys, time
sys.path.insert(0, {str(TOOL.parent)!r})
rank = int(os.environ["RANK"])
def receive():
    server = socket.create_server((os.environ["MASTER_ADDR"], 5000))
    return [server.accept()[0] for _ in range(int(os.environ["WORLD_SIZE"]) - 1)]
def send():
    for _ in range(500):
        try:
            return socket.create_connection((os.environ["MASTER_ADDR"], 5000))
        except ConnectionRefusedError:
            time.sleep(0.01)
def read(connection, num_bytes):
    while num_bytes:
        num_bytes -= len(connection.recv(min(num_bytes, 1 << 16)))
"""


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50mbit", 50_000_000), (" 1.5Gbit ", 1_500_000_000), ("64000bit", 64_000), ("unlimited", None)],
)
def test_rates(text, expected):
    assert parse_rate(text) == expected


@given(st.none() | st.integers(64_000, 10**11))
def test_rates_are_written_as_they_are_read(rate):
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--rate 5potato -- ls", "rate '5potato' is not understood; write a number and bit, kbit, mbit or gbit"),
        ("--rate 50 -- ls", "rate '50' is not understood"),
        ("--rate -5mbit -- ls", "argument --rate"),
        ("--rate nan -- ls", "rate 'nan' is not understood"),
        ("--rate 1kbit -- ls", "rate '1kbit' is out of range; choose 64kbit to 100gbit"),
        ("--burst 1kb -- ls", "burst of 1024 bytes holds no whole packet; give at least 2kb"),
        ("--burst 64mb --rate 64kbit -- ls", "is too much for 64kbit; lower it"),
        ("--burst big -- ls", "burst 'big' is not understood"),
        ("--ranks 0 -- ls", "argument --ranks: '0' is not a whole number from 1 to 128"),
        ("--ranks two -- ls", "argument --ranks: 'two'"),
        ("--threads 0 -- ls", "argument --threads: '0'"),
        ("--grace never -- ls", "argument --grace: 'never' is not a number of seconds"),
        ("--output loud -- ls", "argument --output: invalid choice: 'loud'"),
        ("--bogus 3 -- ls", "unknown option '--bogus'"),
        ("--ranks 2", "there is no command; write it behind --"),
        ("--ranks 2 --", "there is no command; write it behind --"),
        ("python train.py", "'python' is no option; the command goes behind --"),
        ("-- no-such-program", "the command 'no-such-program' is not there or not executable"),
        ("--json /nowhere/x.json -- ls", "--json '/nowhere/x.json' cannot be written: /nowhere is no folder"),
    ],
)
def test_bad_requests_are_refused_in_one_line(capsys, words, expected):
    code, error = main(words.split(), capsys)
    assert code == 2 and expected in error and error.count("\n") == 1, error


def main(argv: list[str], capsys) -> tuple[int | str | None, str]:
    try:
        code = tool.main(argv)
    except SystemExit as exc:  # argparse
        code = exc.code
    return code, capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    text = capsys.readouterr().out
    for word in ("examples:", "what it does not prove:", "SLOW_LINK_CONTROL", "MASTER_ADDR", "--rate", "unlimited"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_missing_root_is_named(capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, error = main(["--", "true"], capsys)
    assert code == 2 and "only root may make network namespaces; run it with sudo" in error and error.count("\n") == 1


@pytest.mark.parametrize("missing", ["ip", "tc", "taskset", "setpriv"])
def test_missing_programs_are_named(capsys, monkeypatch, tmp_path, missing):
    for name in {"ip", "tc", "taskset", "setpriv", "true"} - {missing}:
        fake(tmp_path / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, error = main(["--", "true"], capsys)
    assert code == 2 and f"the program {missing} is missing from PATH; install it: apt-get install" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "says", "expected"),
    [
        ("tc", "Error: Specified qdisc kind is unknown.", "the kernel has no htb qdisc .* modprobe sch_htb"),
        ("tc", "RTNETLINK answers: No such file or directory", "the kernel has no htb qdisc"),
        ("ip", "mount --make-shared /run/netns failed: Operation not permitted", "start the container with --privileg"),
        ("ip", "Error: Unknown device type.", "the kernel lacks veth or bridge devices .* modprobe veth bridge"),
    ],
)
def test_what_the_kernel_lacks_is_named(monkeypatch, tmp_path, program, says, expected):
    fake(tmp_path / program, f"echo '{says}' >&2; exit 2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=expected):
        network._run([program, "-batch", "-"], ["a line"])


def test_another_failure_is_not_the_users(monkeypatch, tmp_path):
    fake(tmp_path / "tc", "echo 'Cannot open network namespace: No such file or directory' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(network.NetworkError, match="tc -netns x: Cannot open network namespace"):
        network._run(["tc", "-netns", "x"])


def fake(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_cores_go_round():
    usable = sorted(os.sched_getaffinity(0))
    single, double = SlowNetwork(5, "unlimited"), SlowNetwork(5, "unlimited", num_threads=2)
    for rank in range(5):
        assert single.cpus(rank) == [usable[rank % len(usable)]]
        assert set(double.cpus(rank)) == {usable[(2 * rank + thread) % len(usable)] for thread in range(2)}


def test_ranks_of_a_node_share_a_link():
    nodes, alone = SlowNetwork(6, "unlimited", ranks_per_node=3), SlowNetwork(6, "unlimited")
    assert (nodes.num_links, alone.num_links) == (2, 6)
    assert [nodes.address(rank) for rank in (0, 2, 3)] == ["10.77.0.1", "10.77.0.1", "10.77.0.2"]
    assert nodes.command_prefix(3)[:4] == nodes.command_prefix(5)[:4] != nodes.command_prefix(2)[:4]
    found = [nodes.environment(rank) for rank in range(6)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) for one in found[2:4]] == [
        ("2", "2", "3"),
        ("3", "0", "3"),
    ]
    assert found[0]["NCCL_HOSTID"] == found[2]["NCCL_HOSTID"] != found[3]["NCCL_HOSTID"]
    assert "NCCL_HOSTID" not in alone.environment(0) and alone.environment(5)["LOCAL_RANK"] == "5"
    with pytest.raises(UserError, match="6 ranks cannot lie on nodes of 4"):
        SlowNetwork(6, "unlimited", ranks_per_node=4)


def test_report_of_nodes(capsys):
    args = tool.make_parser().parse_args(["--ranks", "4", "--ranks-per-node", "2"])
    report = tool.make_report(args, ["ls"], Outcome(0, [0] * 4, [1000, 2_000_000], 2.0))
    assert [row["bytes_sent"] for row in report["ranks"]] == [1000, None, 2_000_000, None]
    tool.print_report(report)
    table = capsys.readouterr().err
    assert table.count("of its node") == 2 and "2,000,000         8.00     0" in table


@pytest.mark.usefixtures("slow_links")
def test_what_ranks_of_a_node_tell_one_another_is_not_on_its_link():
    with SlowNetwork(4, "10mbit", ranks_per_node=2) as slow:
        program = """
import os, socket, sys
rank, to = int(os.environ["RANK"]), sys.argv[1]
with socket.socket() as one:
    if rank == 0:
        one.bind((sys.argv[2], 5000)); one.listen()
        print("listens", flush=True)
        connection, _ = one.accept()
        while connection.recv(1 << 16): pass
    else:
        one.connect((to, 5000)); one.sendall(bytes(200_000))
"""
        for sender, crosses in ((1, False), (2, True)):
            words = [sys.executable, "-c", program, slow.address(0), slow.address(0)]
            before = slow.bytes_sent()
            with slow.popen(0, words, stdout=subprocess.PIPE) as receiver:
                assert receiver.stdout.readline() == b"listens\n"
                assert slow.popen(sender, words).wait(30) == 0
            sent = [late - early for early, late in zip(before, slow.bytes_sent(), strict=True)]
            assert (sent[1] > 200_000) == crosses and sent[0] < 20_000
        control = Control(str(slow._socket))
        control.set_rate("4mbit", 3)
        assert control.rate() == "10mbit,4mbit"
        with pytest.raises(ControlError, match="there is no rank 4; ranks are 0 to 3"):
            control.set_rate("4mbit", 4)


def test_report_is_written_whole(tmp_path, capsys):
    args = tool.make_parser().parse_args(["--rate", "1mbit"])
    report = tool.make_report(args, ["ls"], Outcome(137, [0, 137, None], [1000, 2_000_000, 0], 2.0))
    tool.print_report(report)
    table = capsys.readouterr().err
    assert "2.0 s, started at 1mbit" in table and "2,000,000         8.00   137" in table and table.count("\n") == 5
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.written(path) as file:
        file.write("half")
        _ = 1 / 0
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["r.json"]
    atomic.write_text(path, json.dumps(report))
    assert json.loads(path.read_text()) == report and os.listdir(tmp_path) == ["r.json"]
    assert report["ranks"][1] == {"rank": 1, "bytes_sent": 2_000_000, "exit_code": 137}


# --- leftovers, the names --------------------------------------------------------------------------------------------


def test_leftovers_are_those_of_ended_owners():
    mine, other = leftovers.new_name(), leftovers.new_name()
    assert mine != other
    ticks = leftovers.start_ticks(os.getpid())
    reused = f"slow-link-{os.getpid()}-{ticks - 1}-0"  # the same process id, another process
    dead = f"slow-link-{DEAD_PID}-5-3"
    foreign = ["slow-link-1", "slow-link-x-1-1", f"{dead}-rank", f"my-{dead}", f"{dead}-rank1-old", "default"]
    names = [mine, f"{mine}-rank0", f"{other}-bridge", f"{reused}-rank0", dead, f"{dead}-rank12", f"{dead}-bridge"]
    found = leftovers.find_leftovers([*names, *foreign])
    assert found == {reused: [f"{reused}-rank0"], dead: [dead, f"{dead}-bridge", f"{dead}-rank12"]}


def test_a_zombie_owns_nothing():
    process = subprocess.Popen(["sleep", "30"])
    name = f"slow-link-{process.pid}-{leftovers.start_ticks(process.pid)}-0"
    assert leftovers.find_leftovers([name]) == {}
    process.kill()
    wait_until(lambda: leftovers.start_ticks(process.pid) is None)
    assert list(leftovers.find_leftovers([name])) == [name]
    process.wait()


def wait_until(condition, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# --- the control channel, without a network --------------------------------------------------------------------------


@pytest.fixture
def control(tmp_path, monkeypatch):
    """A server that knows 'rate', 'bytes' and 'crash'; the folder's name is short enough for a socket."""
    bucket = TokenBucket.parse("1mbit", "256kb")

    def answer(request: str) -> dict:
        match request.split():
            case ["rate", rate]:
                return {"rate": format_rate(bucket.with_rate(rate).rate)}
            case ["bytes"]:
                return {"bytes_sent": [1, 2]}
        raise ZeroDivisionError

    server = ControlServer(tmp_path / "c", answer)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "c"))
    yield Control.from_environment()
    server.close()


def test_bad_requests_get_answers(control):
    control.set_rate("2mbit")
    assert control.bytes_sent() == [1, 2]
    with pytest.raises(ControlError, match="rate '5potato' is not understood"):
        control.set_rate("5potato")
    with pytest.raises(ControlError, match="ZeroDivisionError"):
        control.request("crash")
    with pytest.raises(ControlError, match="at most 1000 bytes"):
        control.request("x" * 5000)
    with socket.socket(socket.AF_UNIX) as connection:  # several lines, one of them no text
        connection.connect(control.path)
        connection.sendall(b"bytes\n\xff\x00\nbytes\n")
        lines = connection.makefile()
        assert ["error" in json.loads(lines.readline()) for _ in range(3)] == [False, True, False]
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as connection:  # gone before the answer
            connection.connect(control.path)
            connection.sendall(b"bytes\nbytes\n")
    threads = [threading.Thread(target=control.set_rate, args=("3mbit",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert control.bytes_sent() == [1, 2]


def test_nobody_answers(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ControlError, match="no answer from slow_link at .*gone"):
        Control.from_environment().rate()
    monkeypatch.delenv(VARIABLE)
    assert Control.from_environment() is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda some: st.lists(some) | st.dictionaries(st.text(), some),
)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(answer=st.binary() | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000))
@example(b"{}")
@example(b"1")
@example(b'{"rate": null}')
@example(b'{"rate": "10mbit"}')
def test_whatever_answers_is_an_answer_or_one_error(answer):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/c")
        server.listen()

        def serve():
            with server.accept()[0] as connection, contextlib.suppress(OSError):
                connection.recv(100)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        found: str | None = None
        with contextlib.suppress(ControlError):
            found = Control(f"{folder}/c").rate()
            assert isinstance(found, str)
        known = {b'{"rate": null}': None, b'{"rate": "10mbit"}': "10mbit"}
        assert found == known.get(answer, found)
        thread.join()


@settings(derandomize=True, deadline=None, database=None)
@given(st.lists(st.text() | st.from_regex(r"slow-link-[0-9]{1,20}-[0-9]{1,20}-[0-9]+(-rank[0-9]+)?", fullmatch=True)))
@example(["slow-link-0-0-0", "slow-link-99999999999999999999-1-1-bridge", "slow-link-\n"])
def test_odd_names_are_nobodys_or_leftovers(names):
    found = leftovers.find_leftovers(names)
    assert all(part.startswith(network) and part in names for network, parts in found.items() for part in parts)


# --- slow links ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow_links")
def test_a_rank_gets_what_torch_distributed_wants(tmp_path):
    program = """
names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
variables = [os.environ[name] for name in names]
seen = [rank, variables, sorted(os.sched_getaffinity(0)), [n for _, n in socket.if_nameindex()]]
sys.stdout.write(json.dumps(seen) + "\\n")
"""
    result = run_lab("--ranks", 3, "--threads", 1, "--output", "prefix", "--json", tmp_path / "r", *python(program))
    assert result.returncode == 0, result.stderr
    usable = sorted(os.sched_getaffinity(0))
    for rank, line in enumerate(sorted(result.stdout.splitlines())):
        assert line.startswith(f"[rank {rank}] ")
        expected = [f"{rank}", "3", "10.77.0.1", "29500", "eth0", "1"]
        cpus, interfaces = [usable[rank % len(usable)]], ["lo", "eth0"]
        assert json.loads(line.partition("] ")[2]) == [rank, expected, cpus, interfaces]
    assert ("3 ranks of 1 threads share 2 cores" in result.stderr) == (len(usable) == 2)
    assert [row["exit_code"] for row in json.loads((tmp_path / "r").read_text())["ranks"]] == [0, 0, 0]


@pytest.mark.alone
@pytest.mark.usefixtures("slow_links")
def test_rate_limits_and_bytes_are_counted(tmp_path):
    """Two labs at once do not slow each other; what two ranks send to one arrives at the rate of its one link."""
    program = """
num_bytes = int(sys.argv[1])
if rank == 0:
    connections = receive()
    start_s = time.monotonic()
    for connection in connections:
        connection.sendall(b"go")
    for connection in connections:
        read(connection, num_bytes)
    print(time.monotonic() - start_s)
else:
    connection = send()
    read(connection, 2)
    connection.sendall(bytes(num_bytes))
"""

    def start(num_senders: int, rate: str) -> tuple[subprocess.Popen[str], Path]:
        path = tmp_path / f"{num_senders}{rate}.json"
        job = python(program, 1_000_000)
        words = command("--ranks", num_senders + 1, "--rate", rate, "--json", path, *job)
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), path

    def seconds_of(process: subprocess.Popen[str], path: Path) -> float:
        output, error = process.communicate(timeout=30)
        assert process.returncode == 0, error
        sent = [row["bytes_sent"] for row in json.loads(path.read_text())["ranks"]]
        assert all(1_000_000 < num_bytes < 1_100_000 for num_bytes in sent[1:]), sent
        assert sent[0] < 100_000
        return float(output)

    one, two = start(1, "16mbit"), start(2, "16mbit")
    seconds = {1: seconds_of(*one), 2: seconds_of(*two)}
    for num_senders in (1, 2):
        least_s = (num_senders * 1_000_000 - AT_ONCE) / 2e6
        assert least_s < seconds[num_senders] < 2 * least_s + 1, seconds
    assert seconds_of(*start(2, "unlimited")) < seconds[2] / 2


@pytest.mark.alone
@pytest.mark.usefixtures("slow_links")
def test_a_rank_changes_the_rate():
    program = """
from slow_network.control import Control, ControlError
if rank == 0:
    for connection in receive():
        for _ in range(4):
            read(connection, 600_000)
            connection.sendall(b"!")
else:
    control, connection, rows = Control.from_environment(), send(), []
    for rate in ("8mbit", "80mbit", "80mbit", "80mbit"):
        control.set_rate(rate)
        before, start_s = control.bytes_sent(), time.monotonic()
        connection.sendall(bytes(600_000))
        connection.recv(1)
        seconds = time.monotonic() - start_s
        rows.append([control.rate(), seconds, control.bytes_sent()[1] - before[1]])
    try:
        control.set_rate("5potato")
    except ControlError as exc:
        rows.append(str(exc))
    print(json.dumps(rows))
"""
    result = run_lab("--rate", "unlimited", *python(program))
    assert result.returncode == 0, result.stderr
    slow, *fast, refusal = json.loads(result.stdout)
    assert [row[0] for row in (slow, *fast)] == ["8mbit", "80mbit", "80mbit", "80mbit"]
    assert refusal.startswith("rate '5potato' is not understood")
    least_s = (600_000 - AT_ONCE) / 1e6
    assert least_s < slow[1] < 2 * least_s + 1
    assert min(row[1] for row in fast) < slow[1] / 2  # of several: a busy machine may stall one of them
    assert all(600_000 < row[2] < 660_000 for row in (slow, *fast))


@pytest.mark.usefixtures("slow_links")
def test_every_end_of_every_link_has_the_rate():
    def shaped(slow: SlowNetwork) -> list[tuple[str, str]]:
        ends = [["tc", "-netns", f"{slow.name}-bridge"], *([*slow.command_prefix(rank), "tc"] for rank in range(3))]
        found = []
        for words in ends:
            shown = json.loads(subprocess.check_output([*words, "-json", "qdisc", "show"], text=True))
            for device in (qdisc["dev"] for qdisc in shown if qdisc["kind"] == "htb"):
                text = subprocess.check_output([*words, "class", "show", "dev", device], text=True)
                found.append((device, re.search(r" rate (.*?) *$", text, re.MULTILINE)[1]))
        return sorted(found)

    with SlowNetwork(3, "10mbit", burst="32kb") as slow:
        assert subprocess.check_output([*slow.command_prefix(2), "cat", network._SLOW_START], text=True) == "0\n"
        for rate, words in (("10mbit", "10Mbit"), ("1.5mbit", "1500Kbit"), ("unlimited", ""), ("40mbit", "40Mbit")):
            slow.set_rate(rate)
            ends = ["eth0"] * 3 + ["port0", "port1", "port2"] if words else []
            assert shaped(slow) == [(end, f"{words} ceil {words} burst 32Kb cburst 32Kb") for end in ends]
        with pytest.raises(UserError, match="out of range"):
            slow.set_rate("1bit")
        assert slow.rate == "40mbit"
        for rate, words in (("4mbit", "4Mbit"), ("unlimited", "")):
            control = Control(str(slow._socket))
            control.set_rate(rate, 1)
            assert control.rate() == f"40mbit,{rate},40mbit"
            of_one = {(end, f"{words} ceil {words} burst 32Kb cburst 32Kb") for end in ("eth0", "port1") if words}
            others = {(end, "40Mbit ceil 40Mbit burst 32Kb cburst 32Kb") for end in ("eth0", "port0", "port2")}
            assert set(shaped(slow)) == of_one | others
        with pytest.raises(ControlError, match="there is no rank 3; ranks are 0 to 2"):
            control.set_rate("4mbit", 3)
        slow.set_rate("40mbit")
        assert slow.rate == "40mbit" and len(shaped(slow)) == 6
    with pytest.raises(network.NetworkError, match="the network is gone"):
        slow.set_rate("1mbit")


LATE = """
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from megatron_scmoe.cpu import gloo
own = dist.all_to_all_single
dist.init_process_group("gloo")
tensor, result = torch.ones(1 << 17), torch.zeros(1 << 17)  # 256 KiB for the other rank
for exchange in (own, gloo.all_to_all_single):
    seconds = []
    for _ in range(5):
        dist.barrier()
        time.sleep(0.01 * rank)
        start_s = time.monotonic()
        exchange(result, tensor)
        seconds.append(time.monotonic() - start_s)
    if rank == 1:
        print(sorted(seconds)[2], flush=True)
"""


@pytest.mark.alone
@pytest.mark.usefixtures("slow_links")
def test_a_late_rank_uses_both_directions_of_its_link_at_once():
    """Of ours; gloo's own, the negative control, takes turns, which is why it is replaced."""
    result = subprocess.run(
        command("--rate", "50mbit", *python(LATE.format(root=str(TOOL.parents[1])))),
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    own_s, ours_s = map(float, result.stdout.split())
    one_way_s = (1 << 18) * 8 / 50e6
    assert own_s > 1.6 * one_way_s
    assert ours_s < 1.4 * one_way_s


# --- endings ---------------------------------------------------------------------------------------------------------

ENDINGS = """
ending, token = sys.argv[1:]
subprocess.Popen(["sleep", token], start_new_session=True)  # a grandchild that has left the rank's process group
if ending == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.write(f"ready {rank} {os.getpid()}\\n")  # one write: unbuffered, print makes several, which mix with others'
sys.stdout.flush()
connection = send() if rank else receive()  # both are ready
if rank == 1 and ending == "error":
    sys.exit(3)
if rank == 1 and ending == "stubborn":
    os.kill(os.getpid(), signal.SIGSEGV)
if ending != "success":
    time.sleep(60)
"""


def traces(lab_pid: int, token: str) -> list[str]:
    """What is there of a lab: names of namespaces, folders, interfaces outside, and processes that have its token."""
    names = [path.name for folder in (leftovers.NAMESPACES, leftovers.FOLDERS) for path in folder.glob("slow-link-*")]
    found = [name for name in names if name.startswith(f"slow-link-{lab_pid}-")]
    found += [name for _, name in socket.if_nameindex() if name.startswith(("port", "bridge"))]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if token in text and path.parent.name != str(lab_pid):
            found.append(f"process {path.parent.name}: {text[:20]}")
    return found


class Lab:
    """A running lab whose two ranks have started their grandchildren."""

    def __init__(self, ending: str, *options: str):
        self.token = f"{3600 + time.monotonic_ns() % 10**9}.{os.getpid()}"
        words = command(*options, *python(ENDINGS, ending, self.token))
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ready = sorted(self.process.stdout.readline() for _ in range(2))
        if not all(ready):
            pytest.fail(f"the lab ended before its ranks were ready: {ready}, {self.process.communicate(timeout=30)}")
        self.rank_pids = [int(line.split()[2]) for line in ready]

    def traces(self) -> list[str]:
        return traces(self.process.pid, self.token)

    def wait_for_traces(self, number: int) -> list[str]:
        """Return them when there are so many: for a moment of its start a process shows no command line."""
        wait_until(lambda: len(self.traces()) == number)
        return self.traces()

    def wait(self) -> tuple[int, str]:
        error = self.process.communicate(timeout=20)[1]
        return self.process.returncode, error


@pytest.fixture
def start_lab(slow_links):
    labs: list[Lab] = []

    def start(*words: str) -> Lab:
        labs.append(Lab(*words))
        return labs[-1]

    yield start
    for lab in labs:  # where the test has failed
        lab.process.kill()
        lab.process.wait()
    leftovers.remove_leftovers()


@pytest.mark.parametrize(
    ("ending", "signal_number", "exit_code", "says"),
    [
        ("success", None, 0, ""),
        ("error", None, 3, "slow_link: rank 1 exited with 3; ending the other ranks"),
        ("stubborn", None, 139, "slow_link: rank 1 was killed by SIGSEGV; ending the other ranks"),
        ("child", signal.SIGKILL, 137, "slow_link: rank 1 was killed by SIGKILL; ending the other ranks"),
        ("interrupt", signal.SIGINT, 130, "slow_link: stopped by SIGINT; ending the other ranks"),
        ("terminate", signal.SIGTERM, 143, "slow_link: stopped by SIGTERM; ending the other ranks"),
    ],
)
def test_nothing_is_left(start_lab, ending, signal_number, exit_code, says):
    lab = start_lab(ending, "--grace", "0.5" if ending == "stubborn" else "30")
    if signal_number is not None:
        lab.wait_for_traces(8)  # negative control: 3 namespaces, a folder, 4 processes are seen
        os.kill(lab.rank_pids[1] if ending == "child" else lab.process.pid, signal_number)
    code, error = lab.wait()
    assert code == exit_code and says in error and "  rank     bytes sent" in error, error
    assert lab.traces() == []


@pytest.mark.usefixtures("slow_links")
def test_an_exception_leaves_nothing():
    with pytest.raises(ZeroDivisionError), SlowNetwork(2, "1mbit") as slow:
        process = slow.popen(1, ["sleep", "3600.25"])
        wait_until(lambda: len(traces(os.getpid(), "3600.25")) == 5)
        1 / 0  # noqa: B018
    assert process.wait(timeout=10) == -signal.SIGKILL
    assert traces(os.getpid(), "3600.25") == []


@pytest.mark.usefixtures("slow_links")
def test_a_failed_start_leaves_nothing(monkeypatch, capsys):
    run = network._run
    monkeypatch.setattr(network, "_run", lambda words, lines=None: run(["tc", "bogus"] if words[0] == "tc" else words))
    assert tool.main(["--", "true"]) == 1
    assert "slow_link.py: error: tc bogus: " in capsys.readouterr().err
    assert traces(os.getpid(), "no process") == []


@pytest.mark.alone
def test_a_killed_lab_is_removed_at_the_next_start(start_lab):
    """And a lab that is alive is not touched: both run at once."""
    killed, alive = start_lab("kill"), start_lab("alive")
    before = alive.wait_for_traces(8)
    killed.process.kill()
    killed.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in killed.rank_pids))  # they die with it
    killed.wait_for_traces(6)  # but 3 namespaces, a folder, 2 grandchildren remain
    result = run_lab("--rate", "unlimited", "--", "true")
    assert result.returncode == 0
    assert f"left by process {killed.process.pid}, which was killed (2 of its ranks ran on)" in result.stderr
    assert result.stderr.count("removed") == 1
    assert killed.traces() == [] and alive.traces() == before
    alive.process.terminate()
    assert alive.wait()[0] == 143 and alive.traces() == []


@pytest.mark.usefixtures("slow_links")
def test_hidden_output_is_shown_when_a_rank_fails():
    program = """
sys.stdout.write(f"word of {rank}\\n")
sys.stdout.flush()
connection = send() if rank else receive()
sys.exit(int(sys.argv[1]) * rank)
"""
    good, bad = (run_lab("--output", "rank0", *python(program, code)) for code in (0, 5))
    assert (good.returncode, bad.returncode) == (0, 5)
    assert good.stdout == bad.stdout == "word of 0\n"
    assert "word of 1" not in good.stderr and "the last output of rank 1:\nword of 1\n" in bad.stderr
