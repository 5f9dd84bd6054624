"""Which moments of a checkpoint this run can load: by the optimizer's format, its layout, and who has experts apart."""

from __future__ import annotations

from argparse import Namespace

from megatron_scmoe.config import ConfigError, ScMoEConfig
from megatron_scmoe.config.rules import shown
from megatron_scmoe.mcore import version

_NUMBERS = {False: "one", True: "two"}
_LAYOUT_FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "world_size",
)


def are_loaded(args: Namespace, saved: Namespace) -> bool:
    """Whether this run loads the moments of a checkpoint, whose arguments are ``saved``."""
    return not (args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False))


def check(args: Namespace, saved: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    """Raise ConfigError where moments would not load, or load into the wrong parameters.

    Args:
        args: Megatron's validated namespace.
        saved: the checkpoint's own.
        scmoe: the settings of this run.
        trained: those of the checkpoint.
    """
    if args.use_distributed_optimizer and _is_position_wise(saved):
        _check_places(args, scmoe, trained)
        _check_layout(args, saved)
    _check_expert_optimizer(args, saved)


def _is_position_wise(saved: Namespace) -> bool:
    """How the checkpoint keeps moments; Core loads by that, whatever this run saves in."""
    if not getattr(saved, "use_distributed_optimizer", False):
        return False
    by_parameter = getattr(saved, "ckpt_fully_parallel_save", False)  # of before there was a flag for it
    return not getattr(saved, "dist_ckpt_optim_fully_reshardable", by_parameter)


def check_format(args: Namespace) -> None:
    """Raise ConfigError where moments would be lost in the format that this run saves and loads."""
    if not args.use_distributed_optimizer or args.dist_ckpt_optim_fully_reshardable:
        return
    if loses_position_wise(args) and (args.save or args.load):
        raise ConfigError(
            "fp32 moments are not restored from the position-wise format without Transformer Engine or Apex: "
            "--use-distributed-optimizer is set and --dist-ckpt-optim-fully-reshardable is off; "
            "add --dist-ckpt-optim-fully-reshardable"
        )


def loses_position_wise(args: Namespace) -> bool:
    """Whether a run would lose moments in the position-wise format."""
    return not (args.bf16 or args.fp16) and version.uses_torch_optimizers()


def _check_places(args: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    """Which norms Transformer Engine fuses with the products behind them, and with it the order of the parameters,
    follows from what the experts read.
    """
    if args.transformer_impl != "transformer_engine":
        return
    for name in ("shortcut", "shortcut_position", "shortcut_norms", "moe_every", "latent_scaling"):
        now, then = getattr(scmoe, name), getattr(trained, name)
        if now != then:
            raise ConfigError(
                "the position-wise format of the distributed optimizer loads moments into the wrong parameters where "
                f"Transformer Engine fuses other norms: --{name.replace('_', '-')} is {shown(now)} and the checkpoint "
                f"in {args.load} has {shown(then)}; save it with --dist-ckpt-optim-fully-reshardable before, or add "
                "--no-load-optim"
            )


def _check_layout(args: Namespace, saved: Namespace) -> None:
    for name in _LAYOUT_FLAGS:
        now, then = getattr(args, name), getattr(saved, name, None)
        if then is not None and now != then:
            raise ConfigError(
                "the position-wise format of the distributed optimizer loads moments into the wrong parameters in "
                f"another layout: {name} is {now} and the checkpoint in {args.load} has {then}; "
                "save it with --dist-ckpt-optim-fully-reshardable in the old layout before, or add --no-load-optim"
            )


def _check_expert_optimizer(args: Namespace, saved: Namespace) -> None:
    """Core gives experts that are split unlike the dense layers an optimizer of their own, chained to the other one; it
    can load the moments of both, or of one for all, but not the one into the other. So does the stock model.
    """
    if not args.num_experts or args.use_megatron_fsdp:
        return
    now, then = _has_expert_optimizer(args), getattr(saved, "expert_optimizer", None)
    if then is None:
        then = _has_expert_optimizer(saved)
    if now == then:
        return
    if then:
        fix = "keep --expert-model-parallel-size above 1"
    elif args.expert_model_parallel_size > 1:
        fix = "keep --expert-model-parallel-size 1"
    else:
        fix = f"use --expert-tensor-parallel-size {args.tensor_model_parallel_size}"
    step = f"/iter_{args.ckpt_step:07d}" if args.ckpt_step else ""
    raise ConfigError(
        "Core has one optimizer for all where experts are split like the dense layers, else two, and cannot load the "
        f"moments of one into the other: this run has {_NUMBERS[now]} ({_expert_layout(args)}) and the checkpoint in "
        f"{args.load} has {_NUMBERS[then]}; load what tools/convert_checkpoint.py --from megatron --to megatron "
        f"--with-optimizer --load {args.load}{step} --save NEW makes of it, or {fix}, or add --no-load-optim, or "
        "--finetune (weights only)"
    )


def _has_expert_optimizer(args: Namespace) -> bool:
    return args.expert_model_parallel_size > 1 or args.expert_tensor_parallel_size != args.tensor_model_parallel_size


def _expert_layout(args: Namespace) -> str:
    names = ("expert_model_parallel_size", "expert_tensor_parallel_size", "tensor_model_parallel_size")
    return ", ".join(f"{name} {getattr(args, name)}" for name in names)
