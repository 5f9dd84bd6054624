"""What a part computes on: a GPU, or the CPU with the stand-ins of a dry run; and ranks that do not exist."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Before CUDA starts: cuBLAS computes the same twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

HAS_CUDA = torch.cuda.is_available()


def prepare() -> None:
    """Make Megatron importable; its compiled functions run as written, and sums come in the same order each time."""
    if HAS_CUDA:
        from megatron_scmoe.mcore import wheel

        wheel.mend()
        torch.compiler.set_stance("force_eager")
    else:
        from megatron_scmoe.cpu import backend

        backend.install()
    # Sums by index are atomic otherwise, and differ in their last bit from one run to the next. What has no such form
    # says so in a warning, and a bit-for-bit comparison would find it.
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextlib.contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """Process groups of a world of ``size`` expert-parallel ranks, of which this is the first, and the others are none.

    Gathers answer with copies of what this rank gave, sums leave it as it is. All-to-alls are the wire's.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=size, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
