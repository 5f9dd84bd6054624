"""Do learning rates and weight decay of a checkpoint go on in this run? Decided from the arguments that it has saved.

Core asks, too, when it loads: behind process groups, model and optimizer, and with a traceback for an answer.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_scmoe.config import ConfigError

_RATES = ("lr", "min_lr", "decoupled_lr", "decoupled_min_lr")


def check(args: Namespace, saved: Namespace) -> None:
    """Raise ConfigError where Core would load neither the moments nor the schedule.

    Args:
        args: Megatron's validated namespace.
        saved: the arguments of the checkpoint, whose moments are to be loaded.
    """
    if getattr(saved, "lr", None) is None or args.skip_train:
        return
    for name in _RATES:
        now, then = getattr(args, name, None), getattr(saved, name, None)
        if now != then:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                "Core finds the moments of a group of parameters by its learning rates, which no flag overrides: "
                f"{flag} is {now} and the checkpoint in {args.load} has {then}; use that, or add --no-load-optim, or "
                "--finetune (weights only)"
            )
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    before = _compared(saved)
    for name, now in _compared(args).items():
        if now != before[name]:
            raise ConfigError(
                f"the schedule of a checkpoint goes on as it was: {name} is {now} and the checkpoint in {args.load} "
                f"has {before[name]}; keep --train-iters and its relatives, or add --override-opt-param-scheduler (as "
                "this run says) or --use-checkpoint-opt-param-scheduler (as the checkpoint says)"
            )


def _compared(args: Namespace) -> dict[str, object]:
    """What Core compares; steps are samples, whether training is counted in iterations or in samples."""
    unit, size = ("samples", 1) if args.train_samples else ("iters", args.global_batch_size)
    total = getattr(args, f"train_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or total
    has_fraction = args.lr_warmup_fraction is not None
    warmup = args.lr_warmup_fraction * decay if has_fraction else getattr(args, f"lr_warmup_{unit}")
    return {
        "samples of warm-up": warmup * size,
        "samples of decay": decay * size,
        "--lr-decay-style": args.lr_decay_style,
        "--start-weight-decay": args.start_weight_decay,
        "--end-weight-decay": args.end_weight_decay,
        "samples of training": total * size,
        "--weight-decay-incr-style": args.weight_decay_incr_style,
    }
