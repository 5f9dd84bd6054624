"""Numbers that no run has, which Megatron divides by, or takes and fails with later: refused at the start."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import fields

from megatron_scmoe.config import ConfigError, ScMoEConfig

_FROM_1 = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("moe_ffn_hidden_size", "moe_latent_size", "moe_router_topk", "mtp_num_layers"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
    *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by"),
    *("seq_length", "max_position_embeddings", "micro_batch_size", "global_batch_size"),
    *("eval_micro_batch_size", "eval_global_batch_size", "num_dataset_builder_threads", "seed"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("log_interval", "eval_interval", "save_interval", "tensorboard_log_interval"),
)
_FROM_0 = ("num_experts", "moe_shared_expert_intermediate_size", "num_workers", "train_iters", "eval_iters")
_OURS = {field.name for field in fields(ScMoEConfig)}  # which have rules of their own
_LARGEST = 2**63 - 1  # that a tensor, or a file, can have


def check_sizes(args: Namespace) -> None:
    """Raise ConfigError for the first number in ``args``, as they were parsed, that no run can have."""
    for low, names in ((1, _FROM_1), (0, _FROM_0)):
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= _LARGEST:
                raise ConfigError(
                    f"it is a whole number from {low}, and not beyond all machines: --{name.replace('_', '-')} is "
                    f"{value}; give one"
                )
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if name not in _OURS and any(isinstance(one, float) and math.isnan(one) for one in values):
            raise ConfigError(f"nan is no number: --{name.replace('_', '-')} is {value}; give one")
    experts = (args.num_experts or 0) + args.zero_experts
    if args.num_experts and args.moe_router_topk > experts:
        raise ConfigError(
            f"a token goes to different experts: --moe-router-topk is {args.moe_router_topk} and there are {experts} "
            "experts; use fewer"
        )
