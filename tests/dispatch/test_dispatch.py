"""The two halves of a collective: what arrives, what goes back, several in flight, and wrong orders."""

from __future__ import annotations

import itertools

import pytest
import ranks
import torch
import torch.distributed as dist

from megatron_scmoe.dispatch.exchange import Exchange, ExchangeOrderError, Tag
from megatron_scmoe.dispatch.payload import pack, unpack
from megatron_scmoe.overlap.observe import Marker


def make_exchange(
    name: str = "test", *, blocking: bool = False, apart: bool = False, aside: bool = False
) -> tuple[Exchange, torch.Tensor, torch.Tensor]:
    """An uneven exchange: rank r sends r + destination rows to each destination.

    Row i for destination d holds the value 100 r + 10 d + i in three columns, and 1 / that number as its weight.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    send_rows = rows_of_rank()
    values = [100.0 * rank + 10 * d + i + 1 for d in range(size) for i in range(send_rows[d])]
    rows = torch.tensor(values).unsqueeze(1).expand(-1, 3).contiguous()
    weights = 1.0 / torch.tensor(values, dtype=torch.float64)
    exchange = Exchange(tag=Tag(Marker(0), name), group=dist.group.WORLD, blocking=blocking, apart=apart, aside=aside)
    return exchange, rows.requires_grad_(), weights.requires_grad_()


def rows_of_rank() -> list[int]:
    """That it sends to each rank, and gets from it: rank + source is symmetrical."""
    return [dist.get_rank() + other for other in range(dist.get_world_size())]


def start(exchange: Exchange, *tensors: torch.Tensor) -> torch.Tensor:
    token = exchange.announce(*tensors)
    exchange.launch(rows_of_rank(), rows_of_rank())
    return token


def expected_rows(rank: int, size: int) -> list[float]:
    return [100.0 * source + 10 * rank + i + 1 for source in range(size) for i in range(source + rank)]


def there_and_back(blocking: bool, apart: bool) -> dict[str, object]:
    exchange, rows, weights = make_exchange(blocking=blocking, apart=apart)
    received, received_weights = exchange.finish(start(exchange, rows, weights))
    rank = dist.get_rank()
    # The gradient of a row is what its receiver makes of it: its rank + 1, and 10 times that for the weight.
    loss = (received * (rank + 1)).sum() + (received_weights * 10 * (rank + 1)).sum()
    loss.backward()
    return {
        "rows": received[:, 0].tolist(),
        "weights": received_weights.tolist(),
        "dtypes": (received.dtype, received_weights.dtype),
        "row_grads": rows.grad[:, 1].tolist(),
        "weight_grads": weights.grad.tolist(),
    }


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_arrive_and_gradients_return(size, blocking, apart):
    for rank, result in enumerate(ranks.run(there_and_back, size, blocking, apart)):
        rows = expected_rows(rank, size)
        assert result["rows"] == rows
        assert result["weights"] == [1.0 / row for row in rows]
        assert result["dtypes"] == (torch.float32, torch.float64)
        receivers = [destination for destination in range(size) for _ in range(rank + destination)]
        assert result["row_grads"] == [destination + 1.0 for destination in receivers]
        assert result["weight_grads"] == [10.0 * (destination + 1) for destination in receivers]


def collectives(apart: bool) -> int:
    """How many carry tokens and weights, there and back."""
    launched = []
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: launched.append(args) or original(*args, **kwargs)
    try:
        exchange, rows, weights = make_exchange(apart=apart)
        sum(tensor.sum() for tensor in exchange.finish(start(exchange, rows, weights))).backward()
    finally:
        dist.all_to_all_single = original
    return len(launched)


@pytest.mark.parametrize(("apart", "each_way"), [(False, 1), (True, 2)])
def test_tokens_and_weights_are_one_payload_unless_apart(apart, each_way):
    assert ranks.run(collectives, 2, apart) == [2 * each_way] * 2


def with_ids(apart: bool) -> dict[str, object]:
    """An exchange whose rows carry three small numbers beside their weights; widths of what travels, in bytes."""
    exchange, rows, weights = make_exchange(apart=apart)
    ids = rows.detach().to(torch.int16)
    widths = []
    original = dist.all_to_all_single
    dist.all_to_all_single = lambda output, sent, *args, **kwargs: (
        widths.append(sent[:1].nbytes) or original(output, sent, *args, **kwargs)
    )
    try:
        received, _, received_ids = exchange.finish(start(exchange, rows, weights, ids))
        assert not received_ids.requires_grad
        (received * received_ids).sum().backward()
    finally:
        dist.all_to_all_single = original
    same = torch.equal(received.detach().to(torch.int16), received_ids)
    return {"arrived": same, "back": torch.equal(rows.grad, ids.float()), "widths": widths}


@pytest.mark.parametrize(("apart", "widths"), [(False, [16 + 16 + 16, 16 + 16]), (True, [12, 8, 6, 12, 8])])
def test_integers_travel_there_and_nothing_of_them_back(apart, widths):
    for found in ranks.run(with_ids, 4, apart):
        assert found == {"arrived": True, "back": True, "widths": widths}


def interleaved(order: tuple[str, ...]) -> dict[str, object]:
    """Two exchanges in flight, announced (A), launched (L), finished (F) in the given order; b's tensors are apart."""
    exchanges = {name: make_exchange(name, apart=name == "b", aside=True) for name in "ab"}
    tokens, received = {}, {}
    for step, name in order:
        exchange, rows, weights = exchanges[name]
        if step == "A":
            tokens[name] = exchange.announce(rows, weights)
        elif step == "L":
            exchange.launch(rows_of_rank(), rows_of_rank())
        else:
            received[name] = exchange.finish(tokens[name])
    rank = dist.get_rank()
    scale = {"a": 1.0, "b": 7.0}
    sum(scale[name] * (rank + 1) * received[name][0].sum() for name in order and "ab").backward()
    return {name: (received[name][0][:, 0].tolist(), exchanges[name][1].grad[:, 0].tolist()) for name in "ab"}


ORDERS = [
    order
    for order in itertools.permutations(("Aa", "La", "Fa", "Ab", "Lb", "Fb"))
    if all([step for step, name in order if name == its] == ["A", "L", "F"] for its in "ab")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_two_in_flight_in_any_order(order):
    for rank, result in enumerate(ranks.run(interleaved, 2, order)):
        receivers = [destination for destination in range(2) for _ in range(rank + destination)]
        for name, scale in (("a", 1.0), ("b", 7.0)):
            rows, gradients = result[name]
            assert rows == expected_rows(rank, 2)
            assert gradients == [scale * (destination + 1) for destination in receivers]


def wrong_order(how: str) -> str:
    exchange, rows, weights = make_exchange("dispatch")
    try:
        if how == "finish first":
            exchange.finish(torch.empty(0, requires_grad=True))
        if how == "launch first":
            exchange.launch(rows_of_rank(), rows_of_rank())
        token = exchange.announce(rows, weights)
        if how == "announce twice":
            exchange.announce(rows, weights)
        if how == "finish unlaunched":
            exchange.finish(token)
        exchange.launch(rows_of_rank(), rows_of_rank())
        if how == "launch twice":
            exchange.launch(rows_of_rank(), rows_of_rank())
        received = exchange.finish(token)
        if how == "finish twice":
            exchange.finish(token)
        loss = sum(tensor.sum() for tensor in received)
        loss.backward(retain_graph=True)
        if how == "backward twice":
            loss.backward()
    except ExchangeOrderError as error:
        dist.barrier()
        return str(error)
    return "no error"


WRONG = ("finish first", "launch first", "announce twice", "finish unlaunched", "launch twice", "finish twice")


@pytest.mark.parametrize("how", [*WRONG, "backward twice"])
def test_wrong_order_is_an_error(how):
    for message in ranks.run(wrong_order, 2, how):
        assert message.startswith("dispatch of call 0 (")
        assert "announce, launch and finish belong in this order, once each" in message


def on_another_stream(changes: bool) -> str:
    """What the wait says where the stream that is current at the launch is not current any more."""
    exchange, rows, weights = make_exchange("dispatch", aside=True)
    token = start(exchange, rows, weights)
    if changes:
        torch.cuda.current_stream = object
    try:
        exchange.finish(token)
    except ExchangeOrderError as error:
        return str(error)
    return "no error"


def test_a_wait_on_another_stream_is_an_error():
    """What is sent would be used anew while it is read (pytorch/pytorch 188655)."""
    for message in ranks.run(on_another_stream, 2, True):
        assert message.startswith("dispatch of call 0 is waited for on another stream than the one that launched it")
    assert ranks.run(on_another_stream, 2, False) == ["no error"] * 2


def test_right_order_is_no_error():
    assert ranks.run(wrong_order, 2, "right") == ["no error"] * 2


@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (0, 3), (5, 8), (5, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_a_payload_are_aligned(dtype, shape):
    """NCCL copies byte by byte where a peer's part does not begin at a multiple of 16 bytes."""
    rows, weights = torch.randn(shape).to(dtype), torch.randn(shape[0])
    payload, columns = pack((rows, weights))
    assert payload.is_contiguous() and payload.shape[1] * payload.element_size() % 16 == 0
    again, weights_again = unpack(payload, columns)
    assert torch.equal(again, rows) and torch.equal(weights_again, weights)
    assert again.is_contiguous() and weights_again.is_contiguous()


def test_a_row_of_a_wider_tensor_is_packed():
    """One row is contiguous wherever it begins, here at an odd place."""
    rows, weights = torch.randn(1, 9).bfloat16()[:, 1:], torch.ones(1)
    payload, columns = pack((rows, weights))
    assert torch.equal(unpack(payload, columns)[0], rows)


def bytes_of_types(dtype: torch.dtype) -> list[float]:
    """bfloat16 rows of odd width beside float32 weights: nothing is aligned."""
    rank = dist.get_rank()
    rows = (torch.arange(6).view(2, 3) + 10 * rank).to(dtype)
    weights = torch.tensor([0.1, 0.2]) + rank
    exchange = Exchange(tag=Tag(Marker(0), "x"), group=dist.group.WORLD, blocking=False)
    token = exchange.announce(rows, weights)
    exchange.launch(None, None)
    received, received_weights = exchange.finish(token)
    return [*received.float().flatten().tolist(), *received_weights.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_packing_keeps_every_bit(dtype):
    first, second = ranks.run(bytes_of_types, 2, dtype)
    assert first[:6] == [0, 1, 2, 10, 11, 12]
    assert second[:6] == [3, 4, 5, 13, 14, 15]
    assert first[6:] == torch.tensor([0.1, 1.1]).tolist()
    assert second[6:] == torch.tensor([0.2, 1.2]).tolist()
