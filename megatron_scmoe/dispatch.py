"""The two halves of a collective, and the flight of one group's tokens to their experts and back.

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

from enum import Enum
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_scmoe import mcore, observe
from megatron_scmoe.plan import EXPERTS, Plan


class ExchangeOrderError(RuntimeError):
    """The halves of an exchange were called in a wrong order, or one of them twice."""


class _Column(NamedTuple):
    """How one tensor lies in a packed payload: its dtype and the shape of one row."""

    dtype: torch.dtype
    row_shape: torch.Size


def _pack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[_Column]]:
    """Lay tensors of the same number of rows side by side, as bytes: a view, never a cast.

    One payload makes one collective where Core sends tokens and probabilities as two.
    """
    columns = [_Column(tensor.dtype, tensor.shape[1:]) for tensor in tensors]
    if len(tensors) == 1:
        return tensors[0].contiguous(), columns
    rows = [tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor.flatten(1) for tensor in tensors]
    return torch.cat([row.contiguous().view(torch.uint8) for row in rows], dim=1), columns


def _unpack(payload: Tensor, columns: list[_Column]) -> tuple[Tensor, ...]:
    """Undo ``_pack``; the payload may have another number of rows by now."""
    if len(columns) == 1:
        return (payload,)
    widths = [column.row_shape.numel() * column.dtype.itemsize for column in columns]
    parts = payload.split(widths, dim=1)
    return tuple(
        # Bytes have to be laid out anew, aligned, before they can be read as a wider type. (``contiguous`` would not do
        # it for a single row, which is contiguous wherever it begins.)
        part.clone(memory_format=torch.contiguous_format).view(column.dtype).view(payload.shape[0], *column.row_shape)
        for part, column in zip(parts, columns, strict=True)
    )


Rows = list[int] | None
"""Rows of a payload that each peer gets, by rank in the group; None: the same number for each."""


class _State(Enum):
    NEW = "not started"
    FLYING = "started"
    DONE = "finished"


class _Leg:
    """One direction of an exchange: launched once, waited for once."""

    def __init__(self, name: str, label: str, *, backward: bool) -> None:
        self._name = name
        self._label = label
        self._backward = backward
        self._state = _State.NEW
        self._work: dist.Work | None = None
        self._sent: Tensor | None = None
        self._received: tuple[Tensor, ...] | Tensor | None = None
        self._columns: list[_Column] = []

    def launch(self, exchange: Exchange, tensors: tuple[Tensor, ...], send_rows: Rows, receive_rows: Rows) -> None:
        """Start the all-to-all of ``tensors``, row ranges of which go to each peer."""
        self._move(_State.NEW, _State.FLYING)
        observe.mark(f"{self._label}start {self._name}", backward=self._backward)
        if exchange.group.size() == 1:
            self._received = tuple(tensor.detach() for tensor in tensors)
            return
        self._sent, self._columns = _pack(tensors)
        num_rows = self._sent.shape[0] if receive_rows is None else sum(receive_rows)
        self._received = self._sent.new_empty((num_rows, *self._sent.shape[1:]))
        self._work = dist.all_to_all_single(
            self._received, self._sent, receive_rows, send_rows, group=exchange.group, async_op=True
        )
        if exchange.blocking:
            self._wait()

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what ``launch`` started and return what arrived."""
        self._move(_State.FLYING, _State.DONE)
        self._wait()
        observe.mark(f"{self._label}finish {self._name}", backward=self._backward)
        received, self._received = self._received, None
        if isinstance(received, Tensor):
            return _unpack(received, self._columns)
        assert received is not None  # launch() always sets it
        return received

    def _wait(self) -> None:
        # Under NCCL the current stream waits, under gloo the thread does. Each work is waited for exactly once, and
        # what was sent has to live until then.
        if self._work is not None:
            self._work.wait()
            self._work = self._sent = None

    def _move(self, expected: _State, new: _State) -> None:
        if self._state is not expected:
            direction = "backward" if self._backward else "forward"
            raise ExchangeOrderError(
                f"{self._label}{self._name} ({direction}) is {self._state.value} and cannot become {new.value}: "
                "start and finish belong in this order, once each"
            )
        self._state = new


class Exchange:
    """One all-to-all over ``group``, forward and backward, each as a start and a finish.

    Args:
        name: what it carries, for error messages and marks.
        label: whose it is, where a layer has several; stands before the name.
        group: the process group that exchanges rows.
        send_rows: rows that go to each rank in forward; None for equal parts.
        receive_rows: rows that come from each rank in forward; None for equal parts.
        blocking: wait in ``start`` (forward) and in the backward of ``finish``: nothing is hidden, nothing else
        changes.
    """

    def __init__(
        self,
        *,
        name: str,
        group: dist.ProcessGroup,
        send_rows: Rows,
        receive_rows: Rows,
        blocking: bool,
        label: str = "",
    ) -> None:
        self.group = group
        self.blocking = blocking
        self.send_rows = send_rows
        self.receive_rows = receive_rows
        self.forward_leg = _Leg(name, label, backward=False)
        self.backward_leg = _Leg(name, label, backward=True)

    def start(self, *tensors: Tensor) -> Tensor:
        """Launch the exchange of ``tensors`` ([rows, ...] each) and return the token that ``finish`` takes."""
        return _Start.apply(self, *tensors)

    def finish(self, token: Tensor) -> tuple[Tensor, ...]:
        """Wait, and return the tensors with the rows that this rank received.

        Raises:
            ExchangeOrderError: if it was not started, or was finished before.
        """
        return _Finish.apply(self, token)


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


class Flight:
    """The tokens of one MoE call on their way to the experts and back.

    The stages are those of Core's token dispatcher, and its own code runs them on a copy of it, one for each flight
    (Core's keeps its state on itself, so one object cannot carry two). Only the two stages that communicate are ours.

    Args:
        moe: the layer whose router decided and whose experts run.
        plan: blocking or not; where the experts run is the caller's business.
        label: whose flight it is, where a layer has several.
    """

    def __init__(self, moe: MoELayer, plan: Plan, label: str = "") -> None:
        self._moe = moe
        self._label = label
        self._blocking = plan.blocking
        self._dispatcher = mcore.dispatcher_for_one_flight(moe)
        self._exchange: Exchange | None = None
        self._token: Tensor | None = None

    def start_dispatch(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> None:
        """Permute the tokens by expert and send them off.

        Args:
            hidden_states: what the experts read, [s, b, h].
            probs: gate weights, [s * b, experts].
            routing_map: which expert gets which token, bool, [s * b, experts].
        """
        dispatcher = self._dispatcher
        tokens, token_probs = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
        send_rows, receive_rows = mcore.split_rows(dispatcher)
        self._start("dispatch", (tokens, token_probs), send_rows, receive_rows)

    def finish_dispatch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait for the tokens of this rank's experts: tokens [n, h], tokens per expert, gate weights [n]."""
        return self._dispatcher.dispatch_postprocess(*self._finish())

    def experts(self, tokens: Tensor, tokens_per_expert: Tensor, token_probs: Tensor) -> Tensor:
        """Run this rank's experts; returns their weighted output, [n, h]."""
        observe.mark(self._label + EXPERTS)
        output, bias = self._moe.experts(tokens, tokens_per_expert, token_probs)
        assert bias is None  # refused: experts with a bias of their own
        return output

    def start_combine(self, expert_output: Tensor) -> None:
        """Send the experts' outputs back to where their tokens came from."""
        tokens = self._dispatcher.combine_preprocess(expert_output)
        receive_rows, send_rows = mcore.split_rows(self._dispatcher)
        self._start("combine", (tokens,), send_rows, receive_rows)

    def finish_combine(self) -> Tensor:
        """Wait for the outputs and put them in token order, [s, b, h]: the sum over each token's experts."""
        (tokens,) = self._finish()
        return self._dispatcher.combine_postprocess(tokens)

    def _start(self, name: str, tensors: tuple[Tensor, ...], send_rows: Rows, receive_rows: Rows) -> None:
        if self._exchange is not None:
            raise ExchangeOrderError(f"{name} starts while this flight's last exchange is not finished")
        self._exchange = Exchange(
            name=name,
            group=self._moe.ep_group,
            send_rows=send_rows,
            receive_rows=receive_rows,
            blocking=self._blocking,
            label=self._label,
        )
        self._token = self._exchange.start(*tensors)

    def _finish(self) -> tuple[Tensor, ...]:
        if self._exchange is None or self._token is None:
            raise ExchangeOrderError("a flight's exchange is finished before it was started")
        exchange, token = self._exchange, self._token
        self._exchange = self._token = None
        return exchange.finish(token)
