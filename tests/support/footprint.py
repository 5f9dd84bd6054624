"""What a rank of a real training holds: counted on its own tensors, with nothing of the package's dry run."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import training
from torch import Tensor


class Footprint(NamedTuple):
    """Numbers of parameters, and bytes. ``activations`` are those saved for backward at once, at their most."""

    dense: int
    expert: int
    weights: int
    gradients: int
    optimizer: int
    activations: int


class _Held:
    """A tensor that autograd saved, as long as it does."""

    def __init__(self, tensor: Tensor, alive: _Alive) -> None:
        self.tensor, self._alive = tensor, alive
        alive.add(tensor, 1)

    def __del__(self) -> None:
        self._alive.add(self.tensor, -1)


class _Alive:
    """Bytes of the storages that are held, each once, and their most so far."""

    def __init__(self, standing: Iterable[Tensor]) -> None:
        self._standing = {_identity(tensor) for tensor in standing}
        self._holders: Counter[int] = Counter()
        self._now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        return tensor if _identity(tensor) in self._standing else _Held(tensor, self)

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def add(self, tensor: Tensor, holders: int) -> None:
        key = _identity(tensor)
        before = self._holders[key] > 0
        self._holders[key] += holders
        self._now += tensor.untyped_storage().nbytes() * ((self._holders[key] > 0) - before)
        self.most = max(self.most, self._now)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({_identity(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def measure(flags: list[str], environment: dict[str, str]) -> Footprint:
    """Train with ``flags`` on this rank, which is one of several; their numbers in ``environment`` are not taken."""
    os.environ.update({name: value for name, value in environment.items() if not name.endswith("RANK")})
    from megatron.training import training as megatrons

    found: list[Any] = []
    activations: list[_Alive] = []
    setup, train_step = megatrons.setup_model_and_optimizer, megatrons.train_step

    def setup_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        found.extend(result[:2])
        return result

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        standing = [one for chunk in found[0] for one in (*chunk.module.parameters(), *chunk.module.buffers())]
        activations.append(_Alive(standing))
        with torch.autograd.graph.saved_tensors_hooks(activations[-1].pack, activations[-1].unpack):
            return train_step(*args, **kwargs)

    megatrons.setup_model_and_optimizer, megatrons.train_step = setup_and_keep, watched_step
    printed = training.train(flags)
    assert activations, printed
    model, optimizer = found
    return _footprint(model, optimizer, max(one.most for one in activations))


def _footprint(model: list[Any], optimizer: Any, activations: int) -> Footprint:
    parameters = [one for chunk in model for one in chunk.parameters()]
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [one.data for one in parameters]
    kept = [
        tensor
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in one.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter.data, *one.optimizer.state[parameter].values())
        if isinstance(tensor, Tensor) and _identity(tensor) not in {_identity(weight) for weight in weights}
    ]
    return Footprint(
        dense=sum(one.numel() for one in parameters if getattr(one, "allreduce", True)),
        expert=sum(one.numel() for one in parameters if not getattr(one, "allreduce", True)),
        weights=_nbytes(weights),
        gradients=_nbytes(buffer.grad_data for buffer in buffers),
        optimizer=_nbytes(kept),
        activations=activations,
    )


def estimated(flags: list[str], environment: dict[str, str]) -> Any:
    """The stages that a dry run finds with ``flags``."""
    from megatron_scmoe.dry_run import run

    os.environ.update(environment)
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    return run.estimate()[1]
