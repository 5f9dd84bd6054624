"""CUDA's streams and events, and NCCL's all-to-all, where there is no GPU: what they order is told to ``stream_order``.

A program that uses them runs under ``checked`` as it is::

    with checked() as order:
        side, payload = torch.cuda.Stream(priority=-1), torch.ones(4)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = 2 * payload
        doubled.sum()
    assert order.faults  # nobody waited for the side stream

What stands in: ``torch.cuda.Stream``, ``Event``, ``stream``, ``current_stream``, ``default_stream``, ``synchronize``;
``Tensor.record_stream`` and ``Tensor.tolist``; ``torch.distributed.all_to_all_single``; and where Megatron is imported
its copies of counts to the host. In backward a node runs on the stream that was current when it was made in forward,
and waits for the streams of the nodes whose gradients it takes, as in autograd's engine. All of one thread.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
import torch.distributed as dist
from stream_order import MAIN, Kernels, Order
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_ids = itertools.count(MAIN + 1)  # of streams and events
_LEAF = 2**64 - 1  # sequence number of all nodes that add up gradients of leaves

type Exchange = Callable[..., Any]
"""Moves rows as ``torch.distributed.all_to_all_single`` does, whose first five arguments it takes, and waits."""


@dataclass(slots=True)
class _Entered:
    """A ``with torch.cuda.stream`` block.

    Attributes:
        stream: that is current in it.
        node: sequence number of autograd's node that runs it; None for none.
        first_node: sequence number of the first node that is made in it.
    """

    stream: int
    node: int | None
    first_node: int


class _Host:
    """The thread that launches: which stream is current for it, also in backward.

    Args:
        order: is told what autograd's engine makes streams wait for.
        exchange: moves the rows of an all-to-all.
        stash: whether a collective that was launched holds its tensors until it is waited for, as in torch from 2.8.

    Attributes:
        stashes: what they hold.
    """

    def __init__(self, order: Order, exchange: Exchange, *, stash: bool) -> None:
        self.order, self.exchange, self.stash = order, exchange, stash
        self.stashes: dict[int, tuple[Tensor, ...]] = {}
        self._entered: list[_Entered] = []
        self._left: list[tuple[_Entered, int]] = []  # with the first node behind it
        self._wires: dict[Any, Stream] = {}
        self._running: int | None = None  # the node that runs
        self._takers: list[int] = []  # nodes of other streams that take its gradients
        self._ready: dict[int, list[int]] = {}  # of such nodes, events that they wait for

    def current(self) -> int:
        """The stream that is current."""
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        if number != self._running:
            self._switch(node, number)
        last = self._entered[-1] if self._entered else None
        if last is not None and last.node == number:
            return last.stream
        return MAIN if node is None else self._stream_of(number)

    def enter(self, stream: int) -> None:
        self.current()
        self._entered.append(_Entered(stream, self._running, torch.autograd._get_sequence_nr()))

    def leave(self) -> None:
        entered, behind = self._entered.pop(), torch.autograd._get_sequence_nr()
        if behind > entered.first_node:
            self._left.append((entered, behind))

    def wire(self, group: Any) -> Stream:
        """NCCL's stream for collectives of ``group``."""
        if group not in self._wires:
            self._wires[group] = Stream(name="nccl")
        return self._wires[group]

    def _stream_of(self, number: int | None) -> int:
        """That was current when a node was made: inner blocks were left before outer ones."""
        assert number is not None
        if number == _LEAF:
            return MAIN
        for entered, behind in self._left:
            if entered.first_node <= number < behind:
                return entered.stream
        return next((one.stream for one in reversed(self._entered) if one.first_node <= number), MAIN)

    def _switch(self, node: Any, number: int | None) -> None:
        """Another node runs than before, or none: gradients that pass between streams are waited for."""
        if self._takers:
            assert self._running is not None
            event = next(_ids)
            self.order.record(event, self._stream_of(self._running))
            for taker in self._takers:
                self._ready.setdefault(taker, []).append(event)
        if self._running is None and self._entered:  # gradients that backward was called with
            event = next(_ids)
            self.order.record(event, self._entered[-1].stream)
            self.order.wait(event, self._stream_of(number))
        self._running, self._takers = number, []
        if node is None:  # who called backward waits for all of it
            for event in itertools.chain.from_iterable(self._ready.values()):
                self.order.wait(event, MAIN)
            self._ready.clear()
            return
        for event in self._ready.pop(number, ()) if number is not None else ():
            self.order.wait(event, self._stream_of(number))
        if self._left or self._entered:
            self._takers = self._takers_of(node)

    def _takers_of(self, node: Any) -> list[int]:
        """The nearest nodes of other streams; those between may compute nothing, and are not seen when they run."""
        here, takers, seen, nodes = self._stream_of(node._sequence_nr()), [], set(), [node]
        while nodes:
            for following, _ in nodes.pop().next_functions:
                if following is None or following in seen:
                    continue
                seen.add(following)
                number = following._sequence_nr()
                if self._stream_of(number) == here:
                    nodes.append(following)
                else:
                    takers.append(number)
        return takers


_host: _Host | None = None  # while something is checked


class Stream:
    """A ``torch.cuda.Stream``. Outside of ``checked`` it does nothing.

    Args:
        device: any.
        priority: kept; nothing here has a time.
        name: for what is found.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, name: str = "", id: int | None = None) -> None:
        self.id = next(_ids) if id is None else id
        self.device, self.priority, self.name = device, priority, name or f"stream {self.id}"

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        if _host is not None:
            _host.order.host_waits_for_stream(_known(self))

    def query(self) -> bool:
        """Whether the host has waited for it: the latest that a GPU may be done."""
        return self.record_event().query()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


class Event:
    """A ``torch.cuda.Event``. Its times are those at which the host recorded it."""

    def __init__(self, **_options: Any) -> None:
        self.id = next(_ids)
        self._recorded_s = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_s = time.perf_counter()
        if _host is not None:
            _host.order.record(self.id, _known(stream))

    def wait(self, stream: Stream | None = None) -> None:
        if _host is not None:
            _host.order.wait(self.id, _known(stream))

    def synchronize(self) -> None:
        if _host is not None:
            _host.order.host_waits_for_event(self.id)

    def query(self) -> bool:
        """Whether the host has waited for it: the latest that a GPU may be done."""
        return _host is None or _host.order.is_known_to_host(self.id)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end._recorded_s - self._recorded_s) * 1e3


def _known(stream: Stream | None) -> int:
    """The id of a stream whose name ``Order`` knows; of the current one for None."""
    assert _host is not None
    if stream is None:
        return _host.current()
    _host.order.names.setdefault(stream.id, stream.name)
    return stream.id


def current_stream(_device: Any = None) -> Stream:
    if _host is None:
        return default_stream()
    current = _host.current()
    return Stream(id=current, name=_host.order.names[current])


def default_stream(_device: Any = None) -> Stream:
    return Stream(id=MAIN, name="main")


@contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``: what is launched in it, and backward of what is recorded in it, runs on ``stream``."""
    if stream is None or _host is None:
        yield
        return
    host = _host
    host.enter(_known(stream))
    try:
        yield
    finally:
        host.leave()


def synchronize(_device: Any = None) -> None:
    if _host is not None:
        _host.order.host_waits_for_all()


class Work:
    """A collective that was launched, as ``torch.distributed`` returns it for NCCL.

    ``wait`` makes the stream that is current wait, and lets go of the collective's tensors, whatever that stream is
    (pytorch 188655). Of a work that nobody waits for torch holds them until it is over.
    """

    def __init__(self, host: _Host, wire: Stream, *tensors: Tensor) -> None:
        self._host, self._done = host, wire.record_event()
        if host.stash:
            host.stashes[self._done.id] = tensors

    def wait(self, _timeout: Any = None) -> bool:
        self._done.wait()
        self._host.stashes.pop(self._done.id, None)
        return True

    def is_completed(self) -> bool:
        return self._done.query()

    def get_future(self) -> Future:
        return Future(self._done)


class Future:
    """Of a collective on NCCL: complete at once, with callbacks on a stream of their own that waits for it."""

    def __init__(self, done: Event) -> None:
        self._done = done

    def then(self, callback: Callable[[Future], Any]) -> Future:
        with stream(Stream(name="callbacks")):
            self._done.wait()
            callback(self)
        return self


def all_to_all_single(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Work | None:
    """On the group's stream, which waits for the one that is current; without ``async_op`` on the current one."""
    assert _host is not None
    host, here = _host, current_stream()
    wire = host.wire(group) if async_op else here
    if async_op:
        wire.wait_stream(here)
    with _disable_current_modes():
        host.exchange(output, input, output_split_sizes, input_split_sizes, group)
    host.order.kernel("all_to_all", _known(wire), reads=[input], writes=[output], host=here.id)
    return Work(host, wire, output, input) if async_op else None


class Arriving(numpy.ndarray):
    """A copy on the host as an array, whose values may be looked at when the host has waited for it."""

    check: Callable[[str], None] | None = None

    def __array_finalize__(self, source: Any) -> None:
        self.check = getattr(source, "check", None)

    def _look(self, operator: str) -> numpy.ndarray:
        if self.check is not None:
            self.check(operator)
        return self.view(numpy.ndarray)

    def tolist(self) -> Any:
        return self._look("tolist").tolist()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._look("iteration"))

    def __getitem__(self, index: Any) -> Any:
        return self._look("index")[index]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [one._look(ufunc.__name__) if isinstance(one, Arriving) else one for one in inputs]
        return getattr(ufunc, method)(*plain, **options)


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron-Core's function of that name, whose copies are not waited for."""
    assert _host is not None
    if not torch.is_tensor(tensor):
        return tensor
    here = _host.current()
    copy = _host.order.copy_to_host(tensor, here)
    if record_stream:
        _host.order.record_stream(tensor, here)
    if copy is tensor or not as_numpy:
        return copy
    array = copy.numpy().view(Arriving)
    array.check = _host.order.arrival_check(copy)
    return array


def loopback(output: Tensor, input: Tensor, *_splits_and_group: Any) -> None:
    """An exchange with oneself."""
    output.copy_(input)


@contextmanager
def checked(exchange: Exchange | None = None, *, stash: bool = True, cuda_for: Collection[str] = ()) -> Iterator[Order]:
    """Put the stand-ins in place, and see whether what runs is in order; the faults are there when it has ended.

    Args:
        exchange: moves rows; None for ``torch.distributed.all_to_all_single`` as it was.
        stash: whether a launched collective holds its tensors until it is waited for, as in torch from 2.8. Without,
            its caller has to.
        cuda_for: modules, by name, that are told that there is CUDA.
    """
    global _host  # torch.cuda is global, too
    assert _host is None
    order = Order()
    host = _Host(order, exchange or dist.all_to_all_single, stash=stash)
    with ExitStack() as stack:
        for owner, name, stand_in in _stand_ins(host, cuda_for):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.callback(_forget)
        _host = host
        with Kernels(order, host.current):
            yield order
        order.free_dead()


def _forget() -> None:
    global _host
    _host = None


def _stand_ins(host: _Host, cuda_for: Collection[str]) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced: an owner, a name, what takes its place."""
    for stand_in in (Stream, Event, stream, current_stream, default_stream, synchronize):
        yield torch.cuda, stand_in.__name__, stand_in
    tolist, is_available = Tensor.tolist, torch.cuda.is_available

    def looked_at(tensor: Tensor) -> Any:
        host.order.host_reads(tensor, host.current(), "tolist")
        return tolist(tensor)

    def available() -> bool:
        return sys._getframe(1).f_globals["__name__"] in cuda_for or is_available()

    yield Tensor, "tolist", looked_at
    yield Tensor, "record_stream", lambda tensor, stream: host.order.record_stream(tensor, _known(stream))
    yield torch.cuda, "is_available", available
    yield dist, "all_to_all_single", all_to_all_single
    for name in ("token_dispatcher", "moe_utils"):
        if module := sys.modules.get(f"megatron.core.transformer.moe.{name}"):
            yield module, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu
    if module := sys.modules.get("megatron.core.transformer.moe.token_dispatcher"):
        yield module.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", Stream(name="counts")
    if module := sys.modules.get("megatron_scmoe.dispatch.exchange"):  # which keeps the first one that it made
        aside = Stream(priority=-1, name="aside")
        yield module, "_aside", lambda: aside
