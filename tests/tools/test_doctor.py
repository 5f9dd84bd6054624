"""tools/doctor.py: each check passes on a machine that is right, and names what is wrong on one made wrong for it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from training import SCMOE, STOCK, with_flags

TOOL = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"
sys.path.insert(0, str(TOOL.parent))
import doctor as tool  # noqa: E402
from command_line import UserError, exit_code  # noqa: E402
from doctoring import links  # noqa: E402
from doctoring.catalog import CATALOG, chosen  # noqa: E402
from doctoring.check import Finding, Status, by_ranks, not_tried, ok, problem  # noqa: E402

HOSTS = ["a", "a", "b", "b"]


def problems(findings: list[Finding]) -> list[str]:
    """Each with its fix, without which it is none."""
    found = [one for one in findings if one.status is Status.PROBLEM]
    assert all(one.fix for one in found)
    return [one.in_words() for one in found]


def fake(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--only potato", "--only has 'potato', which is no check; --list-checks prints them"),
        ("--skip network,disk", "--skip has 'disk', which is no check"),
        ("--only network --skip network", "leave no check"),
        ("--only ,", "leave no check"),
        ("--network-seconds 0", "argument --network-seconds: '0' is not a number from 1 to 3600"),
        ("--check-seconds nan", "argument --check-seconds: 'nan'"),
        ("--free-space much", "argument --free-space: 'much' is not a size"),
        ("--json /nowhere/x.json", "--json '/nowhere/x.json' cannot be written: /nowhere is no folder"),
        ("--json /tmp", "it is a folder"),
        ("--bogus", "unrecognized arguments: --bogus"),
        (
            "--lr 1",
            "unrecognized arguments: --lr 1; flags of pretrain_gpt_scmoe.py stand behind --; torchrun takes away",
        ),
    ],
)
def test_bad_requests_are_refused_in_one_line(capsys, monkeypatch, words, expected):
    monkeypatch.delenv("RANK", raising=False)
    code, _, error = main(words.split(), capsys)
    assert code == 2 and expected in error and error.count("\n") == 1, error


def test_tasks_that_would_not_meet_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    code, _, error = main([], capsys)
    assert code == 2 and "srun starts 8 tasks" in error and "start torchrun on each node" in error
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # negative control
    assert main(["--list-checks"], capsys)[0] == 0


def main(argv: list[str], capsys) -> tuple[int | str | None, str, str]:
    try:
        code: int | str | None = tool.main(argv)
    except SystemExit as exc:  # argparse
        code = exc.code
    return code, *capsys.readouterr()


def test_help_teaches(capsys):
    code, text, _ = main(["--help"], capsys)
    assert code == 0 and max(map(len, text.splitlines())) <= 120
    for word in ("examples:", "what it does not prove:", "exit codes:", "not tried", "torchrun", "sbatch"):
        assert word in text


def test_checks_are_chosen_in_their_order(capsys):
    assert chosen(None, None) == list(CATALOG)
    assert chosen("network, clocks", None) == ["clocks", "network"]
    assert chosen(None, "step,overlap") == list(CATALOG)[:-2]
    with pytest.raises(UserError):
        chosen("", None)
    _, text, _ = main(["--list-checks", "--only", "step,flags"], capsys)
    assert [line.split()[0] for line in text.splitlines()] == ["flags", "step"] and CATALOG["step"] in text


def names_of_checks() -> list[str]:
    from doctoring.rank import CHECKS

    return [one.name for one in CHECKS]


def test_every_check_of_the_catalog_is_there():
    assert ranks.run(names_of_checks, 1, distributed=False) == [list(CATALOG)]


def test_findings_of_all_ranks_are_said_once():
    same, other = ok("alike"), problem("odd", "mend")
    found = by_ranks([[same], [same, other], [same, other]])
    assert found == [same, Finding(Status.PROBLEM, "ranks 1-2: odd", "mend")]


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages() -> dict[str, str]:
    from doctoring import versions

    return versions.installed([*versions.ranges(), "transformer-engine"])


def test_what_is_installed_here_is_what_was_tested(packages):
    from doctoring import versions

    (found,) = versions.judged(packages)
    assert found.status is Status.OK and f"torch {packages['torch']}" in found.text and "tested" not in found.text


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("torch", "2.9.1", ["torch 2.9.1 is installed, and >=2.10.0a0 is needed", "pip install 'torch=="]),
        ("megatron-core", "0.20.0", ["megatron-core 0.20.0", "<0.20", "pip install 'megatron-core==0.19.2'"]),
        ("psutil", None, ["psutil is not installed", "pip install 'psutil=="]),
        ("transformer-engine", "2.1", ["transformer-engine 2.1 is installed, and 2.19.0", "requirements-gpu.txt"]),
    ],
)
def test_another_version_is_named(packages, name, version, words):
    from doctoring import versions

    wrong = {key: value for key, value in packages.items() if key != name} | ({name: version} if version else {})
    (found,) = problems(versions.judged(wrong))
    assert all(word in found for word in words), found


def test_a_version_in_its_range_is_said(packages):
    from doctoring import versions

    (found,) = versions.judged(packages | {"torch": "2.10.0a0+container"})
    assert found.status is Status.OK and "torch 2.10.0a0+container (tested: 2." in found.text


def test_ranks_with_other_versions_and_unused_gpus_are_named(monkeypatch, tmp_path):
    from doctoring.versions import Versions

    job: Any = SimpleNamespace(has_cuda=False)
    seen = Versions().look(job)
    right = Versions().judge(job, [seen, seen])
    assert problems(right) == [] and right[-1].status is Status.NOT_TRIED and "no GPU here" in right[-1].text
    other = {**seen, "alike": seen["alike"] | {"numpy": "1.0"}}
    (found,) = problems(Versions().judge(job, [seen, seen, other]))
    assert "numpy is " in found and "1.0 on rank 2" in found and "install the same on every node" in found
    fake(tmp_path / "nvidia-smi", "echo GPU-1234, 550.10")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    seen = Versions().look(job)
    (found,) = problems(Versions().judge(job, [seen, seen]))
    assert "driver 550.10 has GPUs and torch" in found and "unset CUDA_VISIBLE_DEVICES" in found


# --- environment -----------------------------------------------------------------------------------------------------


def of_environment(*, side_by_side: bool = False) -> list[Finding]:
    from doctoring.environment import Environment

    flags = SimpleNamespace(scmoe=SimpleNamespace(flies_side_by_side=side_by_side))
    job: Any = SimpleNamespace(flags=flags)
    seen = Environment().look(job)
    return Environment().judge(job, [seen, seen])


@pytest.fixture
def clean(monkeypatch):
    """An environment in which nothing is set that the check knows."""
    from doctoring.environment import FAMILIES

    for name in [name for name in os.environ if name.startswith(FAMILIES)]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_right_environment_is_explained(clean):
    clean.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    clean.setenv("NVTE_EXT_MARGIN_SM", "8")
    clean.setenv("GLOO_SOCKET_IFNAME", "lo")
    clean.setenv("NCCL_SOCKET_IFNAME", "^lo,docker")
    clean.setenv("TORCH_NCCL_ENABLE_TIMING", "1")  # harmless with several queues
    found = of_environment(side_by_side=True)
    assert problems(found) == []
    text = "\n".join(one.text for one in found)
    assert "NVTE_EXT_MARGIN_SM=8: matrix products leave so many multiprocessors to NCCL" in text
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32: so many queues" in text


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": " 1"}, ["is ' 1'", "write a number from 1 to 32"]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["is '1'", "fly side by side", "use 32"]),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, ["each launch waits", "unset it"]),
        ({"TORCH_NCCL_BLOCKING_WAIT": "True"}, ["stands still in each wait", "unset it"]),
        ({"TORCH_DISTRIBUTED_DEBUG": "detail"}, ["is 'detail'", "compare each collective", "unset it"]),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, ["wait for it for ever", "unset it"]),
        ({"NCCL_P2P_DISABLE": "1"}, ["without NVLink", "unset it"]),
        ({"NCCL_P2P_LEVEL": "LOC"}, ["is 'LOC'", "without NVLink", "unset it"]),
        ({"NCCL_BLOCKING_WAIT": "1"}, ["stands still in each wait", "unset it"]),
        ({"NCCL_SHM_DISABLE": "1"}, ["speak by the network", "unset it"]),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ["each allocation waits", "unset it"]),
        ({"OMP_NUM_THREADS": "all"}, ["is 'all'", "no number of threads", "cores / ranks"]),
        ({"GLOO_SOCKET_IFNAME": "nowhere0"}, ["is 'nowhere0'", "no interface of this machine", "ip link"]),
        ({"NCCL_SOCKET_IFNAME": "=nowhere0"}, ["is '=nowhere0'", "no interface of this machine", "ip link"]),
    ],
)
def test_a_variable_that_harms_is_named(clean, variables, words):
    for name, value in variables.items():
        clean.setenv(name, value)
    (found,) = problems(of_environment(side_by_side=True))
    assert next(iter(variables)) in found and all(word in found for word in words), found


def test_timing_in_one_queue_and_unused_adapters_are_named(clean):
    from doctoring.environment import Seen, judged

    variables = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_ENABLE_TIMING": "1", "NCCL_IB_DISABLE": "1"}
    timing, adapter = problems(judged(Seen(variables, ["lo", "eth0"], ["mlx5_0"], side_by_side=False)))
    assert "TORCH_NCCL_ENABLE_TIMING is '1'" in timing and "143890" in timing
    assert "NCCL_IB_DISABLE is '1': NCCL goes by TCP though there is InfiniBand" in adapter
    assert len(problems(judged(Seen(variables, ["lo", "eth0"], [], side_by_side=False)))) == 1  # negative control


def test_adapters_and_levels_are_read_as_nccl_does(clean):
    from doctoring.environment import Seen, judged

    def wrong(adapters: list[str], **variables: str) -> list[str]:
        return problems(judged(Seen(variables, ["lo", "eth0"], adapters, side_by_side=False)))

    four = [f"mlx5_{number}" for number in range(4)]
    for right in ("mlx5", "mlx5_1:1,mlx5_3:1", "^mlx5_0", "=mlx5_2", "^=mlx5"):
        assert wrong(four, NCCL_IB_HCA=right) == []
    for names in ("mlx4", "^mlx5", "=mlx5", "mlx5_99:1"):
        (found,) = wrong(four, NCCL_IB_HCA=names)
        assert found.startswith(f"NCCL_IB_HCA is '{names}': no InfiniBand adapter of this machine has such a name")
        assert found.endswith("name one of ibstat -l")
        assert wrong([], NCCL_IB_HCA=names) == []  # where there is none, no name would mend it
    (found,) = wrong(four, NCCL_NET_GDR_LEVEL="LOC")
    assert "by way of host memory, though there is InfiniBand; unset it" in found
    assert wrong(four, NCCL_NET_GDR_LEVEL="SYS", NCCL_P2P_LEVEL="NVL") == [] == wrong([], NCCL_NET_GDR_LEVEL="LOC")


def test_what_a_variable_does_is_said_or_that_nobody_knows(clean):
    clean.setenv("NCCL_SOMETHING_NEW", "7")
    clean.setenv("NCCL_VERSION", "2.27")
    clean.setenv("NCCL_MAX_CTAS", "4")
    clean.setenv("NCCL_P2P_DISABLE", "1")  # a problem hides nothing else
    found = of_environment()
    assert ["P2P_DISABLE" in one for one in problems(found)] == [True]
    assert [one.text for one in found if one.status is Status.NOT_TRIED] == [
        "what these do to overlap is not known here: NCCL_SOMETHING_NEW"
    ]
    assert any(one.text.startswith("NCCL_MAX_CTAS=4: collectives take at most") for one in found)


def test_ranks_with_other_variables_are_named(clean):
    from doctoring.environment import Environment

    job: Any = SimpleNamespace(flags=None)
    one = Environment().look(job)
    clean.setenv("NCCL_ALGO", "Ring")
    (found,) = problems(Environment().judge(job, [one, Environment().look(job)]))
    assert "NCCL_ALGO is not set on rank 0 and Ring on rank 1; set it alike on every node" in found


# --- flags -----------------------------------------------------------------------------------------------------------


def of_flags(given: list[str]) -> list[tuple[str, str, str]]:
    """In a process of its own: Megatron's flags are global."""
    from argparse import Namespace

    from doctoring.flags import FlagsCheck, read

    from megatron_scmoe.job.meeting import Meeting

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    meeting = Meeting(Namespace(rank=0, world_size=1, distributed_timeout_minutes=1))
    job: Any = SimpleNamespace(flags=read(given, meeting))
    seen = json.loads(json.dumps(FlagsCheck().look(job)))
    return [(one.status, one.text, one.fix) for one in FlagsCheck().judge(job, [seen, seen])]


def test_right_flags_are_taken_and_changes_are_shown():
    given = with_flags(SCMOE, "--eval-iters 0", "--moe-every 2", "--sequence-parallel")
    (found,) = ranks.run(of_flags, 1, given, distributed=False)
    assert {status for status, *_ in found} == {"ok"} and "pretrain_gpt_scmoe.py takes them" in found[0][1]
    text = "\n".join(text for _, text, _ in found)
    assert "--sequence-parallel: True is requested, False is in effect" in text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (with_flags(SCMOE, "--num-layers 3"), ["refuses: groups must be whole", "3"]),
        (with_flags(STOCK, "--moe-evry 2"), ["refuses: unrecognized arguments: --moe-evry 2"]),
        (with_flags(STOCK, "--save /proc/none", "--save-interval 1"), ["--save is /proc/none", "give another folder"]),
    ],
)
def test_flags_that_the_script_refuses_are_a_problem(given, words):
    (found,) = ranks.run(of_flags, 1, given, distributed=False)
    ((status, text, fix),) = found
    assert status == "problem" and fix and all(word in f"{text}; {fix}" for word in words), found


def of_other_ranks() -> Any:
    """Three ranks, of which each has its own learning rate; and of which one refuses."""
    from dataclasses import replace

    from doctoring.flags import FlagsCheck
    from doctoring.job import Flags

    flags = Flags(["--lr", "1"], meant={"--lr": "1"})
    others = ([flags, flags, replace(flags, meant={"--lr": "2"})], [flags, flags, Flags([], refused="no; use 3")])
    found = []
    for of_job in others:
        seen = [FlagsCheck().look(SimpleNamespace(flags=one)) for one in of_job]  # type: ignore[arg-type]
        found.append(problems(FlagsCheck().judge(None, seen)))  # type: ignore[arg-type]
    return found


def test_ranks_with_other_flags_are_named():
    (different,), (refused,) = of_other_ranks()
    assert "--lr is 1 on ranks 0-1 and 2 on rank 2; start every node with the same command line" in different
    assert "rank 2: pretrain_gpt_scmoe.py refuses: no; use 3" in refused


def test_no_flags_are_not_tried():
    from doctoring.flags import FlagsCheck

    job: Any = SimpleNamespace(flags=None)
    (found,) = FlagsCheck().judge(job, [FlagsCheck().look(job)] * 2)
    assert found.status is Status.NOT_TRIED and "no flags were given" in found.text


# --- binding ---------------------------------------------------------------------------------------------------------


def of_rank(cores: list[int], *, gpu: str = "", node: int = -1, nodes: tuple[int, ...] = (0,), host: str = "a") -> Any:
    found = {"host": host, "cores": cores, "of": 8, "threads": 2, "nodes": nodes}
    return found | {"gpu": {"uuid": gpu, "node": node} if gpu else None}


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ([of_rank([0, 1]), of_rank([2, 3])], []),
        ([of_rank([0, 1, 2, 3]), of_rank([0, 1, 2, 3])], []),
        ([of_rank([0, 1]), of_rank([0, 1], host="b")], []),
        ([of_rank([0, 1], gpu="x", node=0), of_rank([2, 3], gpu="y", node=0)], []),
        (
            [of_rank([0, 1]), of_rank([1, 2])],
            ["ranks 0-1 on a: 4 threads share cores 0-2", "OMP_NUM_THREADS to at most 1"],
        ),
        ([of_rank([0, 1]), of_rank([2, 3]), of_rank([2, 3])], ["ranks 1-2 on a: 4 threads share cores 2-3"]),
        ([of_rank([0])], ["rank 0 on a: 2 threads share core 0"]),
        ([of_rank([0, 1], gpu="x"), of_rank([2, 3], gpu="x")], ["ranks 0-1 on a share GPU x", "LOCAL_RANK"]),
        ([of_rank([0, 1], gpu="x", node=1)], ["rank 0 on a: its cores are on NUMA node 0", "numactl --cpunodebind=1"]),
    ],
)
def test_ranks_that_share_cores_or_gpus_are_named(seen, words):
    from doctoring.binding import Binding

    job: Any = None
    findings = Binding().judge(job, seen)
    found = problems(findings)
    assert len(found) == bool(words) and all(word in found[0] for word in words), found
    untried = [one.text for one in findings if one.status is Status.NOT_TRIED]
    unknown = all(one["gpu"] is None or one["gpu"]["node"] < 0 for one in seen)
    assert len(untried) == unknown and (not unknown or "no GPU here" in untried[0] or "NUMA nodes" in untried[0])


def test_the_binding_of_a_process_is_seen():
    """Two ranks that are bound to one core, as by a wrong --cpu-bind, and to all cores of this machine."""
    import torch
    from doctoring.binding import Binding, numa_nodes, parsed

    job: Any = SimpleNamespace(host="a", has_cuda=False)
    usable, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = Binding().look(job)
        os.sched_setaffinity(0, {min(usable)})
        bound = Binding().look(job)
    finally:
        os.sched_setaffinity(0, usable)
        torch.set_num_threads(threads)
    assert problems(Binding().judge(job, [whole])) == []
    (found,) = problems(Binding().judge(job, [bound, bound]))
    assert f"ranks 0-1 on a: 2 threads share core {min(usable)}" in found
    assert parsed("0-2,5,7-8\n") == [0, 1, 2, 5, 7, 8] and isinstance(numa_nodes(usable), list)


# --- storage ---------------------------------------------------------------------------------------------------------


def of_folder(folder: Path, *, free_bytes: int = 1, sees_rank_0: bool = True) -> list[str]:
    from doctoring import storage

    found = storage.tried(storage.existing(str(folder))) | {"path": str(folder), "sees_rank_0": sees_rank_0}
    findings = storage.judged("--save", "a", found, free_bytes)
    assert list(folder.glob(".doctor-*")) == []
    return problems(findings)


def test_a_right_folder_is_one(tmp_path):
    assert of_folder(tmp_path) == [] and of_folder(tmp_path / "new" / "newer") == []


def test_a_full_or_strange_folder_is_named(tmp_path, monkeypatch):
    from doctoring import storage

    (full,) = of_folder(tmp_path, free_bytes=10**18)
    assert f"--save is in {tmp_path} on a: " in full and " are free, and " in full and "make room" in full
    (elsewhere,) = of_folder(tmp_path, sees_rank_0=False)
    assert "a file that rank 0 wrote there is not seen" in elsewhere and "that all nodes share" in elsewhere
    (denied,) = of_folder(Path("/proc/self"))
    assert "writing and renaming a file ends with: " in denied and "another file system" in denied
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: self.unlink())
        (torn,) = of_folder(tmp_path)
        assert "renamed over another one reads as the other one" in torn
    for number, fix in (
        (errno.ENOSPC, "make room"),
        (errno.EACCES, "a folder that this user may write to"),
        (errno.ESTALE, "another file system"),
    ):
        with monkeypatch.context() as patch:

            def fail(*_args: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            patch.setattr(Path, "write_bytes", fail)
            (failed,) = of_folder(tmp_path)
            assert os.strerror(number) in failed and fix in failed
            patch.setattr(storage.os, "statvfs", fail)
            assert of_folder(tmp_path) == [failed]
            patch.setattr(Path, "is_dir", fail)
            patch.setattr(Path, "exists", fail)
            assert storage.existing(str(tmp_path)) == tmp_path and not storage._is_there(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(*_args: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        patch.setattr(fcntl, "lockf", refuse)
        (no_locks,) = of_folder(tmp_path)
        assert "locking a file ends with: No locks available" in no_locks and "mounted with locks" in no_locks
        patch.setattr(fcntl, "lockf", lambda *_: None)  # as on a file system whose locks nobody else sees
        assert "two processes lock the same file" in of_folder(tmp_path)[0]
    status = os.statvfs(tmp_path)
    monkeypatch.setattr(
        storage.os, "statvfs", lambda _: SimpleNamespace(f_bavail=9, f_frsize=9, f_blocks=9, f_favail=0, f_files=9)
    )
    assert "want of inodes" in of_folder(tmp_path)[0] and status.f_bavail


@pytest.mark.parametrize(
    ("options", "fails", "fix"),
    [
        ("size=1536k", "No space left on device", "make room, or give another folder"),
        ("size=64m,nr_inodes=2", "No space left on device", "make room, or give another folder"),
        ("size=64m,ro", "Read-only file system", "give a folder that this user may write to"),
        ("size=64m", "", ""),
    ],
)
def test_a_file_system_that_is_full_or_read_only_is_named(tmp_path, options, fails, fix):
    """A real one; of the last there is enough, and nothing is wrong with it."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    try:
        found = of_folder(tmp_path, free_bytes=50 * 10**6)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert len(found) == bool(fails) and all(fails in one and one.endswith(fix) for one in found), found


@pytest.mark.parametrize(("options", "words"), [("size=64m", "64.0 MiB, and 1.0 GiB are needed"), ("size=2g", "")])
def test_shared_memory_of_a_container_is_seen(tmp_path, monkeypatch, options, words):
    from doctoring import storage

    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode()}")
    monkeypatch.setattr(storage, "SHARED_MEMORY", tmp_path)
    job: Any = SimpleNamespace(host="a", args=None, flags=None, local_rank=0)
    try:
        found = problems(storage.Storage().judge(job, [storage.Storage().look(job)]))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert len(found) == bool(words) and all(words in one and "--shm-size" in one for one in found), found


def test_small_shared_memory_is_named():
    from doctoring import storage

    (found,) = problems(storage.judged_shared("a", {"total": 64 << 20, "fails": ""}))
    assert "/dev/shm on a has 64.0 MiB, and 1.0 GiB are needed" in found and "--ipc=host" in found
    assert problems(storage.judged_shared("a", {"total": 8 << 30, "fails": ""})) == []
    assert problems(storage.judged_shared("a", {"total": 0, "fails": "it is not there"}))


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_wall_clocks_that_differ_are_named():
    from doctoring.clocks import judged_walls

    walls = [[100.0, 101.0, 102.0], [100.2, 101.0, 102.0], [100.0, 101.1, 102.0], [90.0, 91.0, 92.1]]
    (found,) = problems(judged_walls(HOSTS, walls))
    assert found == "rank 3 on b: the clock is 10.0 s behind the others'; let chrony or ntpd set it"
    for far in (1.9, 1.1):  # each less than a second from the middle
        (found,) = problems(judged_walls(HOSTS, [[100.0], [100.0], [100.0 + far], [100.0 + far]]))
        assert found.startswith(f"ranks 2-3 on b: the clock is {far} s ahead of the others'")
    assert len(problems(judged_walls(["a", "b", "c"], [[100.0], [99.4], [100.6]]))) == 2
    (right,) = judged_walls(HOSTS[:3], walls[:3])
    assert right.status is Status.OK and "within 0.0" in right.text


def test_a_rank_that_computes_slowly_is_named():
    from doctoring.clocks import judged_speeds

    assert problems(judged_speeds(HOSTS, [0.001, 0.0012, 0.0023, 0.0019])) == []
    (found,) = problems(judged_speeds(HOSTS, [0.001, 0.0012, 0.0045, 0.0019]))
    assert "rank 2 on b takes 4.50 ms for a product that takes 1.20 ms elsewhere" in found
    (found,) = problems(judged_speeds(["a", "b"], [0.1, 0.001]))
    assert "rank 0 on a takes 100.00 ms for a product that takes 1.00 ms elsewhere" in found
    slow_half = problems(judged_speeds(HOSTS, [0.001, 0.001, 0.1, 0.1]))
    assert [line[:11] for line in slow_half] == ["rank 2 on b", "rank 3 on b"]


def test_a_throttled_gpu_is_named(monkeypatch, tmp_path):
    from doctoring import gpu
    from doctoring.clocks import Clocks, throttles

    fake(tmp_path / "nvidia-smi", "echo GPU-1, 0x0000000000000048, 91; echo GPU-2, 0x0000000000000005, 60")
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = gpu.asked("clocks_throttle_reasons.active", "temperature.gpu")
    hot, idle = ({"throttles": throttles(bits), "temperature": degrees} for bits, degrees in asked.values())
    job: Any = SimpleNamespace(has_cuda=True)
    of_all = {"walls": [1.0], "product_s": 0.1}
    seen = [{"host": "a"} | of_all | idle, {"host": "b"} | of_all | hot]
    (found,) = problems(Clocks().judge(job, seen))
    assert "rank 1 on b: its GPU is throttled: hardware slowdown and hardware thermal slowdown, at 91 degrees" in found
    (unseen,) = [
        one for one in Clocks().judge(job, [*seen, seen[0] | {"throttles": None}]) if one.status == "not tried"
    ]
    assert unseen.text == "throttling: nvidia-smi says nothing of the GPUs of rank 2"
    fake(tmp_path / "nvidia-smi", "echo broken; exit 9")
    assert gpu.asked("temperature.gpu") == {}
    (tmp_path / "nvidia-smi").unlink()
    assert gpu.asked("temperature.gpu") == {}


# --- links -----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40))
def test_in_a_tournament_each_meets_each_once(players):
    met = []
    for game in range(links.games(players)):
        for rank in range(players):
            other = links.opponent(rank, players, game)
            if other is not None:
                assert links.opponent(other, players, game) == rank != other
                met.append((rank, other))
    assert sorted(met) == [pair for pair in itertools.product(range(players), repeat=2) if pair[0] != pair[1]]


def rates(number: int, **slow: float) -> dict[links.Link, float]:
    """25 MB/s, and of links and ranks what ``slow`` says: l0_3 is a link, r2 a rank."""
    found = {}
    for link in itertools.combinations(range(number), 2):
        factors = [one for name, one in slow.items() if name in (f"l{link[0]}_{link[1]}", f"r{link[0]}", f"r{link[1]}")]
        found[link] = 25e6 * min(factors, default=1.0)
    return found


@pytest.mark.parametrize(
    ("of", "slow_ranks", "slow_links"),
    [
        (rates(4), [], []),
        (rates(4, r2=0.6), [], []),
        (rates(4, r2=0.1), [2], []),
        (rates(3, r0=0.1), [0], []),
        (rates(8, r2=0.1, r5=0.3), [2, 5], []),
        (rates(4, l0_3=0.1), [], [(0, 3)]),
        (rates(8, r7=0.1, l0_3=0.4), [7], [(0, 3)]),
        (rates(2), [], []),
    ],
)
def test_slow_links_and_ranks_are_told_apart(of, slow_ranks, slow_links):
    assert links.slow(of) == (slow_ranks, slow_links)


def test_links_within_hosts_are_no_measure_for_those_between():
    between = rates(4)
    within = between | {(0, 1): 400e6, (2, 3): 400e6}
    assert problems(links.judged(within, HOSTS)) == []
    (found,) = problems(links.judged(within | {(0, 2): 2e6}, HOSTS))
    assert "the link between hosts from rank 0 (a) to rank 2 (b) carries 2.0 MB/s, and 25.0 MB/s is usual" in found
    (found,) = problems(links.judged(rates(4, r2=0.1), ["a"] * 4))
    assert "rank 2 (a): most links within a host are slow: they carry 2.5 MB/s, and 25.0 MB/s is usual" in found
    assert "ethtool" in found


def test_a_group_whose_collectives_are_slow_is_named():
    of_kind = {(0, 1): 0.010, (2, 3): 0.011, (4, 5): 0.030}
    (found,) = problems(links.judged_groups({"tp all-reduce": of_kind}, 1 << 20))
    assert "tp all-reduce of ranks 4-5 takes 30.0 ms, and 11.0 ms are usual" in found
    (found,) = problems(links.judged_groups({"ep all-to-all": {(0, 1): 0.010, (2, 3): 0.050}}, 1 << 20))
    assert "ep all-to-all of ranks 2-3 takes 50.0 ms, and 10.0 ms are usual" in found
    (right,) = links.judged_groups({"tp all-reduce": of_kind | {(4, 5): 0.012}}, 1 << 20)
    assert right.status is Status.OK and "3 x 2 ranks, 1024 KiB each: 11.0 ms, 12.0 ms at most" in right.text


# --- step and overlap ------------------------------------------------------------------------------------------------


def norms(*own: float, norm: float = 2.0, replicas: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
    replicas = replicas or tuple(range(len(own)))
    return [{"host": "a", "own": one, "norm": norm, "replicas": replicas} for one in own]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (norms(1.0, 1.0 + 1e-6, 1.0), []),
        (norms(*(1.0 + 0.9e-4 * step for step in (0, 2, 1))), ["rank 1 on a computed a gradient norm of 1.00018"]),
        (
            [*norms(1.0), *norms(1.0, norm=2.00018), *norms(1.0, norm=2.00036)],
            ["summed over all ranks, is 2 on ranks 0-1; 2.00036 on rank 2"],
        ),
        (
            norms(1.0, 1.01, 1.0),
            ["rank 1 on a computed a gradient norm of 1.01, and others 1 of the same tokens", "dcgmi"],
        ),
        (
            norms(1.0, 1.01),
            ["ranks 0-1 computed gradient norms of the same tokens that differ: rank 0 on 1; rank 1 on 1.01", "dcgmi"],
        ),
        (norms(1.0, 1.01, 1.0, 1.01), ["that differ: ranks 0, 2 on 1; ranks 1, 3 on 1.01; one's memory"]),
        (norms(1.0, 1.0, 1.1, 1.2), ["that differ: ranks 0-1 on 1; rank 2 on 1.1; rank 3 on 1.2"]),
        (norms(1.0, float("nan"), 1.0), ["rank 1: the gradient norm of a tiny step is no number", "dcgmi"]),
        (
            [*norms(1.0), *norms(1.0), *norms(1.0, norm=2.1)],
            ["summed over all ranks, is 2 on ranks 0-1; 2.1 on rank 2", "set NCCL_NVLS_ENABLE=0"],
        ),
    ],
)
def test_gradient_norms_that_differ_are_named(seen, words):
    from doctoring.step import judged

    found = problems(judged(seen))
    assert len(found) == bool(words) and all(word in found[0] for word in words), found


def test_overlap_that_hides_less_than_predicted_is_named():
    from doctoring.overlap import Overlap, judged

    right = {"ranks": 2, "step_s": 0.1, "communication_s": 0.02, "hidden": 0.8, "predicted": 0.9}
    assert judged(right).status is Status.OK
    job: Any = None
    (found,) = problems(Overlap().judge(job, [right, right | {"hidden": 0.1}]))
    assert "rank 1: 2 ranks, a step of 100.0 ms: 10% of 20.0 ms of communication hidden, 90% predicted" in found
    assert "see check environment" in found
    little = judged(right | {"communication_s": 1e-4, "hidden": 0.0})
    assert little.status is Status.NOT_TRIED and "too little of it to tell" in little.text
    assert judged({}).status is Status.NOT_TRIED


# --- the watch -------------------------------------------------------------------------------------------------------


def ended(limit_s: float, number: int | None, hopeless: str) -> tuple[int, str]:
    """Exit code and report of a process whose main thread waits in C, where no handler of Python's runs."""
    import ctypes

    from doctoring.watch import Watch

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        report = lambda why: os.write(writer, why.encode())  # noqa: E731

        def look() -> str:
            if hopeless == "gone":
                raise dist.DistNetworkError("Connection reset by peer\nat 0x0")
            return hopeless

        with Watch(report, look, 0) as watch, watch.limited(limit_s):
            os.write(writer, b"!")
            until_s = time.monotonic() + 20
            while time.monotonic() < until_s:  # EINTR ends one sleep
                ctypes.CDLL(None).sleep(20)
        os._exit(77)
    assert os.read(reader, 1) == b"!"
    if number is not None:
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    return code, os.read(reader, 1000).decode()


@pytest.mark.parametrize(
    ("limit_s", "number", "hopeless", "expected"),
    [
        (0.3, None, "", (1, "not over after 0 s")),
        (60.0, signal.SIGTERM, "", (143, "stopped by SIGTERM")),
        (60.0, signal.SIGINT, "", (130, "stopped by SIGINT")),
        (60.0, None, "rank 3 has failed", (1, "rank 3 has failed")),
        (60.0, None, "gone", (1, "the job's store is gone, with the first node: Connection reset by peer")),
    ],
)
def test_what_waits_for_ever_ends_with_a_report(limit_s, number, hopeless, expected):
    assert ranks.run(ended, 1, limit_s, number, hopeless, distributed=False) == [expected]


def arguments(report: Path) -> Any:
    return tool.make_parser().parse_args(["--only", "environment", "--json", str(report)])


def alone() -> Any:
    """The module of a rank that is alone and has met nobody yet."""
    from doctoring import rank

    rank.be_alone()
    return rank


def stopped_behind_its_report(report: Path) -> int:
    from megatron_scmoe.job.meeting import Meeting

    rank = alone()

    def wait(_meeting: Meeting, key: Any, _ranks: Any) -> list[int]:
        if key is rank._left:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return []

    Meeting.missing = wait  # type: ignore[method-assign,assignment]
    return exit_code("doctor.py", lambda: rank.run_rank(arguments(report), ["environment"], None))


def test_a_signal_takes_no_report_back(tmp_path):
    assert ranks.run(stopped_behind_its_report, 1, tmp_path / "x", distributed=False) == [143]
    assert [one["name"] for one in json.loads((tmp_path / "x").read_text())["checks"]] == ["environment"]


# --- the start -------------------------------------------------------------------------------------------------------


def started(report: Path, local_rank: int) -> int:
    """Exit code of a rank on a machine of two GPUs, where the start ends with which one is taken."""
    rank = alone()
    os.environ["LOCAL_RANK"] = f"{local_rank}"

    def take(number: int) -> None:
        raise rank.ConfigError(f"GPU {number} is taken; all is well")

    torch.cuda.is_available = lambda: True  # behind the imports, which go by what there is
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = take
    return rank.run_rank(arguments(report), ["environment"], None)


@pytest.mark.parametrize(
    ("local_rank", "text", "fix"),
    [
        (1, "GPU 1 is taken", "all is well"),
        (2, "a rank needs a GPU of its own: LOCAL_RANK is 2 and 2 GPUs are visible on ", "start at most 2 ranks there"),
    ],
)
def test_a_rank_takes_its_gpu_or_the_start_is_refused(tmp_path, local_rank, text, fix):
    assert ranks.run(started, 1, tmp_path / "x", local_rank, distributed=False) == [1]
    found = json.loads((tmp_path / "x").read_text())
    (check,) = found["checks"]
    (finding,) = check["findings"]
    assert not found["ready"] and check["name"] == "start" and check["status"] == "problem"
    assert finding["text"].startswith(text) and finding["fix"].startswith(fix)


def unmet(report: Path) -> tuple[int, str]:
    """Exit code and last line of a rank whose store never answers."""
    from megatron_scmoe.job.meeting import Meeting

    rank = alone()
    rank.MEETING_S = 0.1
    asked = arguments(report)
    asked.check_seconds = asked.network_seconds = 0.05
    Meeting.store = property(lambda _self: time.sleep(20))  # type: ignore[assignment]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = os.fdopen(writer, "w")
        rank.run_rank(asked, ["environment"], None)
        os._exit(77)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    return code, os.read(reader, 1000).decode()


def test_a_rank_that_meets_nobody_ends_with_a_line(tmp_path):
    ((code, line),) = ranks.run(unmet, 1, tmp_path / "x", distributed=False)
    assert (code, line.split(".py: ")[-1]) == (1, "ended: before the first check: not over after 0 s\n"), line
    assert not json.loads((tmp_path / "x").read_text())["ready"]


def test_a_rank_that_is_told_half_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    code, _, error = main([], capsys)
    assert code == 2 and "RANK is set and LOCAL_RANK not; start it with torchrun" in error
    for local_rank, rank in (("0", "2"), ("0", "x"), ("-1", "1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", rank)
        code, _, error = main([], capsys)
        assert code == 2 and f"RANK '{rank}', LOCAL_RANK '{local_rank}' and WORLD_SIZE '2' are no place" in error


def test_the_watch_leaves_no_trace():
    from doctoring.watch import Watch

    handler = signal.getsignal(signal.SIGTERM)
    with Watch(lambda why: pytest.fail(why), str, 0) as watch:
        with watch.limited(60.0):
            pass
        with contextlib.suppress(ZeroDivisionError), watch.limited(0.05):
            raise ZeroDivisionError
        time.sleep(0.5)  # behind the limit nothing ends
    assert signal.getsignal(signal.SIGTERM) is handler and signal.set_wakeup_fd(-1) == -1


def test_what_is_no_number_is_a_word_in_json():
    from doctoring.examination import Outcome
    from doctoring.report import as_json

    seen = [{"norm": float("nan"), "walls": [1.0, float("inf")], "host": "a"}]
    written = json.loads(
        json.dumps(as_json([Outcome("step", [problem("bad", "mend")], 1.0, seen)], 1), allow_nan=False)
    )
    assert written["checks"][0]["seen"] == [{"norm": "nan", "walls": [1.0, "inf"], "host": "a"}]


def test_not_tried_is_never_ok():
    from doctoring.examination import Outcome
    from doctoring.report import is_ready

    assert Outcome("x", [not_tried("no GPU")]).status is Status.NOT_TRIED
    assert Outcome("x", [not_tried("no GPU"), ok("fine")]).status is Status.OK
    assert Outcome("x", [ok("fine"), problem("bad", "mend")]).status is Status.PROBLEM
    assert is_ready([Outcome("x", [not_tried("no GPU")])]) and not is_ready([Outcome("x", [problem("bad", "mend")])])
