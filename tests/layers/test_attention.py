"""Multi-latent attention in the local spec: the core attention against its formula, and a group that trains with it."""

from __future__ import annotations

import math

import pytest
import ranks
import torch
import training
from training import SCMOE, with_flags

SEQ_LENGTH, BATCH_SIZE, HEADS, K_CHANNELS, V_CHANNELS = 5, 2, 3, 8, 6
LATENT = [
    "--multi-latent-attention",
    "--q-lora-rank 16",
    "--kv-lora-rank 8",
    "--qk-head-dim 8",
    "--qk-pos-emb-head-dim 4",
    "--v-head-dim 6",
    "--rope-type rope",
    "--qk-layernorm",
]


def attend() -> tuple[torch.Tensor, torch.Tensor]:
    """Our core attention and the formula softmax(q k^T / sqrt(d)) v, causal, on the same random heads."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_scmoe.layers.core_attention import LocalCoreAttention

    config = TransformerConfig(
        num_layers=1, hidden_size=12, num_attention_heads=HEADS, attention_dropout=0.0, masked_softmax_fusion=False
    )
    scale = 1 / math.sqrt(K_CHANNELS)
    attention = LocalCoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=scale, k_channels=K_CHANNELS, v_channels=V_CHANNELS
    )
    query = torch.randn(SEQ_LENGTH, BATCH_SIZE, HEADS, K_CHANNELS)
    # Keys and values as multi-latent attention has them: two parts of one tensor.
    key, value = torch.randn(SEQ_LENGTH, BATCH_SIZE, HEADS, K_CHANNELS + V_CHANNELS).split([K_CHANNELS, V_CHANNELS], -1)
    ours = attention(query, key, value, None)
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * scale
    future = torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return ours, torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def test_core_attention_equals_its_formula():
    ((ours, formula),) = ranks.run(attend, 1, layout={})
    assert ours.shape == (SEQ_LENGTH, BATCH_SIZE, HEADS * V_CHANNELS)
    torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shortcut", ["scmoe", "dgmoe"])
def test_a_group_trains_with_multi_latent_attention(tmp_path, shortcut):
    """The loss falls, and overlap on equals overlap off bit for bit."""
    flags = with_flags(SCMOE, *LATENT, "--expert-model-parallel-size 2", "--train-iters 8")
    if shortcut == "dgmoe":
        flags = with_flags(training.without_flag(flags, "--moe-shared-expert-intermediate-size"), "--moe-router-topk 2")
        flags = with_flags(flags, "--shortcut dgmoe")
    names = ("lm loss", "grad-norm")
    runs = {}
    for overlap in ("fixed", "off"):
        log = tmp_path / overlap
        printed = ranks.run(training.train, 2, with_flags(flags, f"--overlap {overlap}", f"--tensorboard-dir {log}"))
        assert "exit code" not in printed[0], printed[0][-3000:]
        runs[overlap] = training.scalars(log, *names)
    assert runs["fixed"] == runs["off"]
    losses = runs["fixed"]["lm loss"]
    assert losses[8] < losses[1] - 0.1
