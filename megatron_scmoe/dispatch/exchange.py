"""The two halves of a collective: start launches it and returns at once, finish waits for it.

An all-to-all is split in ``start``, which launches it and returns at once, and ``finish``, which waits for it. Whatever
is computed between the two halves hides the communication. Each half is one autograd node, and the backward is the
mirror image: the backward of ``finish`` launches the reverse all-to-all, the backward of ``start`` waits for it.

::

    forward    start ---- dense ops ----> finish          created in this order
    backward   start <--- dense ops ----- finish          autograd runs the later-created node first,
               (waits)                    (launches)      so the same dense ops hide it again

What autograd sees between the halves is an empty tensor, the token. The payload lives in the ``Exchange``, of which
every collective has its own, so that any number of them fly at once, in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe.overlap.observe import Marker


class ExchangeOrderError(RuntimeError):
    """The halves of an exchange were called in a wrong order, or one of them twice."""


_WORD = torch.int64
_ALIGNMENT = 16
"""Bytes that each column of a row is filled up to: NCCL copies in such pieces where all peers' parts are aligned to
them, and else byte by byte."""


class _Column(NamedTuple):
    """How one tensor lies in a packed payload: its dtype and the shape of one row."""

    dtype: torch.dtype
    row_shape: torch.Size

    @property
    def nbytes(self) -> int:
        """That one row takes, filled up with zeros."""
        return -(-self.row_shape.numel() * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _pack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[_Column]]:
    """Lay tensors of the same number of rows side by side, as words: views of their bytes, never a cast.

    One payload makes one collective where Core sends tokens and probabilities as two, but two passes over it at either
    end; so larger ones travel apart.
    """
    columns = [_Column(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
    return torch.cat([_words(tensor, column) for tensor, column in zip(tensors, columns, strict=True)], dim=1), columns


def _words(tensor: Tensor, column: _Column) -> Tensor:
    rows = tensor.reshape(tensor.shape[0], column.row_shape.numel()).contiguous()
    missing = column.nbytes // column.dtype.itemsize - rows.shape[1]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    elif rows.storage_offset() * column.dtype.itemsize % _WORD.itemsize:
        rows = rows.clone()  # a row of a wider tensor
    return rows.view(_WORD)


def _unpack(payload: Tensor, columns: list[_Column]) -> tuple[Tensor, ...]:
    """Undo ``_pack``; the payload may have another number of rows by now."""
    parts = payload.split([column.nbytes // _WORD.itemsize for column in columns], dim=1)
    return tuple(
        # Laid out anew, to be read as another type. (``contiguous`` would leave a single row where it lies.)
        part.clone(memory_format=torch.contiguous_format)
        .view(column.dtype)[:, : column.row_shape.numel()]
        .reshape(payload.shape[0], *column.row_shape)
        .contiguous()
        for part, column in zip(parts, columns, strict=True)
    )


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
    FLYING = "started"
    DONE = "finished"


class _Leg:
    """One direction of an exchange: launched once, waited for once."""

    def __init__(self, tag: Tag, *, backward: bool) -> None:
        self._tag = tag
        self._backward = backward
        self._state = _State.NEW
        self._works: list[dist.Work] = []
        self._before_wait: Callable[[dist.Work], None]
        self._sent: tuple[Tensor, ...] = ()
        self._received: tuple[Tensor, ...] = ()
        self._columns: list[_Column] = []

    def launch(self, exchange: Exchange, tensors: tuple[Tensor, ...], send_rows: Rows, receive_rows: Rows) -> None:
        """Start the all-to-all of ``tensors``, row ranges of which go to each peer."""
        self._move(_State.NEW, _State.FLYING)
        self._tag.begins("start", backward=self._backward)
        if exchange.group.size() == 1:
            self._received = tuple(tensor.detach() for tensor in tensors)
            return
        if exchange.apart or len(tensors) == 1:
            self._sent = tuple(tensor.contiguous() for tensor in tensors)
        else:
            payload, self._columns = _pack(tensors)
            self._sent = (payload,)
        num_rows = self._sent[0].shape[0] if receive_rows is None else sum(receive_rows)
        self._received = tuple(sent.new_empty((num_rows, *sent.shape[1:])) for sent in self._sent)
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
            sum(_bytes_to_others(sent, send_rows, exchange.group) for sent in self._sent),
            call=self._tag.call,
            backward=self._backward,
        )
        if exchange.blocking:
            self._wait()

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what ``launch`` started and return what arrived."""
        self._move(_State.FLYING, _State.DONE)
        self._tag.begins("finish", backward=self._backward)
        self._wait()
        received, self._received = self._received, ()
        return _unpack(received[0], self._columns) if self._columns else received

    def _wait(self) -> None:
        # Under NCCL the current stream waits, under gloo the thread does. Each work is waited for exactly once, and
        # what was sent has to live until then.
        if self._works:
            self._before_wait(self._works[-1])
            for work in self._works:
                work.wait()
            self._works, self._sent = [], ()

    def _move(self, expected: _State, new: _State) -> None:
        if self._state is not expected:
            direction = "backward" if self._backward else "forward"
            raise ExchangeOrderError(
                f"{self._tag.name} of call {self._tag.call} ({direction}) is {self._state.value} and cannot become "
                f"{new.value}: "
                "start and finish belong in this order, once each"
            )
        self._state = new


class Exchange:
    """One all-to-all over ``group``, forward and backward, each as a start and a finish.

    Args:
        tag: whose it is.
        group: the process group that exchanges rows.
        send_rows: rows that go to each rank in forward; None for equal parts.
        receive_rows: rows that come from each rank in forward; None for equal parts.
        blocking: wait in ``start`` (forward) and in the backward of ``finish``: nothing is hidden, nothing else
        changes.
        apart: each tensor travels as a collective of its own; else all of them side by side in one. The same on all
        ranks.
    """

    def __init__(
        self,
        *,
        tag: Tag,
        group: dist.ProcessGroup,
        send_rows: Rows,
        receive_rows: Rows,
        blocking: bool,
        apart: bool = False,
    ) -> None:
        self.group = group
        self.blocking = blocking
        self.apart = apart
        self.send_rows = send_rows
        self.receive_rows = receive_rows
        self.forward_leg = _Leg(tag, backward=False)
        self.backward_leg = _Leg(tag, backward=True)

    def start(self, *tensors: Tensor) -> Tensor:
        """Launch the exchange of ``tensors`` ([rows, ...] each) and return the token that ``finish`` takes."""
        return _Start.apply(self, *tensors)

    def finish(self, token: Tensor) -> tuple[Tensor, ...]:
        """Wait, and return the tensors with the rows that this rank received.

        Raises:
            ExchangeOrderError: if it was not started, or was finished before.
        """
        return _Finish.apply(self, token)


def _bytes_to_others(payload: Tensor, send_rows: Rows, group: dist.ProcessGroup) -> int:
    """Bytes of ``payload`` that leave this rank."""
    own_rows = payload.shape[0] // group.size() if send_rows is None else send_rows[group.rank()]
    return (payload.shape[0] - own_rows) * payload[:1].nbytes if payload.shape[0] else 0


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *tensors):
        ctx.exchange = exchange
        exchange.forward_leg.launch(exchange, tensors, exchange.send_rows, exchange.receive_rows)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _token_grad):
        return None, *ctx.exchange.backward_leg.finish()


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, token):
        ctx.exchange = exchange
        return exchange.forward_leg.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        exchange = ctx.exchange
        exchange.backward_leg.launch(exchange, grads, exchange.receive_rows, exchange.send_rows)
        return None, grads[0].new_zeros(0)
