"""Megatron's flags that its parser takes and nothing reads in this script: those of other programs, and leftovers.

A flag without effect is refused: who gave it believes that it does something. Read off megatron-core 0.19.2, whose
wheel has no other program than its trainer.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import NamedTuple

from megatron_scmoe.config import ConfigError
from megatron_scmoe.config.groups import BEHIND

OTHER_PROGRAMS = {
    "rl": "reinforcement learning",
    "biencoder": "retrieval",
    "vision": "vision models",
    "inference": "serving",
}
"""Megatron's groups of flags that belong to programs which its wheel lacks."""

READ_ALL_THE_SAME = {
    "data_sharding": "--no-data-sharding",
    "cuda_graph_modules": "--cuda-graph-modules",
    "perform_rl_step": "--perform-rl-step",
}
"""Of those groups, what has an effect, or a refusal of its own: names of values and their flags."""

_UNREAD = "nothing reads it"
_SERVING = "it is of serving"
_TWO_STACKS = "it is of models with an encoder"

LEFTOVERS = {
    "rampup_batch_size": "Core 0.19.2 no longer hands it on; use --step-batch-size-schedule",
    "onnx_safe": _UNREAD,
    "use_flash_attn": "nothing reads it; use --attention-backend flash",
    "mask_prob": "it is of masked language models",
    "short_seq_prob": "it is of masked language models",
    "bert_no_binary_head": "it is of masked language models",
    "decoder_num_layers": _TWO_STACKS,
    "decoder_seq_length": _TWO_STACKS,
    "relative_attention_num_buckets": _TWO_STACKS,
    "relative_attention_max_distance": _TWO_STACKS,
    "sample_rate": "it is of other datasets",
    "openai_gelu": _UNREAD,
    "apply_residual_connection_post_layernorm": _UNREAD,
    "vocab_extra_ids": "nothing reads it; the tokenizer decides the vocabulary",
    "exit_signal_handler_for_dataloader": _UNREAD,
    "enable_full_sharding_in_hsdp": _UNREAD,
    "dist_ckpt_save_pre_mcore_014": _UNREAD,
    "flash_decode": _SERVING,
    "mlp_chunks_for_prefill": _SERVING,
    "nccl_all_reduce_for_prefill": _SERVING,
    "moe_pad_experts_for_cuda_graph_inference": _SERVING,
    "ep_overlap_early_attn_memory_release": "the forward hook has no schedule of two micro-batches",
    "high_priority_a2a_comm_stream": "the forward hook has no schedule of two micro-batches",
    "max_seqlen_per_dp_cp_rank": "the batch hook gives all sequences to the same number of ranks",
    "mtp_standalone": "Core finds it out by itself",
}
"""Flags outside those groups that no line of the wheel reads, or none that this script runs."""

OF_REFUSED = {
    "logits_load_": ("--logits-load-dir", "the loss hook does not distil"),
    "inprocess_": ("--inprocess-restart", "this script is not wrapped for in-process restart"),
    "fim_": ("--fim-data", "the dataset hook builds plain GPT datasets"),
}
"""How the names of flags begin that belong to one which is always refused: that flag, and why."""


class Companions(NamedTuple):
    """Flags that nothing reads without another one.

    Attributes:
        needed: the other one, in words.
        is_given: whether it is.
        names: of them, as in ``LEFTOVERS``.
    """

    needed: str
    is_given: Callable[[Namespace], object]
    names: tuple[str, ...]


_MUON = ("momentum", "no_split_qkv", "nesterov", "scale_mode", "fp32_matmul_prec", "coefficient_type", "num_ns_steps")
COMPANIONS = (
    Companions(
        "--save",
        lambda args: args.save or args.ckpt_convert_save,
        (
            *("save_interval", "save_retain_interval", "save_params_interval", "save_activations_interval"),
            *("save_tokens_per_expert_interval", "save_wgrads_interval", "save_dgrads_interval", "async_save"),
        ),
    ),
    Companions(
        "--load",
        lambda args: args.load or args.pretrained_checkpoint,
        ("finetune", "ckpt_step", "override_ckpt_iteration", "exit_on_missing_checkpoint"),
    ),
    Companions("--use-checkpoint-args", lambda args: args.use_checkpoint_args, ("use_mp_args_from_checkpoint_args",)),
    Companions(
        "--fp16", lambda args: args.fp16, ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    ),
    Companions(
        "--mtp-num-layers",
        lambda args: args.mtp_num_layers or BEHIND in (args.hybrid_layer_pattern or "") or args.use_checkpoint_args,
        ("mtp_loss_scaling_factor", "mtp_use_repeated_layer", "mtp_detach_heads"),
    ),
    Companions("--decoupled-lr", lambda args: args.decoupled_lr is not None, ("decoupled_min_lr",)),
    Companions(
        "--lr-decay-style WSD",
        lambda args: args.lr_decay_style == "WSD",
        ("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ),
    Companions("--optimizer sgd", lambda args: args.optimizer == "sgd", ("sgd_momentum",)),
    Companions(
        "--optimizer lion",
        lambda args: "lion" in (args.optimizer, args.muon_scalar_optimizer),
        ("lion_beta1", "lion_beta2"),
    ),
    Companions(
        "--optimizer muon",
        lambda args: "muon" in args.optimizer,
        tuple(f"muon_{name}" for name in (*_MUON, "tp_mode", "extra_scale_factor", "scalar_optimizer")),
    ),
    Companions(
        "--optimizer-cpu-offload",
        lambda args: args.optimizer_cpu_offload,
        (
            *("optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload", "overlap_cpu_optimizer_d2h_h2d"),
            *("no_pin_cpu_grads", "no_pin_cpu_params"),
        ),
    ),
    Companions(
        "--tokenizer-type SFTTokenizer",
        lambda args: args.tokenizer_type == "SFTTokenizer",
        ("sft_tokenizer_prompt_format",),
    ),
    Companions("--dataloader-type cyclic", lambda args: args.dataloader_type == "cyclic", ("no_data_sharding",)),
)
"""Of data, optimizer and checkpoints."""


class UnreadFlags:
    """What the parser takes without effect, with its defaults.

    Args:
        parser: with all of Megatron's flags.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self._unread: list[tuple[str, str, str]] = []
        self._flags: dict[str, tuple[str, str, object]] = {}
        for group in parser._action_groups:
            program = OTHER_PROGRAMS.get(group.title or "")
            for action in group._group_actions:
                if action.option_strings:
                    flag = action.option_strings[0]
                    name = flag.removeprefix("--").replace("-", "_")
                    self._flags[name] = flag, action.dest, action.default
                    if action.dest not in READ_ALL_THE_SAME and (reason := _why_unread(name, flag, program)):
                        self._unread.append((name, reason, "drop it"))

    def check(self, args: Namespace) -> None:
        """Raise ConfigError for the first flag in ``args`` whose value is not its default."""
        unread = list(self._unread)
        for one in COMPANIONS:
            if not one.is_given(args):
                unread += [(name, f"{one.needed} is not given", f"add {one.needed}, or drop it") for name in one.names]
        for name, reason, fix in unread:
            flag, destination, default = self._flags[name]
            if (value := getattr(args, destination)) != default:
                shown = " ".join(map(str, value)) if isinstance(value, list) else value
                raise ConfigError(f"it would have no effect here: {flag} is {shown} and {reason}; {fix}")


def _why_unread(name: str, flag: str, program: str | None) -> str:
    """Why nothing reads a flag, which is one of ``program`` where that is given; "" where something does."""
    for begin, (refused, reason) in OF_REFUSED.items():
        if name.startswith(begin) and flag != refused:
            return reason
    return f"it is a flag of {program}" if program else LEFTOVERS.get(name, "")
