"""The local spec's core attention against its formula: parts of a sequence on ranks, documents, wider values."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
from torch import Tensor

SEQ_LENGTH, BATCH_SIZE, HEADS, WIDTH = 16, 2, 4, 6
BEGINS = (0, 3, 4, 11, 16)


def attention(groups: int = HEADS, context: int = 1, **sizes: int):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_scmoe.layers.core_attention import LocalCoreAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        context_parallel_size=context,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    built = LocalCoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=collection, **sizes)
    assert built.config.context_parallel_size == context
    return built


def heads(groups: int = HEADS, values: int = WIDTH, samples: int = BATCH_SIZE) -> list[Tensor]:
    """Random queries, keys and values of whole sequences, the same on all ranks."""
    torch.manual_seed(5)
    sizes = ((HEADS, WIDTH), (groups, WIDTH), (groups, values))
    return [torch.randn(SEQ_LENGTH, samples, *size).requires_grad_() for size in sizes]


def formula(query: Tensor, key: Tensor, value: Tensor, unread: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, where ``unread`` [s, s] is not read."""
    key, value = (part.repeat_interleave(query.shape[2] // part.shape[2], 2) for part in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / math.sqrt(WIDTH)
    weights = scores.masked_fill(unread, -math.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def future(length: int = SEQ_LENGTH) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def by_ranks(groups: int, given_mask: bool, wrong_order: bool = False) -> list[tuple[Tensor, Tensor]]:
    """This rank's outputs and gradients of a weighed sum of them, beside the formula's."""
    from megatron.core import parallel_state

    from megatron_scmoe.layers import core_attention

    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    own = core_attention.zigzag(SEQ_LENGTH // size, rank, size)
    if wrong_order:
        core_attention.zigzag = lambda length, rank, *_: torch.arange(length) + rank * length
    inputs = heads(groups)
    factors = torch.randn(SEQ_LENGTH, BATCH_SIZE, HEADS * WIDTH)
    expected = formula(*inputs, future())
    expected_gradients = torch.autograd.grad((expected * factors).sum(), inputs)
    parts = [part.detach()[own].requires_grad_() for part in inputs]
    mask = future()[own].expand(BATCH_SIZE, 1, -1, -1) if given_mask else None
    output = attention(groups, size)(*parts, mask)
    gradients = torch.autograd.grad((output * factors[own]).sum(), parts)
    pairs = zip((output, *gradients), (expected, *expected_gradients), strict=True)
    return [(found.detach(), one.detach()[own]) for found, one in pairs]


@pytest.mark.parametrize(
    ("size", "groups", "given_mask"),
    [(2, HEADS, False), (2, 2, True), pytest.param(4, 1, False, marks=pytest.mark.full)],
)
def test_parts_of_a_sequence_attend_to_the_whole(size, groups, given_mask):
    """Outputs, and gradients of queries, keys and values, with groups of queries and with a given mask."""
    for pairs in ranks.run(by_ranks, size, groups, given_mask, layout={"context_parallel_size": size}):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_another_order_of_parts_is_noticed():
    """Negative control."""
    for pairs in ranks.run(by_ranks, 2, HEADS, False, wrong_order=True, layout={"context_parallel_size": 2}):
        found, expected = pairs[0]
        assert (found - expected).abs().max() > 0.1


def documents(values: int, samples: int) -> tuple[Tensor, Tensor]:
    """Our core attention on packed documents, and the formula on each of them alone, [t, heads * values]."""
    from megatron.core.packed_seq_params import PackedSeqParams

    inputs = heads(2, values, samples)
    flat = [part.detach().transpose(0, 1).flatten(0, 1) for part in inputs]
    ends = [end + sample * SEQ_LENGTH for sample in range(samples) for end in BEGINS[1:]]
    begins = torch.tensor([0, *ends], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins, tokens_per_sample=SEQ_LENGTH)
    output = attention(2, k_channels=WIDTH, v_channels=values)(*flat, None, packed_seq_params=packed)
    alone = [
        formula(*(part[begin:end].unsqueeze(1) for part in flat), future(end - begin)).squeeze(1)
        for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)
    ]
    return output, torch.cat(alone)


@pytest.mark.parametrize(("values", "samples"), [(WIDTH, 1), (4, 3)])
def test_documents_attend_alone(values, samples):
    ((output, alone),) = ranks.run(documents, 1, values, samples, layout={})
    torch.testing.assert_close(output, alone, rtol=1e-5, atol=1e-6)


def whole() -> tuple[Tensor, Tensor, Tensor]:
    """On whole sequences: our core attention, Core's, and what documents would make of it."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    inputs = heads(samples=1)
    ours = attention()
    begins = torch.tensor(BEGINS)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins)
    cut = ours(*(part.squeeze(1) for part in inputs), None, packed_seq_params=packed)
    return ours(*inputs, None), DotProductAttention.forward(ours, *inputs, None), cut.unsqueeze(1)


def test_whole_sequences_are_cores_bit_for_bit():
    """And documents would not be (negative control)."""
    ((ours, cores, cut),) = ranks.run(whole, 1, layout={})
    assert torch.equal(ours, cores)
    assert torch.equal(cut[: BEGINS[1]], ours[: BEGINS[1]])
    assert (cut - ours).abs().max() > 0.1


def both() -> str:
    from megatron.core.packed_seq_params import PackedSeqParams

    with pytest.raises(ValueError, match="documents are not cut") as refused:
        attention(context=2)(*(part[:, 0] for part in heads()), None, packed_seq_params=PackedSeqParams())
    return str(refused.value)


def test_documents_on_several_ranks_are_refused():
    for line in ranks.run(both, 2, layout={"context_parallel_size": 2}):
        assert "2 context-parallel ranks" in line and "\n" not in line
