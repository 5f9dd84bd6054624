"""The stand-ins of streams and what is found with them, on small programs: right ones, and each kind of wrong one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import stream_stand_ins
import torch
import torch.distributed as dist
from stream_order import Kind, Order
from stream_stand_ins import checked, loopback, maybe_move_tensor_to_cpu
from torch import Tensor
from torch.autograd.function import once_differentiable

SIZE = 8


def found_in(program: Callable[[], None], **how: bool) -> Order:
    with checked(loopback, **how) as order:
        program()
    return order


# ---- streams, events, memory, the host ----------------------------------------------------------------------------


def one_stream() -> None:
    rows = torch.ones(SIZE)
    rows.mul_(2)
    del rows
    torch.zeros(SIZE).sum()


def side_stream(
    *,
    waits: bool = True,
    main_waits: bool = True,
    overwritten: bool = False,
    freed: bool = False,
    recorded: bool = False,
    event_first: bool = False,
) -> None:
    """A side stream reads what main wrote, and main what the side stream made of it."""
    side = torch.cuda.Stream(priority=-1)
    rows, doubled = torch.empty(SIZE), torch.empty(SIZE)
    ready = torch.cuda.Event()
    if event_first:
        ready.record()
    rows.fill_(1)
    if not event_first:
        ready.record()
    if waits:
        side.wait_event(ready)
    with torch.cuda.stream(side):
        torch.mul(rows, 2, out=doubled)
        if recorded:
            rows.record_stream(torch.cuda.current_stream())
    if overwritten:
        rows.fill_(3)
    if freed:
        del rows
    if main_waits:
        torch.cuda.current_stream().wait_stream(side)
    doubled.sum()
    torch.cuda.synchronize()


def host_in_between(*, of: str) -> None:
    """The host waits where no stream does."""
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    rows = torch.ones(SIZE)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        doubled = torch.mul(rows, 2, out=torch.empty_like(rows))
        done.record()
    assert not done.query() and not side.query()
    if of == "event":
        done.synchronize()
    elif of == "stream":
        side.synchronize()
    elif of == "device":
        torch.cuda.synchronize()
    assert done.query() is bool(of)
    doubled.sum()
    torch.cuda.synchronize()
    assert side.query()


def owned_by_side(*, recorded: bool) -> None:
    """Main reads memory of the side stream's, and frees it."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        rows = torch.ones(SIZE)
    torch.cuda.current_stream().wait_stream(side)
    rows.sum()
    if recorded:
        rows.record_stream(torch.cuda.current_stream())
    del rows
    with torch.cuda.stream(side):
        torch.zeros(SIZE)


def allocated(*, behind: bool) -> None:
    """A side stream writes into memory of main's, which was last used for something else, and read by main since."""
    side, ready = torch.cuda.Stream(), torch.cuda.Event()
    rows = torch.ones(SIZE)
    if not behind:
        received = torch.empty(SIZE)
    ready.record()
    rows.sum()  # what reads the block that ``received`` gets, as far as main knows
    if behind:
        received = torch.empty(SIZE)
    side.wait_event(ready)
    with torch.cuda.stream(side):
        received.fill_(1)
    torch.cuda.current_stream().wait_stream(side)
    received.sum()


def counts_on_host(*, waits: bool, as_numpy: bool, recorded: bool = True) -> None:
    copies, arrived = torch.cuda.Stream(), torch.cuda.Event()
    counts = torch.arange(SIZE) * 2
    copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies):
        on_host = maybe_move_tensor_to_cpu(counts, as_numpy=as_numpy, record_stream=recorded)
        assert as_numpy or maybe_move_tensor_to_cpu(on_host) is on_host
        arrived.record()
    del counts
    torch.zeros(SIZE)
    if waits:
        arrived.synchronize()
    assert on_host.tolist() == [*range(0, 2 * SIZE, 2)]
    assert (on_host + on_host)[1].item() == 4 == 2 * on_host[1]


def program(function: Callable[..., None], **choices: object) -> Callable[[], None]:
    return lambda: function(**choices)


RIGHT = {
    "one stream": one_stream,
    "side stream": program(side_stream),
    "side stream, main lets the memory go behind it": program(side_stream, freed=True, recorded=True),
    "host waits for an event": program(host_in_between, of="event"),
    "host waits for a stream": program(host_in_between, of="stream"),
    "host waits for the device": program(host_in_between, of="device"),
    "another stream's memory, recorded": program(owned_by_side, recorded=True),
    "allocated before the event": program(allocated, behind=False),
    "counts": program(counts_on_host, waits=True, as_numpy=False),
    "counts as an array": program(counts_on_host, waits=True, as_numpy=True),
}
WRONG = {
    "side stream does not wait": (program(side_stream, waits=False), {Kind.RACE}),
    "event is recorded too early": (program(side_stream, event_first=True), {Kind.RACE}),
    "main does not wait": (program(side_stream, main_waits=False), {Kind.RACE}),
    "main overwrites what is read": (program(side_stream, overwritten=True), {Kind.RACE}),
    "main frees what is read": (program(side_stream, freed=True), {Kind.MEMORY}),
    "host waits for nothing": (program(host_in_between, of=""), {Kind.RACE}),
    "another stream's memory": (program(owned_by_side, recorded=False), {Kind.MEMORY}),
    "allocated behind the event": (program(allocated, behind=True), {Kind.MEMORY}),
    "counts are read too early": (program(counts_on_host, waits=False, as_numpy=False), {Kind.HOST}),
    "an array of counts is read too early": (program(counts_on_host, waits=False, as_numpy=True), {Kind.HOST}),
    "counts are freed while they are copied": (
        program(counts_on_host, waits=True, as_numpy=True, recorded=False),
        {Kind.MEMORY},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_have_no_fault(name):
    order = found_in(RIGHT[name])
    assert order.faults == [] and order.num_kernels


@pytest.mark.parametrize("name", WRONG)
def test_wrong_programs_are_found(name):
    wrong, kinds = WRONG[name]
    faults = found_in(wrong).faults
    assert {fault.kind for fault in faults} == kinds
    assert not any(fault.in_backward for fault in faults)


def test_a_fault_says_who_and_where():
    (fault, *_) = found_in(program(side_stream, main_waits=False)).faults
    assert str(fault).startswith("RACE: aten.sum.default, which reads on main at test_stream_order.py:")
    assert "may overtake aten.mul.out, which writes on stream " in str(fault)


TOUCHES = {
    "a view": (lambda rows, _one: rows.view(2, -1)[1:].t(), False),
    "a view that is declared as a copy": (lambda rows, _one: torch.ops.aten._unsafe_view(rows, [2, SIZE // 2]), False),
    "its shape": (lambda rows, _one: (torch.zeros_like(rows), rows.new_ones(3)), False),
    "a part": (lambda rows, _one: rows[:2].sum(), True),
    "in place": (lambda rows, _one: rows.detach().mul_(2), True),
    "as output": (lambda rows, one: torch.exp(one, out=rows), True),
    "one of several": (lambda rows, one: torch.cat([one, rows]), True),
    "several in place": (lambda rows, one: torch._foreach_add_([one, rows], 1), True),
    "by the host": (lambda rows, _one: rows[0].item(), True),
    "by the host, all of it": (lambda rows, _one: rows.tolist(), True),
}


@pytest.mark.parametrize("name", TOUCHES)
def test_what_an_operation_reads_and_writes(name):
    """Main does it to rows that a side stream writes, and has not waited."""
    touch, is_found = TOUCHES[name]

    def rows_of_side() -> None:
        side, rows, one = torch.cuda.Stream(), torch.ones(SIZE), torch.ones(SIZE)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            rows.fill_(2)
        touch(rows, one)
        torch.cuda.synchronize()

    assert {fault.kind for fault in found_in(rows_of_side).faults} == ({Kind.RACE} if is_found else set())


# ---- an all-to-all in halves, as the package has it ---------------------------------------------------------------


class Halves:
    """An all-to-all whose payload is packed on main and launched on a side stream, and what can be wrong with it.

    Args:
        event: whether the side stream waits for what was recorded behind packing.
        early: record that before packing.
        allocated: on which stream, "main" or "side", and "late" for main behind the dense op that hides it.
        wait_on: "main", "side" for the side stream where it launches, or "nobody".
        keeps: what is sent until the wait.
        all_of_it: the side stream is current for the whole start, and so for the backward of it.
    """

    def __init__(
        self,
        *,
        event: bool = True,
        early: bool = False,
        allocated: str = "main",
        wait_on: str = "main",
        keeps: bool = True,
        all_of_it: bool = False,
    ) -> None:
        self.event, self.early, self.allocated = event, early, allocated
        self.wait_on, self.keeps, self.all_of_it = wait_on, keeps, all_of_it
        self.side = torch.cuda.Stream(priority=-1)
        self.sent: Tensor | None = None

    def launch(self, rows: Tensor) -> None:
        packed = torch.cuda.Event()
        if self.early:
            packed.record()
        self.sent = torch.cat([rows, rows + 1])
        if self.allocated == "main":
            self.received = torch.empty_like(self.sent)
        if not self.early:
            packed.record()
        rows.sum()  # a dense op, enqueued before the launch
        if self.event:
            self.side.wait_event(packed)
        with torch.cuda.stream(self.side):
            if self.allocated == "side":
                self.received = torch.empty_like(self.sent)
        if self.allocated == "late":
            self.received = torch.empty_like(self.sent)
        with torch.cuda.stream(self.side):
            self.work = dist.all_to_all_single(self.received, self.sent, async_op=True)
            if self.wait_on == "side":
                self.work.wait()
        if not self.keeps:
            self.sent = None

    def finish(self) -> Tensor:
        if self.wait_on == "main":
            self.work.wait()
        self.sent = None
        if self.wait_on == "side":
            torch.cuda.current_stream().wait_stream(self.side)
        received = self.received * 1
        if self.allocated == "side":
            self.received.record_stream(torch.cuda.current_stream())
        del self.received
        return received.view(2, -1).sum(dim=0)


class Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, rows):
        ctx.back = exchange[1]
        exchange[0].launch(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _token_grad):
        return None, ctx.back.finish()


class Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, token):
        ctx.back = exchange[1]
        return exchange[0].finish()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.back.launch(grad)
        return None, grad.new_empty(0)


def there_and_back(**how: object) -> None:
    exchange = Halves(**how), Halves(**how)
    weight = torch.nn.Parameter(torch.ones(SIZE))
    rows = torch.ones(SIZE) * weight
    whole = torch.cuda.stream(exchange[0].side) if exchange[0].all_of_it else nullcontext()
    with whole:
        if exchange[0].all_of_it:
            exchange[0].side.wait_stream(torch.cuda.default_stream())
        token = Start.apply(exchange, rows)
    dense = (rows * weight).exp()
    arrived = Finish.apply(exchange, token)
    (dense + arrived).sum().backward()
    assert weight.grad is not None


RIGHT_EXCHANGES = {
    "all on main but the launch": ({}, True),
    "and holds what it sends": ({}, False),
    "memory of the side stream's, recorded": ({"allocated": "side"}, True),
    "the work holds what is sent": ({"keeps": False}, True),
}
WRONG_EXCHANGES = {
    "nobody waits": ({"wait_on": "nobody"}, True, {Kind.RACE}),
    "side stream does not wait": ({"event": False}, True, {Kind.RACE, Kind.MEMORY}),
    "event before packing": ({"early": True}, True, {Kind.RACE, Kind.MEMORY}),
    "payload freed before the wait": ({"keeps": False}, False, {Kind.MEMORY}),
    "memory that main used behind packing": ({"allocated": "late"}, True, {Kind.MEMORY}),
    "waits where it launches (pytorch 188655)": ({"wait_on": "side", "keeps": False}, True, {Kind.MEMORY}),
}


@pytest.mark.parametrize("name", RIGHT_EXCHANGES)
def test_right_exchanges_have_no_fault(name):
    how, stash = RIGHT_EXCHANGES[name]
    assert found_in(program(there_and_back, **how), stash=stash).faults == []


@pytest.mark.parametrize("name", WRONG_EXCHANGES)
def test_wrong_exchanges_are_found_forward_and_backward(name):
    how, stash, kinds = WRONG_EXCHANGES[name]
    faults = found_in(program(there_and_back, **how), stash=stash).faults
    for backward in (False, True):
        assert {fault.kind for fault in faults if fault.in_backward is backward} == kinds


def test_a_start_that_is_recorded_on_the_side_stream_waits_there_in_backward():
    """Its work lets go of the gradients where main has not waited (pytorch 188655): only the launch belongs there."""
    faults = found_in(program(there_and_back, all_of_it=True)).faults
    assert Kind.MEMORY in {fault.kind for fault in faults if fault.in_backward}


def test_a_blocking_collective_runs_on_the_current_stream():
    def blocking() -> None:
        rows = torch.ones(SIZE)
        dist.all_to_all_single(torch.empty_like(rows), rows)
        rows.fill_(2)

    order = found_in(blocking)
    assert order.faults == [] and set(order.names.values()) == {"main"}


def test_a_callback_of_a_collective_is_behind_it():
    def program() -> None:
        rows, ended = torch.ones(SIZE), torch.cuda.Event()
        received = torch.empty_like(rows)
        work = dist.all_to_all_single(received, rows, async_op=True)
        assert not work.is_completed()
        work.get_future().then(lambda _future: ended.record())
        ended.wait()
        received.sum()

    assert found_in(program).faults == []


# ---- backward -----------------------------------------------------------------------------------------------------


def two_streams(*, joined: bool) -> None:
    """Backward of what a side stream computed runs there, and autograd makes streams wait for one another."""
    side = torch.cuda.Stream()
    where: list[tuple[str, torch.cuda.Stream]] = []
    weight = torch.nn.Parameter(torch.ones(SIZE))
    rows = weight * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        doubled = rows.exp()
        doubled.register_hook(lambda _grad: where.append(("side", torch.cuda.current_stream())))
    rows.record_stream(side)
    if joined:
        torch.cuda.current_stream().wait_stream(side)
    doubled.record_stream(torch.cuda.current_stream())
    loss = doubled.sin().sum()
    loss.register_hook(lambda _grad: where.append(("main", torch.cuda.current_stream())))
    with torch.cuda.stream(side):  # which stream calls it does not matter
        loss.backward()
    assert where == [("main", torch.cuda.default_stream()), ("side", side)]
    weight.grad.sum()
    torch.cuda.synchronize()


def test_backward_runs_on_the_streams_of_forward():
    assert [fault for fault in found_in(program(two_streams, joined=True)).faults if fault.kind is Kind.RACE] == []
    assert {fault.kind for fault in found_in(program(two_streams, joined=False)).faults} >= {Kind.RACE}


def test_gradients_between_streams_are_waited_for(monkeypatch):
    """Negative control: without what autograd's engine does, they race."""
    monkeypatch.setattr(stream_stand_ins._Host, "_takers_of", lambda self, node: [])
    faults = found_in(program(two_streams, joined=True)).faults
    assert Kind.RACE in {fault.kind for fault in faults if fault.in_backward}


# ---- the checker itself -------------------------------------------------------------------------------------------


def test_everything_is_put_back():
    before = [torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.is_available, dist.all_to_all_single]
    with pytest.raises(ZeroDivisionError), checked(loopback):
        assert torch.cuda.Stream is stream_stand_ins.Stream
        stand_in, event = torch.cuda.Stream(), torch.cuda.Event()
        raise ZeroDivisionError
    assert before == [torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.is_available, dist.all_to_all_single]
    assert "tolist" not in vars(Tensor) and "record_stream" not in vars(Tensor)
    stand_in.wait_event(event)  # does nothing, here and in a later check, which does not know them
    with checked(loopback) as order:
        stand_in.wait_event(event)
        with torch.cuda.stream(stand_in):
            torch.ones(SIZE)
    assert order.faults == []


def test_modules_can_be_told_that_there_is_cuda():
    with checked(loopback, cuda_for=[__name__]):
        assert torch.cuda.is_available()
    with checked(loopback):
        assert not torch.cuda.is_available()


def test_many_kernels_leave_nothing_behind():
    with checked(loopback) as order:
        for _ in range(2000):
            torch.ones(SIZE).sum()
        assert len(order._blocks) < 1200
    assert order.faults == []
