"""What ranks mean is compared, and a difference named, before anything else."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import ranks
import torch.distributed as dist

from megatron_scmoe.config import ConfigError
from megatron_scmoe.job import sameness
from megatron_scmoe.job.meeting import Meeting


def arguments(rank: int, world_size: int, **more: object) -> Namespace:
    """Megatron's, as far as they matter here."""
    of_data = dict.fromkeys(
        (
            *("data_path", "data_args_path", "per_split_data_args_path", "train_data_path"),
            "valid_data_path",
            "test_data_path",
        )
    )
    values = {"rank": rank, "local_rank": rank, "world_size": world_size, "distributed_timeout_minutes": 1, "lr": 0.1}
    return Namespace(**{**of_data, **values, **more})


def refusal(values: list[dict[str, object]]) -> str:
    """What this rank is told where each rank has other arguments."""
    rank, size = dist.get_rank(), dist.get_world_size()
    args = arguments(rank, size, **values[rank])
    try:
        sameness.check(args, Meeting(args))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([{}, {}, {}], ""),
        ([{}, {"lr": 0.2}, {}], "--lr is 0.1 on ranks 0, 2 and 0.2 on rank 1"),
        ([{"lr": 0.2}, {}, {}], "--lr is 0.2 on rank 0 and 0.1 on ranks 1-2"),
        ([{}, {}, {"seed": 1}], "--seed is not set on ranks 0-1 and 1 on rank 2"),
    ],
)
def test_every_rank_is_told_which_rank_means_what(values, words):
    found = ranks.run(refusal, 3, values)
    assert len(set(found)) == 1
    assert words in found[0] and bool(found[0]) is bool(words)


def refusal_of_data(folder: Path) -> str:
    """Each rank sees files of its own under the same names, as on nodes with local copies."""
    import os

    rank = dist.get_rank()
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))
    Path("text.idx").write_bytes(b"index")
    Path("text.bin").write_bytes(b"x" * (10 + rank))
    Path("tokenizer.model").write_bytes(b"same size %d" % rank)
    words = {"data_path": ["text"], "tokenizer_model": "tokenizer.model"}
    return refusal([words, words])


def test_copies_of_the_data_are_compared_too(tmp_path):
    found = ranks.run(refusal_of_data, 2, tmp_path)[0]
    assert "text.bin is 10 bytes on rank 0 and 11 bytes on rank 1" in found and "tokenizer.model is " in found
    assert "text.idx" not in found


def test_other_code_of_the_same_version_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "layer.py").write_text("x = 1\n")
    monkeypatch.setattr(sameness.megatron_scmoe, "__file__", str(tmp_path / "__init__.py"))
    before = sameness.meant(arguments(0, 1))
    (tmp_path / "layer.py").write_text("x = 2\n")
    (name,) = [name for name, value in sameness.meant(arguments(0, 1)).items() if value != before[name]]
    assert name == "the code of megatron_scmoe"


def test_environment_that_decides_how_collectives_run_is_compared(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    before = sameness.meant(arguments(0, 1))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    after = sameness.meant(arguments(0, 1))
    assert sameness.difference([before, after]) == "NCCL_ALGO is not set on rank 0 and Ring on rank 1"


@pytest.mark.parametrize(
    "name",
    [
        *("TORCH_NCCL_ENABLE_TIMING", "NCCL_ENABLE_TIMING", "TORCH_NCCL_DESYNC_DEBUG", "NCCL_DESYNC_DEBUG"),
        *("TORCH_DISTRIBUTED_DEBUG", "TORCH_NCCL_BLOCKING_WAIT", "CUDA_LAUNCH_BLOCKING", "NCCL_MAX_CTAS"),
        *("NVTE_EXT_MARGIN_SM", "NVTE_FLASH_ATTN", "NCCL_NVLS_ENABLE"),
        *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    ],
)
def test_every_variable_that_changes_what_ranks_do_is_compared(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    before = sameness.meant(arguments(0, 1))
    monkeypatch.setenv(name, "1")
    found = sameness.difference([sameness.meant(arguments(0, 1)), before])
    assert found == f"{name} is 1 on rank 0 and not set on rank 1"


@pytest.mark.parametrize(
    "name", ["NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
)
def test_what_belongs_to_a_node_may_differ(monkeypatch, name):
    """Negative control of the test above."""
    before = sameness.meant(arguments(0, 1))
    monkeypatch.setenv(name, "of this node")
    assert sameness.difference([before, sameness.meant(arguments(0, 1))]) == ""


def test_many_differences_are_counted():
    found = sameness.difference([{f"--{n}": "1" for n in range(5)}, {f"--{n}": "2" for n in range(5)}])
    assert found.startswith("--0 is 1 on rank 0 and 2 on rank 1; --1") and found.endswith("; and 2 more")
