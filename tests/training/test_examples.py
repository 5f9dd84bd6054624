"""What the cluster's example script hands to the trainer is accepted; nothing here can run it.

``make pretrain`` runs the small one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import ranks
import training
from training import PLAIN, ROOT, with_flags, without_flag


def flags_of(script: str, folder: Path) -> list[str]:
    """What ``script`` would hand to the entry script, by a torchrun that prints its arguments."""
    torchrun = folder / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "DATA": str(folder), "SAVE": str(folder / "save")}
    done = subprocess.run(
        [ROOT / "examples" / script], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    arguments = done.stdout.splitlines()
    return arguments[arguments.index(str(ROOT / "pretrain_gpt_scmoe.py")) + 1 :]


def refusal_in_a_world(flags: list[str], world_size: int) -> tuple[str, int | None]:
    """As ``training.refusal``, with as many ranks as a cluster has, of which this is one."""
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        return training.refusal(flags)
    finally:
        os.environ["WORLD_SIZE"] = before


@pytest.mark.parametrize(
    ("world_size", "rule"),
    [(8, None), (512, None), (1000, "must be divisible by eval_micro_batch_size (1) * data_parallel_size (1000)")],
)
def test_flags_of_the_cluster_script(tmp_path, world_size, rule):
    """With what a machine without a GPU has in the place of Transformer Engine, and of data."""
    flags = with_flags(flags_of("pretrain_cluster.sh", tmp_path), "--tokenizer-type NullTokenizer")
    for name in ("--moe-grouped-gemm", "--data-path", "--tokenizer-model", "--load"):
        flags = without_flag(flags, name)
    flags += ["--mock-data", *PLAIN.split(), "--vocab-size", "32000"]
    message, code = ranks.run(refusal_in_a_world, 1, flags, world_size)[0]
    assert (message, code) == ("", None) if rule is None else (rule in message and code == 2), message
