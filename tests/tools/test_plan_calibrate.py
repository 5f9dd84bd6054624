"""tools/plan.py --calibrate: what was measured is priced as measured, and what was not is said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ranks
from commands import run as run_command
from training import ROOT

TOOL = ROOT / "tools" / "plan.py"
sys.path.insert(0, str(TOOL.parent))
from command_line import UserError  # noqa: E402
from planning import bench, calibrate, hardware, links  # noqa: E402
from planning.kernels import Clock  # noqa: E402
from planning.training import Precision  # noqa: E402

H100 = hardware.machine("H100")
CPU = {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
FAST = [(1 << 16, 1e-5), (1 << 27, 1e-3)]
"""Bytes and seconds of all-to-alls: about 134 GB/s in all."""


def test_a_measured_machine_prices_what_was_measured(tmp_path):
    path = tmp_path / "machine.json"
    done = run_command(TOOL, "--calibrate", path, env=CPU)
    assert done.returncode == 0 and f"plan with --machine {path}" in done.stdout, done.stderr
    kept = json.loads(path.read_text())
    machine = hardware.Machine.from_json(kept)
    for words in ("inside a node are not measured", "between nodes are not measured", "fp8 are not measured"):
        assert words in machine.source and words in done.stdout
    assert "are measured" not in machine.source and "from the table" not in machine.source  # a CPU has no row
    assert machine.source.startswith("measured on 1 rank (CPU), 1 a node; ")
    words = ["--recipe", "gpt2-moe-small", "--machine", path, "--memory", machine.hardware.memory / 2**31]
    shown = run_command(TOOL, *words, env=CPU)
    assert shown.returncode == 0 and f"constants: {machine.source} A step:" in " ".join(shown.stdout.split())
    by_op = {op: float(ms) / 1e3 for op, size, ms, *_ in kept["measured"]}
    clock = Clock(machine, Precision.BF16)
    assert clock.product(1024, 1024, 1024) == pytest.approx(by_op["product"], rel=0.02)
    assert clock.moving(2 << 26).seconds == pytest.approx(by_op["copy"], rel=0.02)
    slower = replace(machine, constants=replace(machine.constants, gemm=machine.constants.gemm / 2))
    assert Clock(slower, Precision.BF16).product(1024, 1024, 1024) > 1.5 * by_op["product"]  # negative control


def test_a_device_is_known_by_its_whole_name():
    for device, name in calibrate.DEVICES.items():
        assert calibrate.row_of(device, None) is hardware.HARDWARE[name]
    for other in ("NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GB20", "NVIDIA A30X", "B200"):
        with pytest.raises(UserError, match=f"no table has {other}: say whose peaks count, --gpu measured or one of"):
            calibrate.row_of(other, None)
        assert calibrate.row_of(other, "H100") is hardware.HARDWARE["H100"]
        assert calibrate.row_of(other, "measured") is None
    assert calibrate.row_of("NVIDIA GB200", None).domain == 72  # and not the B200 within its name
    assert calibrate.row_of(None, None) is None and calibrate.row_of(None, "measured") is None
    with pytest.raises(UserError, match="no GPU here, and --gpu says that peaks are those of H100"):
        calibrate.row_of(None, "H100")
    with pytest.raises(UserError, match="--gpu V100 is no row of the table: use measured, or one of A30-PCIe"):
        calibrate.row_of("NVIDIA H200", "V100")


@pytest.mark.parametrize("large_s", [1e-5, 0.5e-5])
def test_no_rate_is_made_of_times_that_have_none(large_s):
    assert links.rate_of(FAST, 8, "inside a node") == pytest.approx((2**27 - 2**16) * 7 / 8 / 0.99e-3)
    with pytest.raises(UserError, match=r"134,217,728 bytes took \d+\.0 us and 65,536 bytes 10\.0 us"):
        links.rate_of([FAST[0], (FAST[1][0], large_s)], 8, "inside a node")


def test_links_are_those_of_the_machines_nodes_and_what_is_not_measured_is_said():
    def with_links(nodes, nominal="from the table", **sent):
        return links.with_links(H100, nodes, {name.replace("_", " "): times for name, times in sent.items()}, nominal)

    both = with_links(links.Nodes(16, 4), inside_a_node=FAST, between_nodes=FAST)
    assert both.hardware.domain == 4 and H100.hardware.domain == 8  # the launcher's, not the table's
    assert both.hardware.link * both.constants.link == pytest.approx(links.rate_of(FAST, 4, ""))
    assert both.hardware.network * both.constants.network == pytest.approx(links.rate_of(FAST, 4, ""))
    assert both.source.count("are measured") == 2 and "not measured" not in both.source
    assert "of 450 from the table" in both.source
    assert both.constants.network > 1 and "faster than 50 from the table" in both.source
    one_node = with_links(links.Nodes(8, 8), inside_a_node=FAST)
    assert "between nodes are not measured: 50 GB/s of each rank, from the table" in one_node.source
    assert one_node.constants.network == H100.constants.network and one_node.constants.link != H100.constants.link
    one_each = with_links(links.Nodes(2, 1), "assumed", between_nodes=FAST)
    assert "inside a node are not measured: 450 GB/s of each rank, assumed" in one_each.source
    assert one_each.constants.link == H100.constants.link and one_each.hardware.domain == 1
    alone = with_links(links.Nodes(1, 1))
    assert alone.source.count("not measured") == 2 and alone.hardware == H100.hardware
    assert alone.constants == H100.constants


@pytest.mark.parametrize("local", ["", "3", "0", "two"])
def test_nodes_are_the_launchers(monkeypatch, local):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert links.Nodes.of_this_job() == links.Nodes(8, 4) and links.Nodes.of_this_job().count == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    with pytest.raises(UserError, match=f"LOCAL_WORLD_SIZE is {local or 'not set'} with 8 ranks; start as many"):
        links.Nodes.of_this_job()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert links.Nodes.of_this_job() == links.Nodes(1, 1)  # a rank alone needs no launcher


def members_and_calls(each):
    """Of this rank: the ranks of its groups, and what is timed of how many bytes, each op done once."""
    import torch.distributed as dist

    nodes = links.Nodes(dist.get_world_size(), each)
    groups = {where: dist.get_process_group_ranks(group) for where, group in nodes.groups().items()}
    timed = []

    def time(op, size, call):
        call()
        timed.append((op, size))
        return 1.0

    its = SimpleNamespace(device="cpu", time=time)
    sent = links.measure(its, nodes, [4096, 8192], lambda: timed.append("done"))
    return groups, timed, sent


def test_all_to_alls_run_within_nodes_and_between_them():
    found = ranks.run(members_and_calls, 4, 2)
    assert [groups["inside a node"] for groups, _, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [groups["between nodes"] for groups, _, _ in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    inside, between = "all-to-all inside a node", "all-to-all between nodes"
    calls = [call for name in (inside, between) for size in ("4 KiB", "8 KiB") for call in ((name, size), "done")]
    assert all(timed == calls for _, timed, _ in found)
    assert found[0][2] == {name: [(4096, 1.0), (8192, 1.0)] for name in ("inside a node", "between nodes")}
    one_node = ranks.run(members_and_calls, 2, 2)
    assert [list(groups) for groups, _, _ in one_node] == [["inside a node"]] * 2
    one_each = ranks.run(members_and_calls, 2, 1)
    assert [list(groups) for groups, _, _ in one_each] == [["between nodes"]] * 2


def nodes_of_two_sizes():
    import torch.distributed as dist

    return links.Nodes(2, 1 + dist.get_rank()).groups()


def test_nodes_of_two_sizes_are_refused():
    with pytest.raises(ranks.RankError, match="nodes have 1 to 2 ranks: start as many on each"):
        ranks.run(nodes_of_two_sizes, 2)


def test_products_in_fp8_are_priced_as_measured():
    size = 8192
    taken = Clock(H100, Precision.FP8).product(size, size, size)
    machine = calibrate.with_fp8(H100, size, 1.25 * taken)
    assert Clock(machine, Precision.FP8).product(size, size, size) == pytest.approx(1.25 * taken, rel=0.02)
    assert Clock(machine, Precision.BF16) != Clock(H100, Precision.BF16)  # another machine, the same price
    assert Clock(machine, Precision.BF16).product(size, size, size) == Clock(H100, Precision.BF16).product(
        size, size, size
    )
    assert "products in fp8 are measured" in machine.source and machine.hardware.fp4 == machine.hardware.fp8
    assert calibrate.with_fp8(hardware.machine("B200"), size, taken).hardware.fp4 == 9000e12
    unmeasured = calibrate.with_fp8(H100, size, None)
    assert unmeasured.hardware == H100.hardware and "products in fp8 are not measured" in unmeasured.source


def test_a_product_in_fp8_is_one():
    """The call that a GPU is measured with; torch has it for CPUs, too."""
    called = []
    its = bench.Bench()
    its.time = lambda op, size, call, **_: called.append((op, size, call().shape)) or 1.0
    assert bench.product_in_fp8_s(its, 64) == 1.0
    assert called == [("product in fp8", "64 x 64 x 64", (64, 64))]
    assert not its.has_fp8 or its.on_gpu


def test_peaks_of_a_gpu_are_refused_where_there_is_none(tmp_path):
    done = run_command(TOOL, "--calibrate", tmp_path / "machine.json", "--gpu", "H100", env=CPU)
    assert (done.returncode, done.stdout) == (2, "") and "there is no GPU here, and --gpu says" in done.stderr
    assert done.stderr.count("\n") == 1
