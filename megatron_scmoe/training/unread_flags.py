"""Megatron's flags that its parser takes and nothing reads in this script: those of other programs, and leftovers.

A flag without effect is refused: who gave it believes that it does something. Read off megatron-core 0.19.2, whose
wheel has no other program than its trainer.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from megatron_scmoe.config import ConfigError

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

LEFTOVERS = {
    "rampup_batch_size": "Core 0.19.2 no longer hands it on; use --step-batch-size-schedule",
    "onnx_safe": "nothing reads it",
    "use_flash_attn": "nothing reads it; use --attention-backend flash",
    "mask_prob": "it is of masked language models",
    "short_seq_prob": "it is of masked language models",
    "vocab_extra_ids": "nothing reads it; the tokenizer decides the vocabulary",
    "exit_signal_handler_for_dataloader": "nothing reads it",
    "enable_full_sharding_in_hsdp": "nothing reads it",
    "dist_ckpt_save_pre_mcore_014": "nothing reads it",
    "logits_load_decode_threads": "the loss hook does not distil",
    "logits_load_prefetch_factor": "the loss hook does not distil",
    "logits_load_msc_prefetch_depth": "the loss hook does not distil",
    "logits_load_kd_loss_alpha": "the loss hook does not distil",
    "logits_load_ignore_errors": "the loss hook does not distil",
    "inprocess_max_iterations": "this script is not wrapped for in-process restart",
}
"""Flags outside those groups that no line of the wheel reads, or none that this script runs."""


class UnreadFlags:
    """What the parser takes without effect, with its defaults.

    Args:
        parser: with all of Megatron's flags.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        self._found: dict[str, tuple[str, object, str]] = {}
        for group in parser._action_groups:
            program = OTHER_PROGRAMS.get(group.title or "")
            for action in group._group_actions:
                reason = f"it is a flag of {program}" if program else LEFTOVERS.get(action.dest, "")
                if reason and action.dest not in READ_ALL_THE_SAME and action.option_strings:
                    self._found[action.dest] = action.option_strings[0], action.default, reason

    def check(self, args: Namespace) -> None:
        """Raise ConfigError for the first flag in ``args`` whose value is not its default."""
        for name, (flag, default, reason) in self._found.items():
            value = getattr(args, name)
            if value != default:
                shown = " ".join(map(str, value)) if isinstance(value, list) else value
                raise ConfigError(f"it would have no effect here: {flag} is {shown} and {reason}; drop it")
