"""Multi-latent attention in the local spec: the core attention against its formula, and a group that trains with it."""

from __future__ import annotations

import dataclasses
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


def train_within(flags: list[str]) -> tuple[str, int]:
    """Train with dispatches launched within attention; what was printed, and the number of such launches."""
    from megatron_scmoe.config import ScMoEConfig
    from megatron_scmoe.contracts import Launch
    from megatron_scmoe.dispatch.flights import Flights

    plan, launch, launched = ScMoEConfig.plan, Flights.launch, []
    ScMoEConfig.plan = lambda scmoe, *args: dataclasses.replace(plan(scmoe, *args), launch=Launch.WITHIN)
    Flights.launch = lambda flights: (launched.append(flights), launch(flights))[1]
    return training.train(flags), len(launched)


WITHIN = {
    "latent, core attention recomputed": [
        *LATENT,
        "--recompute-granularity selective",
        "--recompute-modules core_attn",
    ],
    "hybrid": ["--hybrid-layer-pattern *-*E*-*E"],
}


@pytest.mark.parametrize("case", WITHIN)
def test_a_launch_within_attention_changes_no_digit(tmp_path, case):
    """In Core's other attention and its other container, too: one launch for each forward of a group."""
    flags = with_flags(SCMOE, "--shortcut-position pos1", "--expert-model-parallel-size 2", "--train-iters 3")
    if case == "hybrid":
        flags = training.without_flag(flags, "--num-layers")
    flags = with_flags(flags, *WITHIN[case])
    scalars = []
    for name, train in (("before", training.train), ("within", train_within)):
        found = ranks.run(train, 2, with_flags(flags, f"--tensorboard-dir {tmp_path / name}"))
        assert "exit code" not in str(found[0]), str(found[0])[-3000:]
        scalars.append(training.scalars(tmp_path / name, "lm loss", "grad-norm"))
    assert scalars[0] == scalars[1] and len(scalars[0]["lm loss"]) == 3
    assert all(launches % 2 == 0 and launches >= 2 * 3 * 2 for _, launches in found)
