"""What the wheel lacks is mended where there is CUDA, as the CPU backend does it where there is none."""

from __future__ import annotations

import subprocess
import sys

from training import ROOT

MEND = """
from megatron.core import optimizer
from megatron.core.datasets import utils
from megatron.core.optimizer import distrib_optimizer
from megatron_scmoe.mcore import wheel

for _ in range(2):
    try:
        utils.compile_helpers()
        print("helper: there")
    except SystemExit as end:
        print("helper:", end.code)
    print("Adam:", optimizer.Adam.__name__, distrib_optimizer.Adam.__name__, optimizer.USING_PYTORCH_OPTIMIZER)
    print("step of the group:", distrib_optimizer.HAVE_APEX_OR_TE)
    wheel.mend()
"""
FUSED = """
import fake_transformer_engine
fake_transformer_engine.install()
"""


def lines(code: str) -> list[str]:
    """What a process without the CPU backend prints, without what make says."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests/support')!r}]\n{code}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.startswith(("helper:", "Adam:", "step "))]


def test_what_the_wheel_lacks_is_mended():
    assert lines(MEND) == [
        # As the wheel comes: pretraining would end here, and a resumed optimizer count its steps wrongly.
        *("helper: 1", "Adam: AdamW Adam True", "step of the group: False"),
        *("helper: there", "Adam: GroupStepAdam GroupStepAdam False", "step of the group: True"),
    ]


def test_a_fused_adam_stays():
    *_, adam, step = lines(FUSED + MEND)
    assert adam == "Adam: FusedAdam FusedAdam False"
    assert step == "step of the group: True"
