"""An all-to-all for gloo that uses both directions of a link at once, as NCCL's does. Torch only.

Gloo's own sends before it posts its receive. On a rank that comes late, its peer waits already: so it writes all of its
data first, and behind that, on the same connection, the word that it is ready to receive. The two directions then take
turns, and the exchange takes twice as long (measured: docs/decisions.md, 31). Here receives are posted first.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TAG = 7001  # tells these messages from others of the same group


class Work:
    """A launched all-to-all; has what callers of ``all_to_all_single(async_op=True)`` use."""

    def __init__(self) -> None:
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._told = threading.Event()  # whoever waits goes on when what was hung on the future has run

    def wait(self) -> bool:
        """Wait for it; raises what went wrong."""
        self._told.wait()
        self._future.wait()
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """Done when it is."""
        return self._future

    def follow(self, parts: list[Any]) -> None:
        """Wait for its sends and receives, and pass on what comes of them."""
        try:
            for part in parts:
                part.wait()
        except Exception as error:  # whoever waits gets it
            self._future.set_exception(error)
        else:
            self._future.set_result(None)
        self._told.set()


class _Lane:
    """A thread that sees the all-to-alls of one group through, in the order of their launch."""

    def __init__(self) -> None:
        self._launched: queue.SimpleQueue[tuple[Work, list[Any], tuple[Tensor, ...]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="all-to-all", daemon=True).start()

    def put(self, parts: list[Any], *tensors: Tensor) -> Work:
        """Follow ``parts``; ``tensors`` live until they are done."""
        work = Work()
        self._launched.put((work, parts, tensors))
        return work

    def _run(self) -> None:
        while True:
            work, parts, _tensors = self._launched.get()
            work.follow(parts)


_lanes: dict[dist.ProcessGroup, _Lane] = {}


def all_to_all_single(  # noqa: PLR0917 - the signature is torch's
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Work | None:
    """``torch.distributed.all_to_all_single`` on a gloo group; the arguments are its."""
    group = group or dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    received = output.split(_rows(output_split_sizes, output, size))
    sent = input.split(_rows(input_split_sizes, input, size))
    received[rank].copy_(sent[rank])
    ahead = [(rank + step) % size for step in range(1, size)]
    parts = [group.recv([received[peer]], peer, _TAG) for peer in ahead if received[peer].numel()]
    parts += [group.send([sent[peer]], peer, _TAG) for peer in ahead if sent[peer].numel()]
    if async_op:
        if group not in _lanes:
            _lanes[group] = _Lane()
        return _lanes[group].put(parts, output, input)
    for part in parts:
        part.wait()
    return None


def _rows(split_sizes: Sequence[int] | None, tensor: Tensor, size: int) -> list[int]:
    """Rows for each rank; Core gives them as arrays, too."""
    return [tensor.shape[0] // size] * size if split_sizes is None else [int(rows) for rows in split_sizes]
