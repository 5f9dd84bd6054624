"""How much of an all-to-all runs beside computation, as torch's profiler sees it, and what a step takes.

`overlap_steps.py` measures each plan, those that launch within or behind the op at the tap among them, with transfers
of 450 us and some with 80 us, with 32 CUDA queues; what depends on them once more with one
(CUDA_DEVICE_MAX_CONNECTIONS=1, Megatron's choice with tensor parallelism). Transfers that hold 8, 16 or 32
multiprocessors, on a stream of normal or high priority, show what NCCL's kernels take from matrix products; costs, what
encode, decode and launches take on the compute lane; and marks, what the host takes for a group. The numbers are the
result. Checked is that every plan runs in its order, that transfers take as long as they should, that fixed overlap
hides most of a long one, and that the report says what the profiler says, to 0.2.

Mutants: another plan's order, costs of nothing, transfers twice as long, no overlap. Without a GPU a tiny model runs
every plan; nothing is traced. Not here: NCCL's own kernels, links of several GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import checks
import device
from device import HAS_CUDA

LIMITS_S = {32: 56.0, 1: 25.0}
"""By CUDA's queues."""

Numbers = dict[str, float]


def measure(connections: int, found: dict[str, dict]) -> None:
    """Put what `overlap_steps.py` finds with so many queues into ``found``; without a GPU, in this process."""
    if not HAS_CUDA:
        device.prepare()
        import overlap_steps

        found |= overlap_steps.measure_all(one_queue=connections == 1)
        return
    with tempfile.TemporaryDirectory(prefix="gpu-overlap-") as folder:
        path = Path(folder, "found.json")
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "overlap_steps", str(path)],
                env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": str(connections)},
                timeout=LIMITS_S[connections],
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            if path.exists():
                found |= json.loads(path.read_text())
        assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-1500:]}"


def same_order(recorded: list, planned: list) -> None:
    assert [list(step) for step in recorded] == [list(step) for step in planned], f"{recorded}, planned {planned}"


def costs_are_there(costs: dict[str, Numbers]) -> None:
    for direction, its in costs.items():
        missing = [step for step in ("encode", "experts", "decode") if not its[step] > 0]
        assert not missing, f"{direction} has no time of {missing}"


def transfers_last(numbers: Numbers, *, asked: float = 1.0) -> None:
    lasted, wanted = numbers["transfers_ms"], asked * numbers["transfers_asked_ms"]
    assert 0.95 * wanted < lasted < 1.3 * wanted + 0.3, f"transfers last {lasted:.2f} ms, asked for {wanted:.2f}"


def most_is_hidden(numbers: Numbers) -> None:
    assert numbers["hidden_share"] > 0.5, f"{numbers['hidden_share']:.2f} of the transfers is hidden"


def report_agrees(numbers: Numbers) -> None:
    difference = abs(numbers["hidden_share"] - numbers["reported_share"])
    assert difference < 0.2, f"profiler {numbers['hidden_share']:.2f}, report {numbers['reported_share']:.2f}"


def judge(checked: checks.Checks, where: str, found: dict[str, dict]) -> None:
    """What was found with some number of queues: figures and checks."""
    for kind in ("steps", "costs"):
        for name, numbers in found[kind].items():
            checked.figure(f"{where}: {kind} of {name}", numbers)
    for name, (recorded, planned) in found["orders"].items():
        checked.holds(f"{where}: {name} runs in its order", partial(same_order, recorded, planned))
    if not {"fixed", "behind"} <= found["orders"].keys():
        return  # it ended before these, which is a check that has failed
    another = partial(same_order, found["orders"]["fixed"][0], found["orders"]["behind"][1])
    checked.must_fail(f"{where}: another plan's order", another)
    for name, costs in found["costs"].items():
        checked.holds(f"{where}: costs of {name}", partial(costs_are_there, costs))
    if found["costs"]:
        nothing = {"forward": dict.fromkeys(found["costs"]["pos2"]["forward"], 0.0)}
        checked.must_fail(f"{where}: costs of nothing", partial(costs_are_there, nothing))
    if not HAS_CUDA:
        checked.not_run(f"{where}: what the profiler sees", "no GPU, whose kernels it would trace")
        return
    long, off = found["steps"]["fixed, 450 us"], found["steps"]["off, 450 us"]
    for name, numbers in found["steps"].items():
        if name.startswith("fixed, 450 us"):
            checked.holds(f"{where}: transfers last as long as they should, {name}", partial(transfers_last, numbers))
    checked.must_fail(f"{where}: transfers twice as long", partial(transfers_last, long, asked=2.0))
    checked.holds(f"{where}: fixed overlap hides most", partial(most_is_hidden, long))
    checked.holds(f"{where}: the report agrees", partial(report_agrees, long))
    checked.must_fail(f"{where}: no overlap", partial(most_is_hidden, off))


def part(checked: checks.Checks) -> None:
    """Each setting of CUDA's queues, that with most to be seen first; without CUDA it has none."""
    for connections in LIMITS_S if HAS_CUDA else (32,):
        where = f"CUDA_DEVICE_MAX_CONNECTIONS={connections}" if HAS_CUDA else "dry run"
        found: dict[str, dict] = {}
        checked.holds(f"{where}: measured", partial(measure, connections, found))
        if found:
            judge(checked, where, found)


if __name__ == "__main__":
    checks.run_part(part)
