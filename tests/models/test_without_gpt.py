"""Hybrid models where Megatron has no GPT model: ``megatron.core.models.gpt`` is hidden in a fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import nodes
import pytest
import ranks
import training
import without_gpt
from training import ROOT, SCMOE, with_flags, without_flag

HYBRID = without_flag(with_flags(SCMOE, "--hybrid-layer-pattern M-*E*-*E", "--train-iters 6"), "--num-layers")
HYBRID = with_flags(HYBRID, "--mamba-num-heads 4", "--mamba-head-dim 8", "--mamba-state-dim 8", "--mamba-num-groups 2")


def trained_without(flags: list[str]) -> str:
    """What a training prints in a process that hides it."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(nodes.free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "without_gpt.py", *flags],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(printed: str) -> list[str]:
    return re.findall(r"lm loss: (\S+)", printed)


def test_the_package_imports_and_trains_hybrid_models():
    """The losses are those of a process that hides nothing; the GPT model's own modules are not there."""
    printed = trained_without(HYBRID)
    (expected,) = ranks.run(training.train, 1, HYBRID)
    assert len(losses(expected)) == 6 and losses(printed) == losses(expected)
    missing = dict(re.findall(r"^missing: (\S+): (\S+)$", printed, re.MULTILINE))
    assert set(missing) == set(without_gpt.OF_GPT) and all(map(without_gpt.is_hidden, missing.values()))


@pytest.mark.full
def test_it_is_hidden():
    """Negative control of the test above: a GPT model does not train there."""
    with pytest.raises(AssertionError, match=r"No module named 'megatron\.(core|training)\.models\.gpt"):
        trained_without(SCMOE)


def test_documents_name_who_imports_it():
    """Of Megatron's own, with the version that they speak of."""
    decisions = (ROOT / "docs" / "decisions.md").read_text()
    entry = decisions[decisions.index("\n73. ") :]
    assert all(f"`{name}`" in entry for name in without_gpt.MEGATRONS_OWN)
