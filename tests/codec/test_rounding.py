"""Rows in fp8 and in bf16, by themselves: against slow loops, and rows worked by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import slow_fp8
import torch
from torch import Tensor

from megatron_scmoe.codec import rounding
from megatron_scmoe.codec.rounding import Bf16, Fp8
from megatron_scmoe.dispatch.payload import bytes_of_row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf


def arrived(rows: Tensor) -> Tensor:
    """``rows`` at the other end."""
    return Fp8().decode(Fp8().encode(rows), rows.dtype)


def random_rows(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Each of a size of its own, some values far below the others of their row."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    sizes = torch.randn(rows, 1, generator=generator).mul(2).exp()
    values = torch.randn(rows, width, generator=generator) * torch.randn(rows, width, generator=generator).exp()
    return (values * sizes).to(dtype)


# ---- against loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 128), (3, 300), (4, 1), (2, 129), (1, 256), (0, 128), (0, 7)])
def test_it_equals_slow_loops(rows, width, dtype):
    """Bit for bit: nothing but the cast rounds, and that once."""
    values = random_rows(rows, width, dtype)
    assert torch.equal(arrived(values), slow_fp8.rounded(values))


def test_codes_are_read_as_torch_reads_them():
    codes = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    expected = codes.view(torch.float8_e4m3fn).float()
    found = Fp8().decode((codes, torch.full_like(codes, 127)), torch.float32)
    is_number = ~expected.isnan()
    assert is_number.sum() == 254 and torch.equal(found[is_number], expected[is_number])


@pytest.mark.parametrize("mutant", ["a neighbour's scale", "a scale for the whole row"])
def test_another_scale_is_noticed(mutant, monkeypatch):
    """Negative control."""
    values = random_rows(5, 256, torch.float32)
    values[:, 128:] *= 1000
    if mutant == "a neighbour's scale":
        codes, exponents = Fp8().encode(values)
        found = Fp8().decode((codes, exponents.roll(1, dims=1)), values.dtype)
    else:
        monkeypatch.setattr(rounding, "BLOCK", 256)
        found = arrived(values)
    assert not torch.equal(found, slow_fp8.rounded(values))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_gives_the_same_bits(backend):
    values = random_rows(7, 300, torch.float32)
    encoded = Fp8().encode(values)
    compiled = torch.compile(rounding._encode, backend=backend)(values)
    assert all(torch.equal(one, other) for one, other in zip(compiled, encoded, strict=True))
    decode = torch.compile(rounding._decode, backend=backend)
    assert torch.equal(decode(*encoded, torch.bfloat16), Fp8().decode(encoded, torch.bfloat16))


def test_one_kernel_serves_all_numbers_of_rows(monkeypatch):
    """Ranks whose rows change in number must not compile while others wait; by a compiler that counts."""
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    rounding._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    encode, decode = rounding._compiled(rounding._encode), rounding._compiled(rounding._decode)
    for number in (7, 9, 300, 2, 64, 65, 128, 1000, 3):
        values = random_rows(number, 256, torch.float32)
        found = encode(values)
        assert all(torch.equal(one, other) for one, other in zip(found, Fp8().encode(values), strict=True))
        assert torch.equal(decode(*found, torch.float32), arrived(values))
    assert len(graphs) == 2  # one for each half
    rounding._compiled.cache_clear()


def test_no_row_and_one_are_not_compiled(monkeypatch):
    """For each torch would make a kernel of its own."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(rounding, "_compiled", lambda function: pytest.fail(function.__name__))
    for number in (0, 1):
        values = random_rows(number, 128, torch.float32)
        codes, _ = Fp8().encode(values.as_subclass(OnGpu))
        assert torch.equal(codes.as_subclass(Tensor), Fp8().encode(values)[0])


# ---- by hand ----------------------------------------------------------------------------------------------------

BY_HAND = {
    # name -> dtype, what is sent, what arrives
    "zeros": (torch.float32, [0.0, 0.0], [0.0, 0.0]),
    "a negative zero": (torch.float32, [-0.0, 1.0], [-0.0, 1.0]),
    "one value": (torch.float32, [3.14159], [3.25]),  # between 3.0 and 3.25, nearer to the latter
    "448 x scale": (torch.float32, [448.0, -448.0, 1.0], [448.0, -448.0, 1.0]),
    "448 x a small scale": (torch.float32, [448 * 2.0**-30, 2.0**-39], [448 * 2.0**-30, 2.0**-39]),
    "above 448 x scale": (torch.float32, [449.0, 2.0**-9, 2.0**-8], [448.0, 0.0, 2.0**-8]),  # the scale is 2
    "halves go to even": (torch.float32, [448.0, 17.0, 19.0], [448.0, 16.0, 20.0]),
    "subnormal codes": (torch.float32, [448.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10], [448.0, 2.0**-9, 0.0, 2.0**-8]),
    "subnormal numbers": (torch.float32, [2.0**-130, 2.0**-149], [0.0, 0.0]),
    "the smallest": (torch.float32, [2.0**-126, -(2.0**-126)], [2.0**-126, -(2.0**-126)]),
    "subnormal fp16": (torch.float16, [2.0**-24, 2.0**-20], [2.0**-24, 2.0**-20]),
    "subnormal bf16": (torch.bfloat16, [2.0**-127, 2.0**-126], [0.0, 2.0**-126]),
    "large fp16": (torch.float16, [57344.0, 1.0], [57344.0, 1.0]),
    "too large for fp16": (torch.float16, [65504.0, -63488.0, 61440.0], [INF, -INF, 61440.0]),
    "large fp32": (torch.float32, [1.75 * 2.0**127, -1.0], [1.75 * 2.0**127, -0.0]),
    "too large for fp32": (torch.float32, [1.875 * 2.0**127, 1.0], [NAN, NAN]),
    "infinity": (torch.float32, [INF, 1.0], [NAN, NAN]),
    "minus infinity": (torch.bfloat16, [1.0, -INF], [NAN, NAN]),
    "infinity of fp16": (torch.float16, [INF, 0.0], [NAN, NAN]),
    "NaN": (torch.float32, [0.0, NAN], [NAN, NAN]),
    "NaN of fp16": (torch.float16, [NAN, 1.0], [NAN, NAN]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_rows_by_hand(name):
    dtype, sent, expected = BY_HAND[name]
    found = arrived(torch.tensor([sent], dtype=dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found, torch.tensor([expected], dtype=dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), torch.tensor([expected]).signbit()) or any(map(math.isnan, expected))


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, -1, 0x7FC00000])
def test_any_nan_arrives_as_nan(pattern):
    """Whatever bits it has: they are added to where scales are found."""
    row = torch.tensor([[pattern, 0]], dtype=torch.int32).view(torch.float32)
    assert row.isnan().any() and arrived(row).isnan().all()


def test_a_bad_block_harms_no_other():
    rows = torch.ones(2, 300)
    rows[0, 130] = NAN
    found = arrived(rows)
    assert found[0, 128:256].isnan().all()
    found[0, 128:256] = 1
    assert torch.equal(found, torch.ones(2, 300))


def test_a_block_has_128_values_and_the_last_one_may_be_shorter():
    rows = torch.full((1, 300), 2.0**-12)  # far below the smallest code beside 448
    rows[0, [127, 256]] = 448.0
    found = arrived(rows)
    assert not found[0, :127].any() and not found[0, 257:].any()
    assert torch.equal(found[0, 128:256], rows[0, 128:256])


def test_what_was_rounded_is_not_rounded_again():
    values = random_rows(6, 200, torch.float32)
    once = arrived(values)
    assert not torch.equal(once, values) and torch.equal(arrived(once), once)


def test_errors_are_what_is_said_of_them():
    values = random_rows(50, 128, torch.float32)
    error, scale = (arrived(values) - values).abs(), values.abs().amax(dim=1, keepdim=True) / 448
    assert (error <= torch.maximum(values.abs() / 16, 2 * scale * 2.0**-10)).all()  # scales are powers of two
    assert (error > values.abs() / 20).any()


def test_bf16_rounds_as_torch_does():
    values = torch.cat([random_rows(3, 50, torch.float32), torch.tensor([[NAN, INF, -INF, 1e-45, 0.0] * 10])])
    form = Bf16()
    (sent,) = form.encode(values)
    assert sent.dtype is torch.bfloat16
    found = form.decode((sent,), torch.float32)
    torch.testing.assert_close(found, values, rtol=2.0**-8, atol=1e-38, equal_nan=True)
    assert not torch.equal(found[:3], values[:3]) and torch.equal(found[3, 1:3], values[3, 1:3])


def test_what_cannot_be_compiled_is_said_once_and_runs_all_the_same(monkeypatch, capsys):
    """On a GPU; here a tensor that says it is there."""
    attempts = []

    def refuses(function, **_options):
        attempts.append(function)
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler\nand more")

    class OnGpu(torch.Tensor):
        is_cuda = True

    rounding._compiled.cache_clear()
    monkeypatch.setattr(rounding, "_not_compiled", set())
    monkeypatch.setattr(torch, "compile", refuses)
    monkeypatch.setenv("LOCAL_RANK", "1")  # whose neighbour says it
    values = random_rows(2, 128, torch.float32)
    Fp8().encode(values.as_subclass(OnGpu))
    assert attempts == [rounding._encode] and capsys.readouterr().out == ""
    attempts.clear()
    rounding._not_compiled.clear()
    rounding._compiled.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):
        codes, _ = Fp8().encode(values.as_subclass(OnGpu))
        assert torch.equal(codes.as_subclass(Tensor), Fp8().encode(values)[0])
    assert attempts == [rounding._encode]
    assert capsys.readouterr().out == (
        " > codec: torch cannot compile _encode of fp8, which takes longer so: no compiler\n"
    )
    rounding._compiled.cache_clear()


# ---- how many bytes ---------------------------------------------------------------------------------------------


def share(width: int, dtype: torch.dtype, rounded: int) -> float:
    """Of the bytes of four transfers of rows that travel by themselves, where so many of them are rounded."""
    rows = torch.ones(1, width, dtype=dtype)
    return (rounded * bytes_of_row(Fp8().encode(rows)) + (4 - rounded) * bytes_of_row([rows])) / (
        4 * bytes_of_row([rows])
    )


@pytest.mark.parametrize("width", [1024, 2048, 4096, 6144, 7168])
def test_two_transfers_save_a_quarter_and_four_a_half_of_bf16(width):
    assert 0.75 < share(width, torch.bfloat16, 2) <= 0.77
    assert 0.5 < share(width, torch.bfloat16, 4) <= 0.53
    assert 0.625 < share(width, torch.float32, 2) <= 0.64
    assert 0.25 < share(width, torch.float32, 4) <= 0.27


def test_odd_widths_send_no_more_than_they_fill_up():
    assert bytes_of_row(Fp8().encode(torch.ones(1, 130))) == 144 + 16
