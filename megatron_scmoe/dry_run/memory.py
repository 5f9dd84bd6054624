"""How many bytes a rank's parameters need: weights, gradients, and what the optimizer keeps of them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megatron_scmoe.config import ConfigError

_MOMENTS = {"adam": 2, "sgd": 1}
"""Tensors of a parameter's size that an optimizer keeps beside it; SGD without momentum none."""


class Parameters(NamedTuple):
    """Numbers of parameters.

    Attributes:
        dense: of attention, MLPs, shared experts, routers and embeddings.
        expert: of routed experts.
    """

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.expert

    @classmethod
    def on_this_rank(cls, parameters: Iterable[torch.nn.Parameter]) -> Parameters:
        """Count those that one rank holds."""
        counts = {False: 0, True: 0}
        for parameter in parameters:
            counts[is_expert(parameter)] += parameter.numel()
        return cls(counts[False], counts[True])

    @classmethod
    def in_the_model(cls, parameters: Iterable[torch.nn.Parameter]) -> Parameters:
        """Count what the ranks that share ``parameters`` of a stage hold together, replicas once."""
        counts = {False: 0, True: 0}
        for parameter in parameters:
            expert = is_expert(parameter)
            ranks = parallel_state.get_expert_model_parallel_world_size() if expert else 1
            if getattr(parameter, "tensor_model_parallel", False):
                ranks *= (
                    parallel_state.get_expert_tensor_parallel_world_size()
                    if expert
                    else parallel_state.get_tensor_model_parallel_world_size()
                )
            counts[expert] += parameter.numel() * ranks
        return cls(counts[False], counts[True])

    def __add__(self, other: Parameters) -> Parameters:  # type: ignore[override]
        return Parameters(self.dense + other.dense, self.expert + other.expert)


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether it is a routed expert's, which Core reduces over another group."""
    return not getattr(parameter, "allreduce", True)


class Standing(NamedTuple):
    """Bytes that a rank needs from the first step to the last."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def check_known(args: Namespace) -> None:
    """Raise ConfigError where it is not known what a rank keeps of its parameters."""
    for flag in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, flag):
            name = "--" + flag.replace("_", "-")
            raise ConfigError(
                f"a dry run does not know what FSDP holds at once: {name} is set; drop it for the dry run"
            )
    if args.optimizer not in _MOMENTS:
        raise ConfigError(
            f"a dry run knows what Adam and SGD keep: --optimizer is {args.optimizer}; use --optimizer adam for it"
        )
    if args.optimizer_cpu_offload:
        raise ConfigError(
            "a dry run counts what GPUs hold: --optimizer-cpu-offload is set; drop it for the dry run, and subtract "
            "what it moves"
        )


def standing_bytes(args: Namespace, chunks: Sequence[Any]) -> Standing:
    """What this rank keeps of its model parts, which are wrapped for data parallelism, as Core's optimizers do."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    held = Parameters.on_this_rank(parameters)
    shards = (1, 1)
    if args.use_distributed_optimizer:
        shards = (
            parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True).size(),
            parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True).size(),
        )
    per_parameter = optimizer_bytes_per_parameter(args)
    return Standing(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=sum(
            buffer.grad_data.nbytes for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ),
        optimizer=sum(-(-count * per_parameter // ranks) for count, ranks in zip(held, shards, strict=True)),
    )


def optimizer_bytes_per_parameter(args: Namespace) -> int:
    """What the optimizer of ``args`` keeps of each parameter, all shards together."""
    moments = 0 if args.optimizer == "sgd" and not args.sgd_momentum else _MOMENTS[args.optimizer]
    if args.use_precision_aware_optimizer:
        # Beside bf16 weights it keeps only the 16 bits that they lack of fp32.
        main = 2 if args.bf16 and args.main_params_dtype is torch.float32 else args.main_params_dtype.itemsize
        return main + args.exp_avg_dtype.itemsize + args.exp_avg_sq_dtype.itemsize
    return 4 * (moments + (args.bf16 or args.fp16))
