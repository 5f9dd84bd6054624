"""The entry script on a rank of tests/gpu/trainings.py, with mock data of 1000 documents.

Gloo has no coalesced all-reduce of CUDA tensors. Where ranks share a GPU, gradients are summed one by one.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class _Over:
    """Collectives that were over before anybody waits."""

    def wait(self) -> None: ...


@contextlib.contextmanager
def one_by_one(_group: Any, *_args: Any, async_ops: bool = False, **_kwargs: Any) -> Iterator[_Over]:
    """In the place of torch's manager, for collectives that block."""
    if async_ops:
        raise RuntimeError("gloo ranks of a GPU sum gradients when all are there: leave --overlap-grad-reduce out")
    yield _Over()


if __name__ == "__main__":
    if torch.cuda.is_available():
        from megatron_scmoe.mcore import wheel

        wheel.mend()
    else:
        from megatron_scmoe.cpu import backend

        backend.install()
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset
    from megatron.core.distributed import param_and_grad_buffer

    MockGPTLowLevelDataset.size = 1000
    if torch.cuda.is_available() and "gloo" in sys.argv:
        param_and_grad_buffer._coalescing_manager = one_by_one
    script = str(ROOT / "pretrain_gpt_scmoe.py")
    sys.argv[0] = script
    runpy.run_path(script, run_name="__main__")
