"""One exchange over torch's own WorkNCCL: its payload lives long enough, and its future marks its end. One rank.

A group of one rank sends to itself, behind a proxy that says it has two, so that the exchange takes the way of several.
Larger transfers of the same communicator go ahead, so that an exchange is under way for milliseconds after its launch.
Meanwhile the main stream takes and fills blocks of the payload's size, as an allocator under pressure would. Not shown:
that ranks meet, or in which order communicators run.

Mutants: no wait, in forward and in backward; a transfer whose end is marked without the future.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import checks
import torch
import torch.distributed as dist

from megatron_scmoe.dispatch.exchange import Exchange, Tag
from megatron_scmoe.overlap import observe
from megatron_scmoe.overlap.recording import Moment

ROWS, WIDTH = 1 << 16, 4096  # 1 GiB in fp32
AHEAD = 8


class OfTwo:
    """A group of one rank that says it has two."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def size(self) -> int:
        return 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def keep_busy(group: OfTwo, payload: torch.Tensor) -> list[Any]:
    """Queue ``AHEAD`` transfers of ``payload`` on the communicator; returns what has to be kept until they are over."""
    landing = torch.empty_like(payload)
    works = [dist.all_to_all_single(landing, payload, group=group._group, async_op=True) for _ in range(AHEAD)]
    return [*works, landing, payload]


def started(
    group: OfTwo, *tensors: torch.Tensor, aside: bool = False, apart: bool = False
) -> tuple[Exchange, torch.Tensor]:
    """An exchange of all rows of ``tensors`` that is under way, launched by a side stream or not, and its token."""
    tag = Tag(observe.Marker(0), "dispatch")
    exchange = Exchange(tag=tag, group=group, blocking=False, apart=apart, aside=aside)
    token = exchange.announce(*tensors)
    if aside:
        take_freed_memory(tensors[0])  # as the op at the tap does meanwhile
    exchange.launch([ROWS], [ROWS])
    return exchange, token


def take_freed_memory(like: torch.Tensor) -> None:
    """Fill whatever the allocator gives for the payload's size: what it thinks is free."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(4)]
    del blocks


def round_trip(group: OfTwo, seed: int, *, aside: bool = False, ids: bool = False) -> None:
    """Tokens and their weights there, and their gradients back, are what was sent.

    With ``ids`` each tensor travels as a collective of its own, bytes of integers behind them, which do not come back.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(ROWS, WIDTH, device="cuda", generator=generator).requires_grad_()
    weights = torch.randn(ROWS, device="cuda", generator=generator).requires_grad_()
    grads = torch.randn(ROWS, WIDTH, device="cuda", generator=generator), torch.randn(ROWS, device="cuda")
    ahead = torch.randn(ROWS, WIDTH, device="cuda", generator=generator)
    torch.cuda.synchronize()
    busy = keep_busy(group, ahead)
    integers = [torch.randint(256, (ROWS, 4), device="cuda", dtype=torch.uint8)] if ids else []
    sent = (rows * 1, weights * 1, *(part + 1 for part in integers))  # products that nobody else keeps
    exchange, token = started(group, *sent, aside=aside, apart=ids)
    del sent
    take_freed_memory(rows)
    arrived = exchange.finish(token)
    assert torch.equal(arrived[0], rows) and torch.equal(arrived[1], weights), "forward: something else has arrived"
    for found, part in zip(arrived[2:], integers, strict=True):
        assert torch.equal(found, part + 1), "forward: other integers have arrived"
    hooked = [part * 1 for part in arrived[:2]]
    torch.cuda.synchronize()
    busy += keep_busy(group, ahead)
    token.register_hook(lambda grad: take_freed_memory(rows))
    torch.autograd.backward(hooked, grads)
    assert torch.equal(rows.grad, grads[0]) and torch.equal(weights.grad, grads[1]), "backward: another gradient"
    torch.cuda.synchronize()
    del busy


@contextlib.contextmanager
def no_wait(direction: str) -> Iterator[None]:
    """Mutant: works of one direction are not waited for."""
    original = dist.all_to_all_single

    def all_to_all_single(*args: Any, **kwargs: Any) -> Any:
        work = original(*args, **kwargs)
        return Unwaited(work, direction) if kwargs.get("async_op") else work

    dist.all_to_all_single = all_to_all_single
    try:
        yield
    finally:
        dist.all_to_all_single = original


class Unwaited:
    """A work whose wait does nothing in one direction; what it carries is kept, as the stash of the real one is."""

    def __init__(self, work: Any, direction: str) -> None:
        self._work, self._direction = work, direction

    def wait(self) -> bool:
        in_backward = torch._C._current_graph_task_id() != -1
        return self._direction == ("backward" if in_backward else "forward") or self._work.wait()

    def get_future(self) -> Any:
        return self._work.get_future()


def ends_are_marked(group: OfTwo, found: checks.Checks, *, too_early: bool = False) -> None:
    """A recorded transfer lasts as long as those ahead of it, and not longer than what was waited for.

    ``too_early`` is a mutant: the end is what the clock says at launch.
    """
    payload = torch.randn(ROWS, WIDTH, device="cuda")
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    with observe.recording() as recorded:
        busy = keep_busy(group, payload)
        exchange, token = started(group, payload)
        if too_early:
            observe._listeners[0]._flying[-1].end = Moment.now()
            transfers = recorded.transfers
        exchange.finish(token)
    end.record()
    torch.cuda.synchronize()
    del busy
    (transfer,) = transfers if too_early else recorded.transfers
    lasted_ms, all_ms = (transfer.end_s - transfer.start_s) * 1e3, begin.elapsed_time(end)
    found.figure("recorded transfer, ms, and all of it", [round(lasted_ms, 3), round(all_ms, 3)])
    assert 0.5 * all_ms < lasted_ms <= all_ms + 0.01, f"recorded {lasted_ms:.3f} ms of {all_ms:.3f}"


def high_priority() -> None:
    """--high-priority-stream-groups ep: an exchange over such a communicator."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    group = dist.new_group([0], backend="nccl", pg_options=options)
    round_trip(OfTwo(group), seed=5)


def part(found: checks.Checks) -> None:
    """Lifetimes, marks, priority, mutants."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors: what has not arrived is NaN
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    group = OfTwo(dist.group.WORLD)
    round_trip(group, seed=0)  # starts the communicator
    for seed in (1, 2):
        found.holds(f"payloads under a full allocator, {seed}", lambda seed=seed: round_trip(group, seed))
    found.holds("launched by a side stream", lambda: round_trip(group, seed=3, aside=True))
    found.holds("integers behind them, each apart", lambda: round_trip(group, seed=4, ids=True))
    found.holds("the future marks the end", lambda: ends_are_marked(group, found))
    found.must_fail("an end that is marked at launch", lambda: ends_are_marked(group, found, too_early=True))
    found.holds("a high-priority communicator", high_priority)
    for direction in ("forward", "backward"):
        with no_wait(direction):
            found.must_fail(f"no wait in {direction}", lambda: round_trip(group, seed=7))
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    checks.run_part(part)
