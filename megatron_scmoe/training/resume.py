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
from megatron_scmoe.config.rules import shown
from megatron_scmoe.mcore import checkpoints
from megatron_scmoe.training import containers, moments, prediction_rules, schedule


def check(args: Namespace, scmoe: ScMoEConfig, read_config: Callable[[Namespace], ScMoEConfig]) -> Namespace | None:
    """Raise ConfigError where continuing would silently be wrong; returns the checkpoint's own arguments.

    Args:
        args: Megatron's validated namespace.
        scmoe: the settings of this run.
        read_config: reads our settings from the namespace saved in a checkpoint.
    """
    moments.check_format(args)
    saved = checkpoints.saved_args(args) if args.load else None
    if saved is None:
        return None
    trained = read_config(saved)
    containers.check(args, saved, scmoe, trained)
    _check_architecture(args, scmoe, trained)
    _check_latents(args, saved)
    prediction_rules.check_saved(args, saved)
    if moments.are_loaded(args, saved):
        moments.check(args, saved, scmoe, trained)
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
    if len(sizes) < len(buckets):  # an embedding that two stages have, tied or for prediction layers
        untied = args.untie_embeddings_and_output_weights
        changes.append(
            "use --make-vocab-size-divisible-by 128" if untied else "add --untie-embeddings-and-output-weights"
        )
    fixes = [" and ".join(changes)]
    # Where a tied embedding ends a bucket, the other format cannot even be saved: "has out of bounds chunk".
    if len(sizes) == len(buckets) and not moments.loses_position_wise(args):
        fixes.append("drop --dist-ckpt-optim-fully-reshardable (to continue in the same layout alone)")
    return ", or ".join([*fixes, "add --no-save-optim"])


def _check_architecture(args: Namespace, scmoe: ScMoEConfig, trained: ScMoEConfig) -> None:
    for name in ARCHITECTURE_FIELDS:
        now, then = getattr(scmoe, name), getattr(trained, name)
        if now == then or not (scmoe.enabled or trained.enabled or name in CODEC_FIELDS):
            continue
        flag = "--" + name.replace("_", "-")
        if args.finetune or scmoe.shortcut_resume is Resume.CHANGED:
            print_rank_0(f"shortcut: the checkpoint in {args.load} has {flag} {shown(then)}, now {shown(now)}")
            continue
        raise ConfigError(
            f"a checkpoint continues with the shortcut it was trained with: {flag} is {shown(now)} and the checkpoint "
            f"in {args.load} has {shown(then)}; use {flag} {shown(then)}, or --finetune (weights only), or "
            "--shortcut-resume changed (optimizer too)"
        )


def _check_latents(args: Namespace, saved: Namespace) -> None:
    """Core leaves out projections that the model does not have, without a word where the experts fit all the same."""
    now, then = args.moe_latent_size or None, getattr(saved, "moe_latent_size", None) or None
    if now != then:
        fix = "drop --moe-latent-size" if then is None else f"use --moe-latent-size {then}"
        raise ConfigError(
            f"experts of one width do not fit another: --moe-latent-size is {now} and the checkpoint in {args.load} "
            f"has {then}; {fix}"
        )
