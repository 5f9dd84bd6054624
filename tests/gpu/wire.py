"""An all-to-all to oneself whose data arrives late, in the place of torch's.

Each row that is asked for is a copy of a row that was sent. What a missing wait would read until then is NaN in any
dtype. On a GPU the copy runs on a stream of its own, behind a sleep; on the CPU, which has no streams, it is made where
it is waited for, not before. Unlike NCCL's, the work keeps nothing of what was sent alive: whoever launches it has to.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import paced
import torch
import torch.distributed as dist
from device import HAS_CUDA
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_NAN = 0x7FFF  # two bytes of a NaN, in whatever floating dtype they are read


class Wire:
    """One direction and the other of all exchanges of a run.

    Args:
        delay_s: how long each transfer takes on a GPU; 0 for one that is as fast as a copy, on the CPU at once.
        drops_wait: mutant: "forward" or "backward", where a wait does nothing.
        keeps_order: whether a transfer waits for what was launched before it; False is a mutant.
        by_streams: whether transfers run on a stream, on the CPU one of the stand-ins of stream_stand_ins.py.
        spoils: whether what has not arrived is NaN; it takes a pass over the payload, which no NCCL makes.
        full_bytes: payload that takes ``delay_s``; smaller ones take as much less. 0: each takes all of it.
        ctas: multiprocessors that a transfer holds (``paced.py``); 0: it sleeps in one thread, and copies.
        priority: of the stream, as torch counts it.

    Attributes:
        launched, waited: numbers of transfers.
        asked_s: what those on streams should have taken in all.
    """

    def __init__(
        self,
        delay_s: float,
        *,
        drops_wait: str = "",
        keeps_order: bool = True,
        spoils: bool = True,
        by_streams: bool = HAS_CUDA,
        full_bytes: int = 0,
        ctas: int = 0,
        priority: int = 0,
    ) -> None:
        self.delay_s, self.drops_wait, self.keeps_order, self.spoils = delay_s, drops_wait, keeps_order, spoils
        self.full_bytes, self.ctas = full_bytes, ctas
        self.launched = self.waited = 0
        self.asked_s = 0.0
        self._work = _StreamWork if by_streams else _HostWork
        if by_streams:
            self.stream = torch.cuda.Stream(priority=priority)
            self._cycles_per_s = cycles_per_s() if delay_s else 0.0  # which waits

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        """As ``torch.distributed.all_to_all_single``."""
        for tensor, parts in ((output, output_split_sizes), (input, input_split_sizes)):
            assert parts is None or sum(parts) == len(tensor)
        self.launched += 1
        work = self._work(self, output, input)
        if async_op:
            return work
        work.wait()
        return None

    def carry(self, output: Tensor, input: Tensor) -> None:
        """Copy the rows on the current stream, which takes as long as it should."""
        seconds = self.delay_s * (min(1.0, input.nbytes / self.full_bytes) if self.full_bytes else 1.0)
        self.asked_s += seconds
        if self.ctas and paced.takes(input):
            paced.copy(output, input, seconds, self.ctas)
            return
        if seconds:
            torch.cuda._sleep(int(seconds * self._cycles_per_s))
        copy_rows(output, input)


class _Work:
    def __init__(self, wire: Wire, output: Tensor, input: Tensor) -> None:
        self._wire, self._output = wire, output
        self._sent = StorageWeakRef(input.untyped_storage())
        if wire.spoils:
            spoil(output)

    def wait(self) -> bool:
        """Let the current stream wait; on the CPU, this thread."""
        in_backward = torch._C._current_graph_task_id() != -1
        self._wire.waited += 1
        if self._wire.drops_wait != ("backward" if in_backward else "forward"):
            self._arrive()
            if self._sent.expired():  # its memory may have been anybody's by the time that it was read
                spoil(self._output)
        return True

    def _arrive(self) -> None:
        raise NotImplementedError


class _StreamWork(_Work):
    def __init__(self, wire: Wire, output: Tensor, input: Tensor) -> None:
        super().__init__(wire, output, input)
        if wire.keeps_order:
            wire.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(wire.stream):
            wire.carry(output, input)
        self._done = wire.stream.record_event()

    def get_future(self) -> torch.futures.Future:
        """As WorkNCCL's: it calls a listener at once, on a stream that waits for the transfer."""
        future = torch.futures.Future(devices=[self._output.device])
        behind = torch.cuda.Stream()
        behind.wait_event(self._done)
        with torch.cuda.stream(behind):
            future.set_result([self._output])  # notes an event of this stream
        return future

    def _arrive(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


class _HostWork(_Work):
    def __init__(self, wire: Wire, output: Tensor, input: Tensor) -> None:
        super().__init__(wire, output, input)
        self._future: torch.futures.Future = torch.futures.Future()
        self._lies = (input.storage_offset(), input.shape, input.stride(), input.dtype)
        if not wire.delay_s:
            copy_rows(output, input)

    def _arrive(self) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._sent.cdata)
        if self._wire.delay_s and storage is not None:
            offset, shape, stride, dtype = self._lies
            copy_rows(self._output, torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride))
        self._future.set_result(None)

    def get_future(self) -> torch.futures.Future:
        """Done when the data has arrived."""
        return self._future


@functools.cache
def cycles_per_s() -> float:
    """Of the clock that ``torch.cuda._sleep`` counts."""
    num_cycles = 10_000_000
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(num_cycles)  # loads the kernel
    begin.record()
    torch.cuda._sleep(num_cycles)
    end.record()
    end.synchronize()
    return num_cycles / begin.elapsed_time(end) * 1e3


@torch.no_grad()
def copy_rows(output: Tensor, input: Tensor) -> None:
    """Fill ``output`` with the rows of ``input``, from its first one again behind its last."""
    if not len(input):
        output.zero_()
    elif len(output):
        torch.index_select(input, 0, torch.arange(len(output), device=output.device) % len(input), out=output)


@torch.no_grad()
def spoil(tensor: Tensor) -> None:
    """Fill ``tensor`` with NaN, whatever its bytes are going to be read as."""
    if tensor.numel():
        tensor.view(torch.int16).fill_(_NAN)


@contextlib.contextmanager
def in_place_of_torch(wire: Wire) -> Iterator[Wire]:
    """Let exchanges use ``wire``."""
    original = dist.all_to_all_single
    dist.all_to_all_single = wire.all_to_all_single
    try:
        yield wire
    finally:
        dist.all_to_all_single = original
