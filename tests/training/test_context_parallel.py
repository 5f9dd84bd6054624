"""Context parallelism in the local spec: from one checkpoint, losses and gradient norms are those of one rank."""

from __future__ import annotations

import pytest
import ranks
import torch
import training
from test_layouts import (
    BALANCE_LOSSES,
    EP2,
    ETP1,
    FULL,
    GATHER,
    MODELS,
    PP2,
    TP2,
    Start,
    assert_agree,
    case,
    changes,
    starts,
    train,
)
from training import with_flags

CP2 = "--context-parallel-size 2"
LAYOUTS = {
    # name -> ranks, flags
    "cp2": (2, CP2),
    "cp4": (4, "--context-parallel-size 4"),
    "cp2 ep2": (2, f"{CP2} {EP2}"),
    "cp2 dp2 ep4": (4, f"{CP2} --expert-model-parallel-size 4"),
    "tp2 cp2": (4, f"{TP2} {CP2} {ETP1}"),
    "expert tp2 cp2": (4, f"{TP2} {CP2} --expert-tensor-parallel-size 2"),
    "tp2 cp2 ep2": (8, f"{TP2} {CP2} {EP2} {ETP1}"),
    "pp2 cp2": (4, f"{PP2} {CP2}"),
    "cp2 ep2 overlapped gather": (4, f"{CP2} {EP2} {GATHER}"),
    "cp2 recompute full": (2, f"{CP2} {FULL} uniform --recompute-num-layers 1"),
    "cp2 recompute core_attn": (2, f"{CP2} --recompute-granularity selective --recompute-modules core_attn"),
}
SOME = ("cp2", "cp2 ep2", "tp2 cp2 ep2")
TRIED = {
    "scmoe": tuple(LAYOUTS),
    "dgmoe": ("cp2 ep2", "tp2 cp2", "tp2 cp2 ep2"),
    "stock": ("cp2", "cp2 ep2"),  # the stock model's local norms know no sequence parallelism, so no tensor parallelism
    "longcat": SOME,
    "farskip": SOME,
    **{f"scmoe {kind}": SOME for kind in ("aux_loss", "seq_aux_loss")},
}
QUICK = {("scmoe", "cp2 ep2"), ("stock", "cp2")}


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
    return starts(tmp_path_factory)


def continued(start: Start, layout: str, function=train) -> dict[str, dict[int, float]]:
    num_ranks, flags = LAYOUTS[layout]
    log = start.folder / f"{layout}-{function.__name__}".replace(" ", "-")
    flags = with_flags(MODELS[start.model], *changes(flags), f"--tensorboard-dir {log}", *start.more)
    results = ranks.run(function, num_ranks, flags, timeout_s=180)
    assert "exit code" not in results[0].printed, results[0].printed[-3000:]
    return training.scalars(log, *start.names)


@pytest.mark.parametrize(
    ("model", "layout"),
    [case(model, layout, quick=(model, layout) in QUICK) for model, layouts in TRIED.items() for layout in layouts],
)
def test_layout_agrees_with_one_rank(start_of, model, layout):
    """Three steps: with weights that the first two have changed. Balance losses agree too, where there are any."""
    start = start_of(model)
    assert set(start.names) >= {BALANCE_LOSSES[kind] for kind in model.split()[1:]}
    found = continued(start, layout)
    assert sorted(found["lm loss"]) == [2, 3, 4]
    assert_agree(found, start.expected)


def train_in_order_of_ranks(flags: list[str]):
    """``train`` with an attention that takes parts of sequences for consecutive ones."""
    from megatron_scmoe.layers import core_attention

    core_attention.zigzag = lambda length, rank, *_: torch.arange(length) + rank * length
    return train(flags)


def test_another_order_of_parts_is_noticed(start_of):
    """Negative control."""
    start = start_of("scmoe")
    found = continued(start, "cp2 ep2", train_in_order_of_ranks)
    assert found["grad-norm"][2] != pytest.approx(start.expected["grad-norm"][2], rel=1e-3)
