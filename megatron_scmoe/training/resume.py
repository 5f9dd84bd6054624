"""May this run continue from that checkpoint, and could a run continue from those that it will save?

The first is decided from the arguments saved in the checkpoint, before any process group starts. Parameter names and
shapes are those of the stock model, whatever the shortcut: a checkpoint of another architecture loads without an error
and is wrong. So the settings that give the parameters their meaning are compared. The second needs the gradient
buckets, so it is decided when the model is there, before anything is loaded or saved.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping

import torch.distributed as dist
from megatron.training.checkpointing import checkpoint_exists
from megatron.training.global_vars import get_tokenizer
from megatron.training.utils import print_rank_0
from torch import nn

from megatron_scmoe.config import ARCHITECTURE_FIELDS, CODEC_FIELDS, ConfigError, Resume, ScMoEConfig
from megatron_scmoe.mcore import checkpoints, version
from megatron_scmoe.training import schedule

_NUMBERS = {False: "one", True: "two"}
_LAYOUT_FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "world_size",
)


def check(args: Namespace, scmoe: ScMoEConfig, read_config: Callable[[Namespace], ScMoEConfig]) -> Namespace | None:
    """Raise ConfigError where continuing would silently be wrong; returns the checkpoint's own arguments.

    Args:
        args: Megatron's validated namespace.
        scmoe: the settings of this run.
        read_config: reads our settings from the namespace saved in a checkpoint.
    """
    if args.use_distributed_optimizer and not args.dist_ckpt_optim_fully_reshardable:
        _check_position_wise_optimizer(args)
    saved = checkpoints.saved_args(args) if args.load else None
    if saved is None:
        return None
    trained = read_config(saved)
    _check_architecture(args, scmoe, trained)
    if _loads_moments(args, saved):
        if args.use_distributed_optimizer and _is_position_wise(saved):
            _check_places(args, scmoe, trained)
            _check_layout(args, saved)
        _check_expert_optimizer(args, saved)
        schedule.check(args, saved)
    return saved


def use_pretrained(args: Namespace) -> None:
    """Load from --pretrained-checkpoint where there is none in --load, as Core does later: then it is checked, too.

    Raises:
        ConfigError: where there is none in either.
    """
    if not args.pretrained_checkpoint or checkpoint_exists(args.load):
        return
    if not checkpoint_exists(args.pretrained_checkpoint):
        raise ConfigError(
            f"there is no checkpoint in either: --load is {args.load} and --pretrained-checkpoint is "
            f"{args.pretrained_checkpoint}; give the folder that --save wrote"
        )
    args.load, args.finetune = args.pretrained_checkpoint, True


def keep_vocabulary(args: Namespace, saved: Namespace | None) -> None:
    """Pad the vocabulary as it is in the checkpoint, which another tensor-parallel size would do otherwise.

    Core loads it all the same: rows that were never trained would take part in the softmax, or trained ones be lost.

    Args:
        args: Megatron's namespace, with its tokenizer.
        saved: the arguments of the checkpoint to load; None where there is none.

    Raises:
        ConfigError: where the checkpoint's rows cannot be split, or are fewer than the tokenizer's tokens.
    """
    now, then = getattr(args, "padded_vocab_size", None), getattr(saved, "padded_vocab_size", None)
    if now is None or then is None or now == then:
        return
    if then % args.tensor_model_parallel_size:
        raise ConfigError(
            "rows of the vocabulary that were never trained would take part in the loss: it is padded to "
            f"{now} rows here and the checkpoint in {args.load} has {then}, which --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size} does not divide; use one that does"
        )
    if then < (num_tokens := get_tokenizer().vocab_size):
        raise ConfigError(
            f"the vocabulary would lose tokens: the tokenizer has {num_tokens} and the checkpoint in {args.load} has "
            f"{then} rows; use the tokenizer that it was trained with"
        )
    args.padded_vocab_size = then
    print_rank_0(f" > vocabulary padded to {then} rows, as in the checkpoint, and not to {now}")


def check_buckets(args: Namespace, model_chunks: list[nn.Module]) -> list[nn.Module]:
    """Raise ConfigError, on every rank alike, where this run would save moments at the wrong places.

    Core's fully reshardable format takes the padding behind each gradient bucket out of the moments, and then cuts them
    where the parameters lie in the padded buffer: behind a padded bucket every parameter gets its neighbour's moments
    (``get_parameter_state_dp_zero`` and ``sharded_param_state_fully_reshardable`` of its distributed optimizer; seen in
    0.19.2, in the stock model too). The buckets differ between pipeline stages, so the ranks tell each other.

    Args:
        args: Megatron's validated namespace.
        model_chunks: the model of this rank, wrapped for data parallelism.

    Returns:
        ``model_chunks``; this is one of Core's hooks, see ``post_wrap_hooks`` of its model configuration.
    """
    if not _saves_moments_by_parameter(args):
        return model_chunks
    found: list[list[checkpoints.PaddedBucket]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [bucket for chunk in model_chunks for bucket in checkpoints.padded_buckets(chunk)])
    refuse_padded_buckets(args, dict(enumerate(found)))
    return model_chunks


def refuse_padded_buckets(args: Namespace, found: Mapping[int, list[checkpoints.PaddedBucket]]) -> None:
    """Raise ConfigError where this run would save moments behind a padded bucket; ``found``: those of each rank."""
    buckets = [(rank, bucket) for rank, of_rank in found.items() for bucket in of_rank]
    if buckets and _saves_moments_by_parameter(args):
        rank, first = buckets[0]
        raise ConfigError(
            "Core saves moments at the wrong places behind a gradient bucket that ends in padding: "
            f"--dist-ckpt-optim-fully-reshardable is set and {first.place} on rank {rank} holds {first.numel} "
            f"elements in {first.numel_padded} places; " + _bucket_fix(args, [bucket for _, bucket in buckets])
        )


def _saves_moments_by_parameter(args: Namespace) -> bool:
    if not args.use_distributed_optimizer or not args.dist_ckpt_optim_fully_reshardable or args.no_save_optim:
        return False
    return bool(args.save and args.ckpt_format == "torch_dist") or args.ckpt_convert_format == "torch_dist"


def _bucket_fix(args: Namespace, buckets: list[checkpoints.PaddedBucket]) -> str:
    changes = []
    sizes = [bucket.bucket_size for bucket in buckets if bucket.bucket_size is not None]
    if sizes:
        changes.append(
            f"use --ddp-bucket-size {max(sizes)}" + " without --ddp-num-buckets" * bool(args.ddp_num_buckets)
        )
    if len(sizes) < len(buckets):
        changes.append("add --untie-embeddings-and-output-weights")
    fixes = [" and ".join(changes)]
    # Where a tied embedding ends a bucket, the other format cannot even be saved: "has out of bounds chunk".
    if len(sizes) == len(buckets) and not _loses_position_wise_moments(args):
        fixes.append("drop --dist-ckpt-optim-fully-reshardable (to continue in the same layout alone)")
    return ", or ".join([*fixes, "add --no-save-optim"])


def _check_architecture(args: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    for name in ARCHITECTURE_FIELDS:
        now, then = getattr(scmoe, name), getattr(trained, name)
        if now == then or not (scmoe.enabled or trained.enabled or name in CODEC_FIELDS):
            continue
        flag = "--" + name.replace("_", "-")
        if args.finetune or scmoe.shortcut_resume is Resume.CHANGED:
            print_rank_0(f"shortcut: the checkpoint in {args.load} has {flag} {_words(then)}, now {_words(now)}")
            continue
        raise ConfigError(
            f"a checkpoint continues with the shortcut it was trained with: {flag} is {_words(now)} and the checkpoint "
            f"in {args.load} has {_words(then)}; use {flag} {_words(then)}, or --finetune (weights only), or "
            "--shortcut-resume changed (optimizer too)"
        )


def _loads_moments(args: Namespace, saved: Namespace) -> bool:
    return not (args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False))


def _is_position_wise(saved: Namespace) -> bool:
    """How the checkpoint keeps moments; Core loads by that, whatever this run saves in."""
    if not getattr(saved, "use_distributed_optimizer", False):
        return False
    by_parameter = getattr(saved, "ckpt_fully_parallel_save", False)  # of before there was a flag for it
    return not getattr(saved, "dist_ckpt_optim_fully_reshardable", by_parameter)


def _check_position_wise_optimizer(args: Namespace) -> None:
    if _loses_position_wise_moments(args) and (args.save or args.load):
        raise ConfigError(
            "fp32 moments are not restored from the position-wise format without Transformer Engine or Apex: "
            "--use-distributed-optimizer is set and --dist-ckpt-optim-fully-reshardable is off; "
            "add --dist-ckpt-optim-fully-reshardable"
        )


def _loses_position_wise_moments(args: Namespace) -> bool:
    return not (args.bf16 or args.fp16) and version.uses_torch_optimizers()


def _check_places(args: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    """Which norms Transformer Engine fuses with the products behind them, and with it the order of the parameters,
    follows from what the experts read.
    """
    if args.transformer_impl != "transformer_engine":
        return
    for name in ("shortcut", "shortcut_position", "moe_every", "latent_scaling"):
        now, then = getattr(scmoe, name), getattr(trained, name)
        if now != then:
            raise ConfigError(
                "the position-wise format of the distributed optimizer loads moments into the wrong parameters where "
                f"Transformer Engine fuses other norms: --{name.replace('_', '-')} is {_words(now)} and the checkpoint "
                f"in {args.load} has {_words(then)}; save it with --dist-ckpt-optim-fully-reshardable before, or add "
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


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
