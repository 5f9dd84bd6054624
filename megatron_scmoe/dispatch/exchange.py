"""The two halves of a collective: announce and launch start it and return at once, finish waits for it.

An all-to-all is split in a start and a ``finish``, which waits for it. Whatever is computed between the two halves
hides the communication. Each half is one autograd node, and the backward is the mirror image: that of ``finish``
launches the reverse all-to-all, that of ``announce`` waits for it. ``launch`` is no node: it may come later.

::

    forward    announce, launch ---- dense ops ----> finish          created in this order
    backward   announce         <--- dense ops ----- finish          autograd runs the later-created node first,
               (waits)                               (launches)      so the same dense ops hide it again

What autograd sees between the halves is an empty tensor, the token. The payload lives in the ``Exchange``, of which
every collective has its own, so that any number of them fly at once, in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe.contracts import Form
from megatron_scmoe.dispatch.payload import Column, bytes_of_row, pack, unpack
from megatron_scmoe.overlap.observe import Marker


class ExchangeOrderError(RuntimeError):
    """The halves of an exchange were called in a wrong order, or one of them twice."""


Rows = list[int] | None
"""Rows of a payload that each peer gets, by rank in the group; None: the same number for each."""


class Tag(NamedTuple):
    """Whose exchange it is, for marks and error messages.

    Attributes:
        marker: of the group.
        name: what travels, e.g. ``"dispatch"``.
        call: which routed call of its span.
        chunk: which token chunk.
    """

    marker: Marker
    name: str = ""
    call: int = 0
    chunk: int = 0

    def begins(self, half: str, *, backward: bool) -> None:
        """Mark that ``half``, "start" or "finish", begins."""
        self.marker.now(f"{half} {self.name}", self.chunk, call=self.call, backward=backward)


class _State(Enum):
    NEW = "not started"
    ANNOUNCED = "announced"
    FLYING = "started"
    DONE = "finished"


@functools.cache
def _aside() -> torch.cuda.Stream:
    """Stream of what is launched later than it was announced, and waits for the announcement alone."""
    return torch.cuda.Stream(priority=-1)


class _Leg:
    """One direction of an exchange: announced, launched and waited for, once each.

    On a GPU NCCL reads and writes on a stream of its own, which waits for the one that launches. What is sent is packed
    and freed on the main stream, which waits for the end, so that its memory is not used anew before. What is received
    by a launch aside must not lie in memory that the main stream has just freed: ops that were enqueued since the
    announcement may still use that. So it is allocated where it is launched, and the main stream recorded as its user.
    """

    def __init__(self, tag: Tag, *, backward: bool, form: Form | None, aside: bool = False) -> None:
        self._tag = tag
        self._backward = backward
        self._form = form
        self._aside = aside
        self._state = _State.NEW
        self._works: list[dist.Work] = []
        self._before_wait: Callable[[dist.Work], None]
        self._packed: torch.cuda.Event
        self._stream: torch.cuda.Stream
        self._sent: tuple[Tensor, ...] = ()
        self._received: tuple[Tensor, ...] = ()
        self._columns: list[list[Column]] = []  # of each collective
        self._dtype: torch.dtype
        self._num_parts = 1  # of the first tensor, as they travel
        self._plain_bytes = 0  # of a row

    def announce(self, exchange: Exchange, tensors: tuple[Tensor, ...]) -> None:
        """Pack ``tensors``, row ranges of which go to each peer: nothing is launched, the host waits for nothing."""
        self._move(_State.NEW, _State.ANNOUNCED)
        rows, *beside = (tensor.detach() for tensor in tensors)
        self._dtype = rows.dtype
        parts = [rows] if self._form is None else [*self._form.encode(rows)]
        self._num_parts = len(parts)
        if exchange.group.size() == 1:
            self._received = (*parts, *beside)
            return
        packed = [pack(together) for together in exchange.collectives(parts, beside)]
        self._sent, self._columns = tuple(payload for payload, _ in packed), [columns for _, columns in packed]
        self._plain_bytes = sum(map(bytes_of_row, exchange.collectives([rows], beside)))
        if self._aside:
            self._packed = torch.cuda.current_stream().record_event()

    def launch(self, exchange: Exchange, send_rows: Rows, receive_rows: Rows) -> None:
        """Start the all-to-all of what was announced."""
        self._move(_State.ANNOUNCED, _State.FLYING)
        self._tag.begins("start", backward=self._backward)
        if exchange.group.size() == 1:
            return
        self._stream = stream = torch.cuda.current_stream()
        if self._aside:
            stream = _aside()
            stream.wait_event(self._packed)
        with torch.cuda.stream(stream):
            self._send(exchange, send_rows, receive_rows)
        if self._aside:
            for received in self._received:
                received.record_stream(self._stream)
        if exchange.blocking:
            self._wait()

    def _send(self, exchange: Exchange, send_rows: Rows, receive_rows: Rows) -> None:
        num_rows = self._sent[0].shape[0] if receive_rows is None else sum(receive_rows)
        self._received = tuple(sent.new_empty((num_rows, *sent.shape[1:])) for sent in self._sent)
        leaving = _rows_to_others(self._sent[0].shape[0], send_rows, exchange.group)
        begin = self._tag.marker.moment()
        self._works = [
            dist.all_to_all_single(received, sent, receive_rows, send_rows, group=exchange.group, async_op=True)
            for received, sent in zip(self._received, self._sent, strict=True)
        ]
        self._before_wait = self._tag.marker.transfer(
            self._works[-1],  # collectives of a group end in the order of their launch
            begin,
            self._tag.name,
            self._tag.chunk,
            (leaving * sum(bytes_of_row([sent]) for sent in self._sent), leaving * self._plain_bytes),
            call=self._tag.call,
            backward=self._backward,
        )

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what ``launch`` started and return what arrived."""
        self._move(_State.FLYING, _State.DONE)
        self._tag.begins("finish", backward=self._backward)
        self._wait()
        received, self._received = self._received, ()
        if self._columns:
            received = tuple(
                tensor
                for payload, columns in zip(received, self._columns, strict=True)
                for tensor in unpack(payload, columns)
            )
        if self._form is None:
            return received
        return self._form.decode(received[: self._num_parts], self._dtype), *received[self._num_parts :]

    def _wait(self) -> None:
        # Under NCCL the current stream waits, under gloo the thread does. Each work is waited for exactly once, and
        # what was sent has to live until then.
        if self._works:
            if torch.cuda.current_stream() != self._stream:
                raise ExchangeOrderError(
                    f"{self._tag.name} of call {self._tag.call} is waited for on another stream than the one that "
                    "launched it: what it carries would be freed too early"
                )
            self._before_wait(self._works[-1])
            for work in self._works:
                work.wait()
            self._works, self._sent = [], ()

    def _move(self, expected: _State, new: _State) -> None:
        if self._state is not expected:
            direction = "backward" if self._backward else "forward"
            raise ExchangeOrderError(
                f"{self._tag.name} of call {self._tag.call} ({direction}) is {self._state.value} and cannot become "
                f"{new.value}: announce, launch and finish belong in this order, once each"
            )
        self._state = new


class Exchange:
    """One all-to-all over ``group``, forward and backward, each as a start and a finish.

    Args:
        tag: whose it is.
        group: the process group that exchanges rows.
        blocking: wait in ``launch`` (forward) and in the backward of ``finish``: nothing is hidden, nothing else
        changes.
        apart: each tensor travels as a collective of its own; else all of them side by side in one. The same on all
        ranks.
        aside: ``launch`` comes behind what was enqueued since ``announce``, and on a GPU does not wait for it.
        forms: in which the first tensor travels, forward and backward; None as it is. What stays on this rank takes
            the same form: numbers do not depend on who has which expert.
    """

    def __init__(
        self,
        *,
        tag: Tag,
        group: dist.ProcessGroup,
        blocking: bool,
        apart: bool = False,
        aside: bool = False,
        forms: tuple[Form | None, Form | None] = (None, None),
    ) -> None:
        self.group = group
        self.blocking = blocking
        self.apart = apart
        self.forward_leg = _Leg(tag, backward=False, form=forms[0], aside=aside)
        self.backward_leg = _Leg(tag, backward=True, form=forms[1])

    def collectives(self, rows: Sequence[Tensor], beside: Sequence[Tensor]) -> list[list[Tensor]]:
        """What travels in one collective each, of what ``rows`` are made of and of what travels with them."""
        return [[*rows], *([one] for one in beside)] if self.apart else [[*rows, *beside]]

    def announce(self, *tensors: Tensor) -> Tensor:
        """Pack ``tensors`` ([rows, ...] each) to be exchanged, and return the token that ``finish`` takes.

        Integers come last: they have no gradients, and nothing of them travels in backward.
        """
        return _Announce.apply(self, *tensors)

    def launch(self, send_rows: Rows, receive_rows: Rows) -> None:
        """Start the exchange of what was announced.

        Args:
            send_rows: rows that go to each rank in forward; None for equal parts.
            receive_rows: rows that come from each rank in forward; None for equal parts.

        Raises:
            ExchangeOrderError: if nothing was announced, or it was launched before.
        """
        self.send_rows, self.receive_rows = send_rows, receive_rows
        self.forward_leg.launch(self, send_rows, receive_rows)

    def finish(self, token: Tensor) -> tuple[Tensor, ...]:
        """Wait, and return the tensors with the rows that this rank received.

        Raises:
            ExchangeOrderError: if it was not launched, or was finished before.
        """
        return _Finish.apply(self, token)


def _rows_to_others(num_rows: int, send_rows: Rows, group: dist.ProcessGroup) -> int:
    """Of ``num_rows``, those that leave this rank."""
    return num_rows - (num_rows // group.size() if send_rows is None else send_rows[group.rank()])


class _Announce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *tensors):
        ctx.exchange = exchange
        ctx.num_integers = sum(not tensor.is_floating_point() for tensor in tensors)
        exchange.forward_leg.announce(exchange, tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _token_grad):
        return None, *ctx.exchange.backward_leg.finish(), *(None,) * ctx.num_integers


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, token):
        ctx.exchange = exchange
        return exchange.forward_leg.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        exchange = ctx.exchange
        exchange.backward_leg.announce(exchange, tuple(grad for grad in grads if grad.is_floating_point()))
        exchange.backward_leg.launch(exchange, exchange.receive_rows, exchange.send_rows)
        return None, grads[0].new_zeros(0)
