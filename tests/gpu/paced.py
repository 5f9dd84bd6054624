"""A copy that holds some of a GPU's multiprocessors for some time, as NCCL's kernels do.

Each of its blocks takes all shared memory that a block can have. So it begins when a multiprocessor has nothing else
that uses shared memory, as NCCL's block waits for one of its own, and no block of a matrix product begins beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

KERNEL = "paced_copy"
SOURCE = """
extern "C" __global__ void paced_copy(const int4* from, int num_from, int4* to, int num_to, int nanoseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    const int stride = gridDim.x * blockDim.x;
    int read = blockIdx.x * blockDim.x + threadIdx.x;
    for (int write = read; write < num_to; write += stride, read += stride) {
        while (read >= num_from) read -= num_from;
        to[write] = from[read];
    }
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
"""
LEAST_BYTES = 1 << 20
"""Smaller payloads take no multiprocessor to speak of."""
_UNIT = 16  # bytes of an int4
_THREADS = 1024


def takes(payload: Tensor) -> bool:
    """Whether a payload is one for :func:`copy`."""
    return payload.nbytes >= LEAST_BYTES and payload[:1].nbytes % _UNIT == 0


def copy(output: Tensor, input: Tensor, seconds: float, ctas: int) -> None:
    """Fill ``output`` with the rows of ``input``, from its first one again behind its last, on the current stream.

    Args:
        output: [rows, ...].
        input: as ``output``, with rows of its own.
        seconds: for which it lasts at least.
        ctas: blocks, each on a multiprocessor of its own.
    """
    units = (input.nbytes // _UNIT, output.nbytes // _UNIT)
    args = [input, units[0], output, units[1], int(seconds * 1e9)]
    _kernel()(grid=(ctas, 1, 1), block=(_THREADS, 1, 1), args=args, shared_mem=_shared_bytes())


@functools.cache
def _kernel() -> Any:
    kernel = torch.cuda._compile_kernel(SOURCE, KERNEL)
    kernel.set_shared_memory_config(_shared_bytes())
    return kernel


def _shared_bytes() -> int:
    return torch.cuda.get_device_properties().shared_memory_per_block_optin
