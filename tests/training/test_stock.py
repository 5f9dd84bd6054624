"""`--shortcut none` is Megatron without this plugin: every loss, gradient norm, weight and moment, bit for bit."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest
import ranks
import torch
import training
from cases import cases
from training import STOCK, with_flags, without_flag

MOE_PATTERN = "--moe-layer-freq [0,1]*2"
BASELINES = {
    "top-1": ["--moe-router-topk 1"],
    "top-2": ["--moe-router-topk 2"],
    "top-3": ["--moe-router-topk 3"],
    "shared expert": ["--moe-router-topk 1", "--moe-shared-expert-intermediate-size 24"],
    "shared expert, gated": [
        "--moe-router-topk 1",
        "--moe-shared-expert-intermediate-size 24",
        "--moe-shared-expert-gate",
    ],
    "prediction layer": ["--moe-router-topk 2", "--mtp-num-layers 1"],
}


def train_without_plugin(flags: list[str]) -> None:
    """Megatron's own arguments, model and trainer; of ours only the batch, loss and dataset hooks, which it lacks."""
    from functools import partial

    from megatron.core.enums import ModelType
    from megatron.training import get_tensorboard_writer, pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    sys.argv[:] = ["stock.py", *flags]
    hooks = training.entry_script()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        args = parse_and_validate_args()
        hooks.train_valid_test_datasets_provider.is_distributed = True
        pretrain(
            pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
            hooks.train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            partial(hooks.forward_step, time_left=hooks.TimeLeft()),
        )
    if (writer := get_tensorboard_writer()) is not None:
        writer.close()
    assert not hasattr(args, "shortcut")


@pytest.mark.parametrize("baseline", cases(BASELINES, ["top-2", "shared expert, gated", "prediction layer"]))
def test_shortcut_none_is_stock_megatron(tmp_path, baseline):
    flags = without_flag(STOCK, "--moe-shared-expert-intermediate-size")
    flags = with_flags(flags, *BASELINES[baseline], MOE_PATTERN, "--train-iters 4", "--save-interval 4")
    flags = with_flags(flags, "--expert-model-parallel-size 2")
    for name in ("stock", "ours"):
        here = with_flags(flags, f"--save {tmp_path / name}", f"--tensorboard-dir {tmp_path / name}-log")
        if name == "stock":
            ranks.run(train_without_plugin, 2, here, timeout_s=100)
        else:
            printed = ranks.run(training.train, 2, [*here, "--shortcut", "none"], timeout_s=100)
            assert "exit code" not in printed[0], printed[0][-3000:]
    scalars = [training.scalars(tmp_path / f"{name}-log", "lm loss", "grad-norm") for name in ("stock", "ours")]
    assert scalars[0] == scalars[1] and sorted(scalars[0]["lm loss"]) == [1, 2, 3, 4]
    stock, ours = (ranks.run(training.checkpoint_tensors, 1, tmp_path / name, 4)[0] for name in ("stock", "ours"))
    assert stock.keys() == ours.keys() and any("exp_avg_sq" in key for key in stock)
    for key, tensor in stock.items():
        assert torch.equal(tensor, ours[key]), key
