"""What the cluster's example script hands to the trainer is accepted; nothing here can run it.

``make pretrain`` runs the small one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import entry
import pytest
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
    if rule is None:
        entry.assert_accepted([flags], entry.world(world_size))
    else:
        entry.assert_refused([(flags, [rule])], entry.world(world_size))
