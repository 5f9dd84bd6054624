"""The entry script inside the rank pool: same code as under torchrun, without its start-up time."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]

PLAIN = """--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
 --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --distributed-backend gloo"""
MODEL = """--num-layers 4 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 48 --swiglu --normalization RMSNorm
 --position-embedding-type rope --seq-length 16 --max-position-embeddings 16 --disable-bias-linear --num-experts 4
 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 24
 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01"""
TRAINING = """--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant --train-iters 10
--eval-iters 1
 --eval-interval 1000 --log-interval 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 63
 --num-workers 0 --no-create-attention-mask-in-dataloader"""
STOCK = f"{PLAIN} {MODEL} {TRAINING}".split()
SCMOE = [*STOCK, "--shortcut", "scmoe"]
STOCK_SHARED_EXPERT = [*STOCK, "--moe-layer-freq", "[0,1]*2", "--moe-shared-expert-gate"]


def with_flags(flags: list[str], *changes: str) -> list[str]:
    """``flags`` with later ones replacing earlier ones of the same name; a name alone adds a switch."""
    result = list(flags)
    for change in changes:
        name, *values = change.split()
        if name in result:
            start = result.index(name)
            end = start + 1
            while end < len(result) and not result[end].startswith("--"):
                end += 1
            del result[start:end]
        result += [name, *values]
    return result


def without_flag(flags: list[str], name: str) -> list[str]:
    """``flags`` without ``name`` and its values."""
    start = flags.index(name)
    end = start + 1
    while end < len(flags) and not flags[end].startswith("--"):
        end += 1
    return [*flags[:start], *flags[end:]]


def entry_script() -> ModuleType:
    """It as a module, with mock data of 1000 documents: to shuffle Megatron's 100000 takes as long as a few steps."""
    from megatron.core.datasets.gpt_dataset import MockGPTLowLevelDataset

    MockGPTLowLevelDataset.size = 1000
    spec = importlib.util.spec_from_file_location("pretrain_gpt_scmoe", ROOT / "pretrain_gpt_scmoe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(flags: list[str]) -> str:
    """Run the entry script on this rank and return what it printed; SystemExit's code is appended, if any."""
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            entry_script().main()
        except SystemExit as error:
            return f"{printed.getvalue()}\nexit code {error.code}"
    from megatron.training import get_tensorboard_writer

    if (writer := get_tensorboard_writer()) is not None:
        writer.close()  # it writes from a thread, which ends with this rank
    return printed.getvalue()


def scalars(directory: Path, *names: str) -> dict[str, dict[int, float]]:
    """TensorBoard scalars by name and iteration; float32 as written, so equality is equality of bits."""
    events = _events(directory)
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def scalar_names(directory: Path) -> set[str]:
    """Of all TensorBoard scalars that there are."""
    return set(_events(directory).Tags()["scalars"])


def _events(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()


def checkpoint_tensors(directory: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint by its sharded key, as saved: parameters and optimizer moments.

    Without an iteration: of a release, which tools/convert_checkpoint.py writes.
    """
    from megatron.core import dist_checkpointing

    name = "release" if iteration is None else f"iter_{iteration:07d}"
    plain = dist_checkpointing.load_plain_tensors(str(directory / name))
    return {key: value for key, value in plain.items() if isinstance(value, torch.Tensor)}
