"""The dry run of a command line: every rule of the entry script, then the model without data, then a table.

It needs no GPU, no data and no other rank: torch's meta device holds the model, a fake process group stands for the
world, and Megatron's local spec for Transformer Engine. WORLD_SIZE says for how many GPUs.
"""

from __future__ import annotations

import contextlib
import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch

from megatron_scmoe.config import Codec, ConfigError, ScMoEConfig, Unique
from megatron_scmoe.dry_run import local_spec, memory, report, unique
from megatron_scmoe.dry_run.meta import replaced
from megatron_scmoe.dry_run.stages import Stage, find_stages
from megatron_scmoe.mcore.silence import silence
from megatron_scmoe.models.container import model_config_from_args
from megatron_scmoe.training.arguments import parse_and_validate_args, refuse


def run() -> None:
    """Print what the command line of this process would need, or refuse it as a training would."""
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun one of them says it for all
    try:
        args, stages, gone = estimate()
    except ConfigError as error:
        refuse(str(error))
    print(report.text(args, stages, local_spec.flags_of(gone)))


def estimate() -> tuple[Namespace, list[Stage], dict[str, Any]]:
    """Megatron's namespace of this process's command line, its pipeline stages, and what of the former was left out.

    Raises:
        ConfigError: for a world of no GPU, and for what a training would refuse once its model is there. What it would
            refuse before ends this process (``training.arguments.refuse``).
    """
    _check_world_size()
    gone: dict[str, Any] = {}
    with silence(), replaced(torch.cuda, "get_device_capability", local_spec.imagined_capability):
        args, scmoe, _ = parse_and_validate_args(lambda args: gone.update(local_spec.go_without(args)))
        memory.check_known(args)
        _check_known(args, scmoe)
        # Rows that are rounded live between the halves of an exchange: nothing of them is kept for backward.
        config = model_config_from_args(args, replace(scmoe, a2a_codec=Codec.NONE) if scmoe.rounds else scmoe)
        if "transformer_impl" in gone and not local_spec.keeps_scores(args):
            local_spec.with_flash_attention(config)
        even = (
            unique.chosen_evenly(args.moe_router_topk, args.num_experts + scmoe.zero_experts)
            if scmoe.sends_once
            else contextlib.nullcontext()
        )
        with even:
            return args, find_stages(args, config), gone


def _check_world_size() -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"a model is on a GPU at least: WORLD_SIZE is {size} in a dry run; give a number from 1")


def _check_known(args: Namespace, scmoe: ScMoEConfig) -> None:
    if args.spec is not None:
        raise ConfigError(f"a dry run builds Megatron's own blocks: --spec is {' '.join(args.spec)}; drop it")
    if scmoe.sends_centroids:
        raise ConfigError(
            f"how many centroids travel is up to the data: --a2a-codec is {scmoe.a2a_codec} in a dry run; use "
            "--a2a-codec none for it, which needs more memory"
        )
    if scmoe.a2a_unique is Unique.NODE:
        raise ConfigError(
            "to how many nodes a token goes is up to the data, and where these lie to the job: --a2a-unique is node in "
            "a dry run; use --a2a-unique rank for it"
        )
