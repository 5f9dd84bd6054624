"""The rank pool itself: results, layouts, failures, and that no job leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

# ---- functions which run on the ranks


def exchange() -> list[int]:
    """Send 10 * own rank + destination to each destination."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty(size, dtype=torch.int64)
    dist.all_to_all_single(received, 10 * rank + torch.arange(size))
    return received.tolist()


def layout_sizes() -> dict[str, int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
        "ep_rank": parallel_state.get_expert_model_parallel_rank(),
        "rng_states": len(get_cuda_rng_tracker().get_states()),
    }


def leave_state_behind() -> int:
    """Set what a training run sets and what a careless test forgets."""
    from megatron.core import num_microbatches_calculator as microbatches
    from megatron.core.rerun_state_machine import initialize_rerun_state_machine
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.training import global_vars

    global_vars.set_args(object())
    microbatches.init_num_microbatches_calculator(0, None, 8, 2, 1)
    initialize_rerun_state_machine()
    get_moe_metrics_tracker()
    os.environ["RANKS_TEST_LEFTOVER"] = "1"
    os.chdir("/")
    sys.argv.append("--leftover")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    return os.getpid()


def found_state() -> dict[str, object]:
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_logging
    from megatron.training import global_vars

    return {
        "parallel_state": parallel_state.model_parallel_is_initialized(),
        "parallel_globals": [
            name
            for name, value in vars(parallel_state).items()
            if name.isupper() and name.startswith("_") and value not in (None, False, {}, [])
        ],
        "args": global_vars._GLOBAL_ARGS,
        "microbatches": num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR,
        "rerun": rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE,
        "rng_tracker": random._CUDA_RNG_STATE_TRACKER,
        "moe_metrics": moe_logging._MOE_METRICS_TRACKER,
        "environ": os.environ.get("RANKS_TEST_LEFTOVER"),
        "argv": sys.argv[1:],
        "directory": os.getcwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "draw": torch.rand(3),
        "pid": os.getpid(),
    }


def fail_on_rank_1() -> None:
    print(f"printed by rank {dist.get_rank()}")
    if dist.get_rank() == 1:
        raise ValueError("no good")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        fall_asleep()


def fall_asleep() -> None:
    time.sleep(600)


def die_on_rank_1(signal_number: int | None) -> None:
    if dist.get_rank() == 1:
        if signal_number is None:
            os._exit(3)
        os.kill(os.getpid(), signal_number)
    dist.barrier()


def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 2 for name, tensor in tensors.items()}


def process_id() -> int:
    return os.getpid()


# ---- tests


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_to_all(world_size: int) -> None:
    expected = [[10 * source + rank for source in range(world_size)] for rank in range(world_size)]
    assert ranks.run(exchange, world_size) == expected


def test_layout() -> None:
    layout = {
        "tensor_model_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "expert_tensor_parallel_size": 1,
    }
    sizes = ranks.run(layout_sizes, 4, layout=layout)
    expected = {"tp": 2, "ep": 4, "etp": 1, "dp": 2, "rng_states": 3}
    assert sizes == [expected | {"ep_rank": rank} for rank in range(4)]


def test_tensors_are_copied_by_value() -> None:
    tensors = {
        "float": torch.randn(300, 500),
        "bfloat16": torch.randn(4, dtype=torch.bfloat16),
        "strided": torch.arange(12).view(3, 4).t(),
        "empty": torch.empty(0, 7),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for results in ranks.run(double, 2, tensors):
        for name, tensor in before.items():
            assert torch.equal(tensors[name], tensor)
            assert results[name].dtype == tensor.dtype
            assert torch.equal(results[name], tensor * 2)
            assert not results[name].is_shared()


def test_state_does_not_leak() -> None:
    before = ranks.run(found_state, 2)
    ranks.run(leave_state_behind, 2, layout={"expert_model_parallel_size": 2})
    after = ranks.run(found_state, 2)
    for rank in range(2):
        assert torch.equal(before[rank].pop("draw"), after[rank].pop("draw"))
        assert before[rank].pop("pid") != after[rank].pop("pid")
        assert before[rank] == after[rank]
        assert not after[rank]["parallel_state"]
        assert after[rank]["rng_tracker"] is after[rank]["args"] is after[rank]["rerun"] is None
        assert after[rank]["threads"] == 1


def test_a_job_leaves_no_process() -> None:
    pids = ranks.run(process_id, 2)
    _wait_until(lambda: not any(map(_is_running, pids)), 10.0)


def test_exception_on_one_rank(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(fail_on_rank_1, 2)
    text = str(caught.value)
    assert caught.value.rank == 1
    assert text.startswith("rank 1 failed running test_ranks.fail_on_rank_1 on 2 ranks")
    assert "ValueError: no good" in text and "in fail_on_rank_1" in text
    assert "rank 0: did not return" in text and "in barrier" in text
    assert "printed by rank 0" in text and "printed by rank 1" in text
    assert "printed by" not in capfd.readouterr().out
    assert ranks.run(exchange, 2) == [[0, 10], [1, 11]]


def test_hang_on_one_rank() -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(hang_on_rank_1, 2, timeout_s=2.0)
    assert caught.value.rank == 1
    assert str(caught.value).startswith("rank 1 did not return within 2 s")
    assert "in fall_asleep" in str(caught.value)
    assert ranks.run(exchange, 2) == [[0, 10], [1, 11]]


@pytest.mark.parametrize(
    ("signal_number", "expected"),
    [(signal.SIGKILL, "exit code -9, killed by SIGKILL"), (None, "exit code 3")],
)
def test_death_of_one_rank(signal_number: int | None, expected: str) -> None:
    with pytest.raises(ranks.RankError) as caught:
        ranks.run(die_on_rank_1, 2, signal_number)
    assert caught.value.rank == 1, "the connection error of rank 0 is only a consequence"
    assert f"rank 1: died: {expected}" in str(caught.value)
    assert ranks.run(exchange, 2) == [[0, 10], [1, 11]]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="world_size"):
        ranks.run(exchange, ranks.MAX_WORLD_SIZE + 1)
    with pytest.raises(ranks.RankError, match="unexpected keyword argument"):
        ranks.run(exchange, 1, no_such_argument=1)


@pytest.mark.alone
def test_overhead_of_a_job() -> None:
    ranks.run(process_id, 2)
    started = time.monotonic()
    for _ in range(5):
        ranks.run(process_id, 2)
    assert (time.monotonic() - started) / 5 < 0.5


_SCRIPT = """
import os, signal, threading
import ranks

def show_ids_and_hang():
    print(os.getpid(), os.getppid(), file=open(f"ids-{os.environ['RANK']}", "w"))
    if os.environ["RANK"] == "1":
        threading.Event().wait()

if __name__ == "__main__":
    ranks.run(show_ids_and_hang, 2)
"""


@pytest.mark.full
def test_killed_script_leaves_no_orphans(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),  # where the pool keeps its files
    }
    process = subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environ)
    id_files = [tmp_path / "ids-0", tmp_path / "ids-1"]
    _wait_until(lambda: all(f.exists() and f.read_text().endswith("\n") for f in id_files), 60.0)
    process.kill()
    assert process.wait(20.0) == -signal.SIGKILL
    pids = {int(pid) for f in id_files for pid in f.read_text().split()}
    assert len(pids) == 3  # two ranks and the fork server
    _wait_until(lambda: not any(map(_is_running, pids)), 10.0)
    _wait_until(lambda: not any(tmp_path.glob("ranks-*")), 10.0)


def test_interrupt_kills_the_ranks() -> None:
    pids = ranks.run(process_id, 2)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ranks.run(fall_asleep, 2)
    timer.join()
    _wait_until(lambda: not any(map(_is_running, pids)), 10.0)


def _is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie, which a container's init may never reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "not reached in time"
        time.sleep(0.05)
