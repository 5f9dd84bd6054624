"""What cannot be combined with what is ours: the tables of refused flags, and the rules that join several settings.

Every rule here ends a run before any process group starts, in one line: the rule, the values, the fix.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron_scmoe.config import (
    Codec,
    Combine,
    Compensation,
    ConfigError,
    LatentScaling,
    Position,
    Refinement,
    Router,
    ScMoEConfig,
    Shortcut,
)
from megatron_scmoe.training import refused_flags
from megatron_scmoe.training.refused_flags import RECOMPUTE_REFUSED


def check_pipelined(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError for the first flag in ``args`` that our stock MoE layer does not do."""
    mine = f"--overlap-chunks is {scmoe.overlap_chunks} and --a2a-codec is {scmoe.a2a_codec}"
    if scmoe.sends_once:
        mine += f" and --a2a-unique is {scmoe.a2a_unique}"
    for refusal in refused_flags.PIPELINED_REFUSALS:
        refusal.check(args, mine)
    if args.recompute_granularity == "selective" and "moe" in (args.recompute_modules or ()):
        raise ConfigError(
            f"{RECOMPUTE_REFUSED['moe']}: --recompute-modules has moe, {mine}; drop moe from --recompute-modules"
        )
    if not args.num_experts:
        raise ConfigError(
            f"chunks, codec and unique rows are those of an MoE layer: --num-experts is {args.num_experts}, {mine}; "
            "add --num-experts 8 or drop them"
        )
    _check_sequence_parallel(args)
    _check_codec(args, scmoe)
    _check_unique(args, scmoe)


def _check_codec(args: Namespace, scmoe: ScMoEConfig) -> None:
    if scmoe.a2a_codec is Codec.BF16 and (args.bf16 or args.fp16):
        flag = "--bf16" if args.bf16 else "--fp16"
        raise ConfigError(
            f"rows have 16 bits already: {flag} is set and --a2a-codec is bf16; drop --a2a-codec, or use fp8"
        )
    if scmoe.sends_centroids:
        _check_centroids(args, scmoe)


def _check_centroids(args: Namespace, scmoe: ScMoEConfig) -> None:
    # What experts read is what is hashed and mapped.
    width, flag = args.hidden_size, "--hidden-size"
    if args.moe_latent_size:
        width, flag = args.moe_latent_size, "--moe-latent-size"
    if scmoe.lsh_width > width:
        raise ConfigError(
            f"a hash function keeps some of a token's coordinates: --lsh-width is {scmoe.lsh_width} and {flag} "
            f"is {width}; use --lsh-width {min(width, 2)}"
        )
    if scmoe.lsh_compensation is Compensation.LOWRANK and width % 8:
        raise ConfigError(
            f"grouped matrix products want multiples of 8: --lsh-compensation is lowrank and {flag} is "
            f"{width}; use --lsh-compensation none"
        )
    multiplies_in_groups = {
        "--lsh-compensation is lowrank": scmoe.lsh_compensation is Compensation.LOWRANK,
        "--lsh-refinement is lloyd": scmoe.lsh_refinement is Refinement.LLOYD,
    }
    asked_for = " and ".join(words for words, wanted in multiplies_in_groups.items() if wanted)
    if asked_for and not hasattr(torch.nn.functional, "grouped_mm"):
        raise ConfigError(
            f"grouped matrix products came with torch 2.10: {asked_for} and this is torch {torch.__version__}; "
            "install a newer torch, or drop what needs them"
        )
    for refusal in refused_flags.CODEC_REFUSALS:
        refusal.check(args, f"--a2a-codec is {scmoe.a2a_codec}")


def _check_unique(args: Namespace, scmoe: ScMoEConfig) -> None:
    if scmoe.sends_once and args.moe_router_topk == 1:
        raise ConfigError(
            f"with one expert each no token goes to a rank twice: --moe-router-topk is {args.moe_router_topk} and "
            f"--a2a-unique is {scmoe.a2a_unique}; drop --a2a-unique"
        )


def check_megatron_args(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError for the first Megatron flag in ``args`` that cannot be combined with ``scmoe``."""
    for refusal in refused_flags.REFUSALS:
        refusal.check(args, f"--shortcut is {scmoe.shortcut}")
    for module, reason in RECOMPUTE_REFUSED.items():
        if args.recompute_granularity == "selective" and module in (args.recompute_modules or ()):
            raise ConfigError(
                f"{reason}: --recompute-modules has {module} and --shortcut is {scmoe.shortcut}; drop {module} from it"
            )
    if not args.num_experts:
        raise ConfigError(
            f"a shortcut needs experts: --num-experts is {args.num_experts} and --shortcut is {scmoe.shortcut}; "
            "add --num-experts 8"
        )
    if scmoe.shortcut is Shortcut.DGMOE:
        _check_two_gates(args)
    elif not args.moe_shared_expert_intermediate_size:
        raise ConfigError(
            "scmoe always runs a shared expert: --moe-shared-expert-intermediate-size is "
            f"{args.moe_shared_expert_intermediate_size} and --shortcut is {scmoe.shortcut}; "
            f"add --moe-shared-expert-intermediate-size {args.moe_ffn_hidden_size or args.ffn_hidden_size or 'SIZE'}"
        )
    one_each = args.moe_router_topk == 1 or scmoe.shortcut is Shortcut.DGMOE
    softmax = args.moe_router_score_function == "softmax" and "sinkhorn" not in _balancing(args)
    if one_each and softmax and not args.moe_router_pre_softmax and scmoe.router is Router.CORE:
        raise ConfigError(
            "the softmax over one logit is always 1, so the router would get no gradient: --shortcut is "
            f"{scmoe.shortcut}, --moe-router-topk {args.moe_router_topk} and --moe-router-pre-softmax off; "
            "add --moe-router-pre-softmax"
        )
    if args.add_bias_linear:
        raise ConfigError(
            "shared experts have no bias: --disable-bias-linear is not set and "
            f"--shortcut is {scmoe.shortcut}; add --disable-bias-linear"
        )
    if args.moe_shared_expert_gate and scmoe.shortcut_combine is not Combine.CG1:
        raise ConfigError(
            "Megatron's shared-expert gate is cg1: --moe-shared-expert-gate is set and --shortcut-combine is "
            f"{scmoe.shortcut_combine}; use --shortcut-combine cg1 or drop --moe-shared-expert-gate"
        )
    _check_dropout(args, scmoe)
    _check_router(args)
    if scmoe.router is Router.LONGCAT:
        _check_longcat_router(args)
    if scmoe.latent_scaling is LatentScaling.LONGCAT:
        _check_latent_scaling(args)
    _check_parallelism(args, scmoe)
    _check_codec(args, scmoe)
    _check_unique(args, scmoe)


def _check_dropout(args: Namespace, scmoe: ScMoEConfig) -> None:
    if Position.FARSKIP in scmoe.shortcut_position and scmoe.shortcut_landing and args.hidden_dropout:
        raise ConfigError(
            "farskip adds a routed output to two tensors, of which dropout would drop different parts: "
            f"--shortcut-position has farskip and --hidden-dropout is {args.hidden_dropout}; add --hidden-dropout 0"
        )


def _balancing(args: Namespace) -> list[str]:
    kinds = args.moe_router_load_balancing_type
    return [kinds] if isinstance(kinds, str) else kinds


def _check_router(args: Namespace) -> None:
    kinds = _balancing(args)
    coefficients = args.moe_aux_loss_coeff
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in kinds and len(kinds) > 1:
            raise ConfigError(
                f"{kind} takes the place of the losses, in a list with them it would be ignored: "
                f"--shortcut is {args.shortcut} and --moe-router-load-balancing-type is {' '.join(kinds)}; "
                "give it alone or drop it"
            )
        if kind in kinds and any(coefficients if isinstance(coefficients, list) else [coefficients]):
            raise ConfigError(
                f"{kind} knows no balance loss: --moe-router-load-balancing-type is {kind} and --moe-aux-loss-coeff is "
                f"{_listed(coefficients)}; add --moe-aux-loss-coeff 0"
            )
    limit, num_groups, topk = args.moe_router_group_topk, args.moe_router_num_groups, args.moe_router_topk
    if not limit or not num_groups:
        return
    if limit > topk:
        raise ConfigError(
            "a choice of more groups than experts would not look at their scores: --moe-router-group-topk is "
            f"{limit} and --moe-router-topk is {topk}; use --moe-router-group-topk {topk} or less"
        )
    group_size = args.num_experts // num_groups
    if limit * group_size < topk:
        raise ConfigError(
            f"a token's experts lie in its groups, and {limit} groups of {group_size} hold {limit * group_size} "
            f"experts: --moe-router-group-topk is {limit} and --moe-router-topk is {topk}; raise "
            "--moe-router-group-topk or use fewer groups"
        )


def _listed(values: object) -> str:
    return " ".join(map(str, values)) if isinstance(values, list) else str(values)


def _check_longcat_router(args: Namespace) -> None:
    for refusal in refused_flags.LONGCAT_REFUSALS:
        refusal.check(args, f"--router is {args.router}")
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in _balancing(args):
            raise ConfigError(
                f"{kind} routes in a way of its own: --router is longcat and --moe-router-load-balancing-type is "
                f"{kind}; use none, aux_loss, seq_aux_loss or global_aux_loss"
            )


def _check_latent_scaling(args: Namespace) -> None:
    if not args.multi_latent_attention or not args.qk_layernorm:
        raise ConfigError(
            "the norms of latents are scaled: --latent-scaling is longcat, --multi-latent-attention is "
            f"{args.multi_latent_attention} and --qk-layernorm is {args.qk_layernorm}; add both, or drop "
            "--latent-scaling"
        )
    if args.mla_down_proj_fusion:
        raise ConfigError(
            "the fused down projection has no norms of its own: --latent-scaling is longcat and "
            "--mla-down-proj-fusion is set; drop it"
        )


def _check_two_gates(args: Namespace) -> None:
    for refusal in refused_flags.TWO_GATES_REFUSALS:
        refusal.check(args, f"--shortcut is {args.shortcut}")
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in _balancing(args):
            raise ConfigError(
                f"{kind} routes all tokens of a gate at once and knows no second choice: --shortcut is dgmoe and "
                f"--moe-router-load-balancing-type is {kind}; use aux_loss, seq_aux_loss or global_aux_loss"
            )


def _check_parallelism(args: Namespace, scmoe: ScMoEConfig) -> None:
    per_head_norms = args.qk_layernorm and not args.multi_latent_attention
    if args.transformer_impl == "local" and args.tensor_model_parallel_size > 1 and per_head_norms:
        raise ConfigError(
            "the local spec's norm of queries and keys does not know sequence parallelism: --qk-layernorm is set and "
            f"--tensor-model-parallel-size is {args.tensor_model_parallel_size}; drop --qk-layernorm"
        )
    _check_sequence_parallel(args)


def _check_sequence_parallel(args: Namespace) -> None:
    # Core's own check is in the forward that ours replace. Without it every rank would send the same tokens, and the
    # gradients of experts would be too large by as many times.
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        raise ConfigError(
            "Core trains MoE layers with tensor parallelism only under sequence parallelism: "
            f"--tensor-model-parallel-size is {args.tensor_model_parallel_size} and --sequence-parallel is off; "
            "add --sequence-parallel"
        )
