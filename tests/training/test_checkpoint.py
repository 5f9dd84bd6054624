"""Resume is exact, and checkpoints are those of the stock model: same keys, loads both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
import training
from cases import cases
from training import SCMOE, STOCK_SHARED_EXPERT, with_flags

EP2 = "--expert-model-parallel-size 2"
FULLY_RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
PARTS = ("experts", "router", "shared_experts")
OPTIMIZERS = {
    "fp32": [],
    "fp32 distributed reshardable": ["--use-distributed-optimizer", FULLY_RESHARDABLE],
    "bf16 distributed": ["--bf16", "--use-distributed-optimizer"],
    "bf16 distributed reshardable": ["--bf16", "--use-distributed-optimizer", FULLY_RESHARDABLE],
}


def train(flags, *, world_size=2):
    outputs = ranks.run(training.train, world_size, flags, timeout_s=240)
    assert "exit code" not in outputs[0], outputs[0][-3000:]
    return outputs


@pytest.mark.parametrize("optimizer", cases(OPTIMIZERS, ["fp32", "bf16 distributed reshardable"]))
def test_resume_is_exact(tmp_path, optimizer):
    """Iterations 6 to 10 after a resume at 5 equal those of a run that was not interrupted, bit for bit."""
    flags = with_flags(SCMOE, EP2, *OPTIMIZERS[optimizer], f"--save {tmp_path}/save", "--save-interval 5")
    train(with_flags(flags, f"--tensorboard-dir {tmp_path}/through"))
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("5")
    train(with_flags(flags, f"--load {tmp_path}/save", f"--tensorboard-dir {tmp_path}/resumed"))
    names = ("lm loss", "grad-norm")
    through = training.scalars(tmp_path / "through", *names)
    resumed = training.scalars(tmp_path / "resumed", *names)
    for name in names:
        assert sorted(resumed[name]) == [6, 7, 8, 9, 10]
        assert [resumed[name][i] for i in range(6, 11)] == [through[name][i] for i in range(6, 11)]
    assert through["lm loss"][10] != through["lm loss"][9]


def convert(flags, source, target):
    """Load ``source`` with ``flags`` and save at once to ``target``/torch_dist, by Megatron's own means."""
    converting = with_flags(
        flags, f"--load {source}", "--ckpt-convert-format torch_dist", f"--ckpt-convert-save {target}"
    )
    return ranks.run(training.train, 2, converting, timeout_s=240)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_stock_checkpoint_loads_as_scmoe_and_back(tmp_path):
    """Every weight and both moments of every parameter survive the way there and back, under the same keys."""
    shared = [EP2, "--use-distributed-optimizer", FULLY_RESHARDABLE, "--train-iters 3"]
    stock = with_flags(STOCK_SHARED_EXPERT, *shared, "--shortcut-resume changed")
    scmoe = with_flags(SCMOE, *shared, "--shortcut-resume changed")
    assert_all_travels_to_scmoe_and_back(stock, scmoe, tmp_path)


def assert_all_travels_to_scmoe_and_back(stock: list[str], scmoe: list[str], place: Path) -> None:
    """Weights and moments of three steps of ``stock``, in one container."""
    train(with_flags(stock, f"--save {place}/stock", "--save-interval 3"))
    outputs = convert(scmoe, place / "stock", place / "scmoe")
    assert "shortcut: the checkpoint in" in outputs[0] and "has --shortcut none, now scmoe" in outputs[0]
    convert(stock, place / "scmoe" / "torch_dist", place / "back")

    original, converted, back = (
        ranks.run(training.checkpoint_tensors, 1, place / folder, 3)[0]
        for folder in ("stock", "scmoe/torch_dist", "back/torch_dist")
    )
    moments = [key for key in original if "exp_avg" in key]
    weights = [key for key in original if not key.startswith("optimizer.")]
    assert len(moments) == 2 * len(weights) > 0
    assert all(original[key].abs().sum() > 0 for key in moments)
    assert_same_tensors(original, converted)
    assert_same_tensors(original, back)


def test_scmoe_trains_on_from_a_stock_checkpoint_as_another_function(tmp_path):
    """The weights are the same and the wiring is not: the very next loss differs, so the comparison above means
    something, and the step after it is finite."""
    stock = with_flags(STOCK_SHARED_EXPERT, EP2, "--train-iters 3")
    train(with_flags(stock, f"--save {tmp_path}/stock", "--save-interval 3"))
    common = ["--train-iters 5", "--override-opt-param-scheduler", f"--load {tmp_path}/stock"]
    train(with_flags(stock, *common, f"--tensorboard-dir {tmp_path}/a"))
    scmoe = with_flags(SCMOE, EP2, "--shortcut-resume changed", *common, f"--tensorboard-dir {tmp_path}/b")
    train(scmoe)
    stock_loss, scmoe_loss = (training.scalars(tmp_path / d, "lm loss")["lm loss"] for d in "ab")
    assert sorted(stock_loss) == sorted(scmoe_loss) == [4, 5]
    assert abs(stock_loss[4] - scmoe_loss[4]) > 1e-4
    assert abs(scmoe_loss[5] - scmoe_loss[4]) < 1.0


WITHOUT_SHARED = training.without_flag(SCMOE, "--moe-shared-expert-intermediate-size")
DGMOE = with_flags(WITHOUT_SHARED, "--shortcut dgmoe", "--moe-router-topk 2")
LATE = ("--shortcut-span 2", "--shortcut-landing 1")
SHARING = {
    # name -> flags, and which blocks carry an MoE in the checkpoint
    "dgmoe, two": (with_flags(DGMOE, "--moe-share-groups 2"), {1: True, 3: False}),
    "scmoe, three": (with_flags(SCMOE, "--num-layers 6", "--moe-share-groups 3"), {1: True, 3: False, 5: False}),
    "scmoe, late": (with_flags(SCMOE, *LATE), {1: True, 3: True}),
    "dgmoe, late, two": (with_flags(DGMOE, *LATE, "--moe-share-groups 2"), {1: True, 3: False}),
}


@pytest.mark.parametrize("name", cases(SHARING, ["dgmoe, two", "scmoe, three", "scmoe, late"]))
def test_a_shared_moe_is_saved_once_and_groups_resume_exactly(tmp_path, name):
    """A borrowing group has no MoE in the checkpoint; resume is exact, moments included, of late landing too."""
    flags, carries = SHARING[name]
    optimizer = OPTIMIZERS["fp32 distributed reshardable"]
    flags = with_flags(flags, EP2, *optimizer, f"--save {tmp_path}/save", "--save-interval 3", "--train-iters 6")
    train(with_flags(flags, f"--tensorboard-dir {tmp_path}/through"))
    (tensors,) = ranks.run(training.checkpoint_tensors, 1, tmp_path / "save", 6)
    found = {block: any(f"layers.{block}.mlp.{part}" in key for key in tensors for part in PARTS) for block in carries}
    assert found == carries
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("3")
    train(with_flags(flags, f"--load {tmp_path}/save", f"--tensorboard-dir {tmp_path}/resumed"))
    through, resumed = (training.scalars(tmp_path / name, "lm loss", "grad-norm") for name in ("through", "resumed"))
    for name in through:
        assert [resumed[name][i] for i in (4, 5, 6)] == [through[name][i] for i in (4, 5, 6)]
