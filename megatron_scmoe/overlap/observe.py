"""What ran, when, on this rank: marks of the compute lane and spans of the communication lane.

Nothing is recorded, and nothing is added to autograd's graph, while nobody listens: then a mark is one look-up, so the
hot path may carry them always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scmoe.overlap.recording import Compression, Flying, Load, Moment, Recording, Step

BEGIN = "begin"
END = "end"

_listeners: list[Recording] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Listen for the time of a ``with`` block; what it yields fills as things happen."""
    recorded = start()
    try:
        yield recorded
    finally:
        stop(recorded)


def start() -> Recording:
    """Listen until ``stop`` is called with what this returns."""
    recorded = Recording()
    _listeners.append(recorded)
    return recorded


def stop(recorded: Recording) -> None:
    """End a recording, for which the host waits for the GPU; one that is over stays as it is."""
    others = [listener for listener in _listeners if listener is not recorded]
    if len(others) < len(_listeners):
        _listeners[:] = others
        recorded.end()


def _nothing(_work: dist.Work) -> None: ...


class Marker:
    """Makes the marks of one span.

    Args:
        group: index of its first group over the whole model.
    """

    def __init__(self, group: int) -> None:
        self.group = group

    def now(self, name: str, index: int = 0, *, call: int | None = None, backward: bool = False) -> None:
        """A step begins here."""
        if _listeners:
            self._reach((name, index, call, self.group, backward))

    def in_backward(self, name: str, output: Tensor, index: int = 0, *, call: int | None = None) -> None:
        """All of a step is launched; its backward begins when the gradient of its ``output`` is complete."""
        if not _listeners:
            return
        self._reach(None)
        if output.requires_grad:
            output.register_hook(lambda _grad: self.now(name, index, call=call, backward=True))

    def _reach(self, step: Step | None) -> None:
        moment = Moment.now()
        for recorded in _listeners:
            recorded.reach(step, moment)

    def moment(self) -> Moment | None:
        """The moment before a launch, for ``transfer``; None while nobody listens."""
        # A GPU's communication stream waits for what was recorded before the launch, and for nothing behind it: a short
        # transfer may be over before an event that is recorded when the launch has returned.
        return Moment.now() if _listeners else None

    def transfer(
        self,
        work: dist.Work,
        begin: Moment | None,
        name: str,
        index: int,
        nbytes: tuple[int, int],
        *,
        call: int,
        backward: bool,
    ) -> Callable[[dist.Work], None]:
        """A collective was launched at ``begin``, which ``moment`` returned; its end is noted when it comes.

        Args:
            work: to be waited for.
            begin: see above.
            name: as in ``recording.Transfer``, and so ``index``, ``call`` and ``backward``.
            index: see there.
            nbytes: ``sent_bytes`` and ``plain_bytes`` of one.
            call: see there.
            backward: see there.

        Returns:
            What is to be called with the collective just before it is waited for.
        """
        if begin is None:
            return _nothing
        flying = Flying(name, index, call, self.group, backward, begin, *nbytes)
        for recorded in _listeners:
            recorded.launch(flying)

        def landed(_future: torch.futures.Future[list[Tensor]]) -> None:
            flying.end = Moment.now()

        def listen(work: dist.Work) -> None:  # which must not be kept alive from here: it holds what arrives
            work.get_future().then(landed)

        # Under NCCL a listener is called at once, on a stream that waits for the transfer. Where CUDA has one queue,
        # what is launched behind that waits, too: so what is to hide the transfer has to be launched before.
        if torch.cuda.is_available():
            return listen
        listen(work)
        return _nothing

    def load(self, probs: Tensor, routing_map: Tensor, choices: int | None, *, part: int = 0) -> None:
        """A routing was made. Only what gradients will flow through counts: neither evaluation nor, under full
        recompute, the first of two equal forwards.

        Args:
            probs: gate weights after capacity, [n, e].
            routing_map: which expert gets which token, after capacity, bool, [n, e].
            choices: experts that the router chose for each token, before capacity; None where it drops none.
            part: which group of the span routed.
        """
        if _listeners and torch.is_grad_enabled():
            # Rows that pad an expert to its capacity have no weight: they are not load.
            tokens_per_expert = (routing_map & (probs > 0)).sum(dim=0)
            kept = tokens_per_expert.sum()
            dropped = torch.zeros_like(kept) if choices is None else probs.shape[0] * choices - kept
            load = Load(self.group, part, tokens_per_expert, dropped)
            for recorded in _listeners:
                recorded.loads.append(load)

    def compression(self, rows: Tensor, centroids: Tensor, ids: Tensor, sizes: Tensor) -> None:
        """Rows were clustered. What counts is what counts for ``load``.

        Args:
            rows: [n, h].
            centroids: that travel in their place, [m, h].
            ids: centroid of each row, [n].
            sizes: rows of each centroid, at least m of them.
        """
        if _listeners and torch.is_grad_enabled() and rows.shape[0]:
            with torch.no_grad():
                norms = torch.linalg.vector_norm(rows - centroids[ids], dim=-1, dtype=torch.float32)
                residual = (norms / torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)).nan_to_num().mean()
            one = Compression(self.group, rows.shape[0], centroids.shape[0], sizes.max(), residual)
            for recorded in _listeners:
                recorded.compressions.append(one)
