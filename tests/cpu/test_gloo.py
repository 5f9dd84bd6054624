"""Our all-to-all on gloo gives what gloo's own gives, whatever the splits, waits when asked, and passes failures on."""

from __future__ import annotations

import numpy
import pytest
import ranks
import torch
import torch.distributed as dist

from megatron_scmoe.cpu import gloo

ROWS = {  # rows that each rank sends to each, one list for each rank
    "uneven": [[1, 2, 3], [0, 4, 1], [5, 0, 2]],
    "one rank sends nothing": [[0, 0, 0], [1, 2, 3], [3, 2, 1]],
    "nobody sends anything": [[0, 0, 0]] * 3,
}


def exchanged(rows: list[list[int]], dtype: torch.dtype, own: bool) -> torch.Tensor:
    rank = dist.get_rank()
    sent = torch.arange(sum(rows[rank]) * 2).view(-1, 2).add(100 * rank).to(dtype)
    received = torch.empty(sum(row[rank] for row in rows), 2, dtype=dtype)
    splits = [row[rank] for row in rows], rows[rank]
    if own:
        dist.distributed_c10d.all_to_all_single(received, sent, *splits)  # the one that the CPU backend leaves alone
    else:
        gloo.all_to_all_single(received, sent, *map(numpy.array, splits), async_op=True).wait()  # as Core has them
    return received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("name", ROWS)
def test_it_gives_what_gloos_own_gives(name, dtype):
    ours, theirs = (ranks.run(exchanged, 3, ROWS[name], dtype, own) for own in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def many_at_once() -> tuple[list[torch.Tensor], list[int]]:
    """Several in flight, waited for in another order than they were launched in; equal splits."""
    rank = dist.get_rank()
    results = [torch.zeros(4) for _ in range(5)]
    landed: list[int] = []
    works = []
    for number, result in enumerate(results):
        work = gloo.all_to_all_single(result, torch.full((4,), 10.0 * number + rank), async_op=True)
        work.get_future().then(lambda _future, number=number: landed.append(number))
        works.append(work)
    for work in reversed(works):
        assert work.wait()
    last = torch.zeros(4)
    gloo.all_to_all_single(last, torch.full((4,), 90.0 + rank))
    return [*results, last], landed


def test_several_are_in_flight_and_land_in_order():
    for results, landed in ranks.run(many_at_once, 2):
        expected = [10.0 * number for number in (*range(5), 9)]
        assert [result.tolist() for result in results] == [[one, one, one + 1, one + 1] for one in expected]
        assert landed == list(range(5))


class Part:
    """A send or a receive that ends well or not."""

    def __init__(self, problem: str = "") -> None:
        self._problem = problem

    def wait(self) -> None:
        if self._problem:
            raise RuntimeError(self._problem)


def test_failures_reach_who_waits():
    work = gloo.Work()
    work.follow([Part(), Part("the peer is gone"), Part()])
    with pytest.raises(RuntimeError, match="the peer is gone"):
        work.wait()
    good = gloo.Work()
    good.follow([Part()])
    assert good.wait() and good.get_future().done()
