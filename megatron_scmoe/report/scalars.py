"""What TensorBoard and W&B get: figures of all pipeline stages, written by the one rank that has Megatron's writers."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping

import torch.distributed as dist
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.mcore import stages


class Scalars:
    """Figures of steps, on their way to Megatron's writers, which the last rank has: it is one of the last stage.

    Other stages leave it what they have and go on. It finds their figures of a step when its next one begins, for which
    it had to wait for each of them.

    Args:
        args: Megatron's namespace; the process group is there.
        scmoe: the settings.
    """

    def __init__(self, args: Namespace, scmoe: ScMoEConfig) -> None:
        # By what all ranks are sure to agree on: only the last one reads where Megatron writes to.
        several = args.pipeline_model_parallel_size > 1 and scmoe.sends_centroids
        self._mail = stages.StageMail("megatron_scmoe/scalars") if several else None

    def add(self, iteration: int, of_stage: Mapping[str, float], of_groups: Mapping[str, float]) -> None:
        """Every rank calls it, with the same figures on all ranks of a stage.

        Args:
            iteration: that ended.
            of_stage: by name; those of the last stage are written.
            of_groups: by name, which no other stage uses; those of every stage are written. Without centroids none.
        """
        _write(iteration, {**of_stage, **of_groups})
        # The last rank of a stage is in one pipeline with the last one of all, which cannot be ahead of it.
        if self._mail is not None and of_groups and stages.is_last_of_stage() and not _has_writers():
            self._mail.send(json.dumps({"iteration": iteration, "scalars": of_groups}))
        self._write_received()

    def close(self) -> None:
        """Write what is still on its way; every rank calls it when nobody adds any more."""
        if self._mail is not None:
            dist.barrier()  # all have sent
            self._write_received()
            dist.barrier()  # all is read: where no launcher holds the store, it goes with rank 0
        if (tensorboard := get_tensorboard_writer()) is not None:
            tensorboard.flush()  # it writes from a thread, which ends with this process

    def _write_received(self) -> None:
        if self._mail is not None and _has_writers():
            for text in self._mail.receive():
                _write(**json.loads(text))


def _has_writers() -> bool:
    """Whether this is the rank to which Megatron gives them."""
    return dist.get_rank() == dist.get_world_size() - 1


def _write(iteration: int, scalars: Mapping[str, float]) -> None:
    """To TensorBoard and W&B, where they are; not to a run of W&B that Megatron has ended, before the last report."""
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    for name, value in scalars.items():
        if tensorboard is not None:
            tensorboard.add_scalar(name, value, iteration)
        if wandb is not None and wandb.run is not None:
            wandb.log({name: value}, iteration)
