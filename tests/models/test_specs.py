"""Block specs: who replaces Core's layer where, and what is unfused for Transformer Engine, as a CPU can tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import commands
import pytest
from training import ROOT

FUSED = ("IdentityOp", "TELayerNormColumnParallelLinear")
UNFUSED = ("Norm", "TEColumnParallelLinear")
KEYS = {
    "attention": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    "MLP": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
}
# Case -> where the tap lies: the block of the group, and whether it is its attention or its MLP.
TAPS = {
    "pos1 1": (0, "attention"),
    "pos1 2": (1, "attention"),
    "pos2 2": (0, "MLP"),
    "pos3 2": (0, "attention"),
    "pos2 4": (2, "MLP"),
}


def described(implementation: str) -> dict[str, dict[str, list[dict]]]:
    """In a process of its own, since Transformer Engine has to be there, or not, when Megatron is imported."""
    script = ROOT / "tests/support/describe_specs.py"
    if implementation == "local":
        result = commands.run(script, implementation)
    else:
        path = os.pathsep.join([str(script.parent), str(ROOT)])
        result = subprocess.run(
            [sys.executable, script, implementation],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def transformer_engine():
    return described("transformer_engine")


@pytest.fixture(scope="module")
def local():
    return described("local")


@pytest.mark.parametrize("case", TAPS)
def test_transformer_engine_is_unfused_at_the_tap_alone(transformer_engine, case):
    tapped_block, tapped_op = TAPS[case]
    ours, stock = transformer_engine[case]["ours"], transformer_engine[case]["stock"]
    for index, (block, stock_block) in enumerate(zip(ours, stock, strict=True)):
        halves = {
            "attention": (block["input_layernorm"], block["linear_qkv"]),
            "MLP": (block["pre_mlp_layernorm"], block["linear_fc1"]),
        }
        stock_halves = {
            "attention": (stock_block["input_layernorm"], stock_block["linear_qkv"]),
            "MLP": (stock_block["pre_mlp_layernorm"], stock_block["linear_fc1"]),
        }
        for op, half in halves.items():
            tapped = (index, op) == (tapped_block, tapped_op)
            assert half == (UNFUSED if tapped else stock_halves[op])
            if tapped:
                assert stock_halves[op] == FUSED
                # The unfused norm keeps the key that the fused module gives it.
                assert block["keys"] == {**stock_block["keys"], KEYS[op][0]: KEYS[op][1]}
        if index != tapped_block:
            assert block["keys"] == stock_block["keys"]


@pytest.mark.parametrize("case", TAPS)
def test_local_spec_changes_layer_and_core_attention_alone(local, case):
    for block, stock_block in zip(local[case]["ours"], local[case]["stock"], strict=True):
        changed = {"layer": "", "core_attention": ""}
        assert block | changed == stock_block | changed
        assert (block["core_attention"], stock_block["core_attention"]) == ("LocalCoreAttention", "DotProductAttention")


@pytest.mark.parametrize("case", TAPS)
def test_transformer_engine_attends_itself(transformer_engine, case):
    """What runs in the local spec differs from its path in the core attention alone, and that is Core's."""
    for kind in ("ours", "stock"):
        assert {block["core_attention"] for block in transformer_engine[case][kind]} == {"TEDotProductAttention"}


@pytest.mark.parametrize("case", TAPS)
def test_the_last_block_runs_the_group(local, transformer_engine, case):
    moe_every = int(case.split()[1])
    for specs in (local, transformer_engine):
        assert [block["layer"] for block in specs[case]["ours"]] == ["LeadingBlock"] * (moe_every - 1) + ["GroupBlock"]
        assert {block["layer"] for block in specs[case]["stock"]} == {"TransformerLayer"}


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_prediction_layers_are_stock_layers(request, implementation):
    """The last block's, but for the core attention of the local spec; with LongCat-Flash's router a dense one."""
    found = request.getfixturevalue(implementation)["pos2 2"]
    attends = {"core_attention": "LocalCoreAttention"} if implementation == "local" else {}
    dense, moe = ({**block, **attends} for block in found["stock"])
    assert found["predictions"] == {"core": moe, "longcat": dense} and dense != moe
