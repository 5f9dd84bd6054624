"""What cannot be combined with what is ours: Megatron's flags that would bypass a group, break it, or be ignored by it.

Every rule here ends a run before any process group starts, in one line: the rule, the values, the fix.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import (
    Combine,
    Compensation,
    ConfigError,
    LatentScaling,
    Refinement,
    Router,
    ScMoEConfig,
    Shortcut,
)
from megatron_scmoe.mcore import stages


@dataclass(frozen=True, slots=True)
class Refusal:
    """A Megatron flag that cannot be combined with something of ours.

    Attributes:
        flag: the flag.
        reason: the rule.
        fix: what to do instead.
        allowed: the values that can be combined.
        name: of its value, where Megatron gives it another one than the flag's.
    """

    flag: str
    reason: str
    fix: str = "drop it"
    allowed: tuple[object, ...] = (None, False, 0)
    name: str = ""

    def check(self, args: Namespace, beside: str = "") -> None:
        """Raise ConfigError where ``args`` has a value that is not allowed.

        Args:
            args: Megatron's namespace.
            beside: what of ours it cannot be combined with, such as "--router is longcat"; "" where the script never
                does what the flag asks for.
        """
        value = getattr(args, self.name or self.flag.removeprefix("--").replace("-", "_"))
        if value not in self.allowed:
            other = f" and {beside}" if beside else ""
            raise ConfigError(f"{self.reason}: {self.flag} is {value}{other}; {self.fix}")


_BYPASS = "it calls inner methods of a block, so that the group would never run"
_PER_BLOCK_HOOKS = "its hooks expect every block to run its own parameters, and the last block runs the whole group"
_UNTRIED_PRECISION = "low precision has not run in groups, where Core's first and last blocks and MLP recompute differ"
_FETCHES_BY_BLOCK = "it fetches weights block by block, and has not run with groups"
_REDUCES_ONCE = "it reduces an expert's gradients once in a micro-batch, and experts run once for each chunk and gate"
_PADS_AFTER_COUNTS = "it pads the tokens of experts when their counts are exchanged already"

_RECOMPUTE_REFUSED = {
    "moe": "it would run the all-to-all inside a recompute region, where nothing can hide it",
    "layernorm": "it frees the normed tensor, which the routed experts read too",
}

REFUSALS = (
    Refusal(
        "--moe-token-dispatcher-type",
        "only the all-to-all can be split in two halves",
        "use --moe-token-dispatcher-type alltoall",
        ("alltoall",),
    ),
    Refusal(
        "--moe-shared-expert-overlap", "the shared expert is an op of the dense stream", "drop it: it overlaps anyway"
    ),
    Refusal("--delay-wgrad-compute", _BYPASS),
    Refusal("--overlap-dispatch-backward-with-experts-wgrad", "the dispatch halves have no hook for it"),
    Refusal("--cuda-graph-impl", _BYPASS, "use --cuda-graph-impl none", ("none",)),
    Refusal("--enable-cuda-graph", _BYPASS),
    Refusal("--external-cuda-graph", _BYPASS),
    Refusal("--use-megatron-fsdp", _PER_BLOCK_HOOKS),
    Refusal("--use-torch-fsdp2", _PER_BLOCK_HOOKS),
    Refusal("--cpu-offloading-num-layers", _PER_BLOCK_HOOKS),
    Refusal("--fine-grained-activation-offloading", _BYPASS),
    Refusal("--use-transformer-engine-op-fuser", "it fuses the MLP with the norm that the experts read"),
    Refusal("--fused-residual-rmsnorm", "it fuses the residual with the norm that the experts read"),
    Refusal("--heterogeneous-layers-config-path", "groups are made of equal blocks"),
    Refusal("--heterogeneous-layers-config-encoded-json", "groups are made of equal blocks"),
    Refusal("--experimental-attention-variant", "its blocks have a spec of their own"),
    Refusal("--mla-down-proj-fusion", "it fuses the projection with the norm that the experts read"),
    Refusal("--tensor-parallel-num-weight-shards", _FETCHES_BY_BLOCK),
    Refusal("--expert-tensor-parallel-num-weight-shards", _REDUCES_ONCE),
    Refusal("--spec", "the shortcut brings its own block spec"),
    Refusal("--moe-latent-size", "latent projections lie outside the two halves of a dispatch"),
    Refusal("--moe-use-upcycling", "it writes stock MoE layers"),
    Refusal("--moe-layer-recompute", _RECOMPUTE_REFUSED["moe"]),
    Refusal("--mlp-chunks-for-training", "a group does not cut its MLPs into chunks", "use 1", (1,)),
    Refusal("--fp8-format", _UNTRIED_PRECISION, name="fp8"),
    Refusal("--fp4-format", _UNTRIED_PRECISION, name="fp4"),
    Refusal("--moe-router-padding-for-quantization", _PADS_AFTER_COUNTS),
    Refusal("--moe-router-padding-for-fp8", _PADS_AFTER_COUNTS),
    Refusal("--rope-scaling-factor", "Core 0.19.2 leaves it out and stretches rotary positions by 8", "use 8", (8,)),
    Refusal(
        "--transformer-impl",
        "inference layers do not train",
        "use --transformer-impl local or transformer_engine",
        ("local", "transformer_engine"),
    ),
)

PIPELINED_REFUSALS = (
    Refusal(
        "--moe-token-dispatcher-type",
        "only the all-to-all can be split in two halves",
        "use --moe-token-dispatcher-type alltoall",
        ("alltoall",),
    ),
    Refusal("--moe-shared-expert-overlap", "the shared expert runs while tokens travel anyway"),
    Refusal("--delay-wgrad-compute", "the dispatch halves have no hook for it"),
    Refusal("--overlap-dispatch-backward-with-experts-wgrad", "the dispatch halves have no hook for it"),
    Refusal("--cuda-graph-impl", "token counts differ from step to step", "use --cuda-graph-impl none", ("none",)),
    Refusal("--enable-cuda-graph", "token counts differ from step to step"),
    Refusal("--external-cuda-graph", "token counts differ from step to step"),
    Refusal("--moe-latent-size", "latent projections lie outside the two halves of a dispatch"),
    Refusal("--use-megatron-fsdp", "each chunk would overwrite the gradients that an expert has from the others"),
    Refusal("--expert-tensor-parallel-num-weight-shards", _REDUCES_ONCE),
    Refusal("--moe-layer-recompute", _RECOMPUTE_REFUSED["moe"]),
    Refusal("--fine-grained-activation-offloading", "it calls inner methods of the stock layer"),
    Refusal("--moe-router-padding-for-quantization", _PADS_AFTER_COUNTS),
    Refusal("--moe-router-padding-for-fp8", _PADS_AFTER_COUNTS),
    Refusal("--spec", "chunks and codec need the block spec of this script"),
    Refusal("--heterogeneous-layers-config-path", "its blocks have a spec of their own"),
    Refusal("--heterogeneous-layers-config-encoded-json", "its blocks have a spec of their own"),
    Refusal("--experimental-attention-variant", "its blocks have a spec of their own"),
    Refusal(
        "--transformer-impl",
        "inference layers do not train",
        "use --transformer-impl local or transformer_engine",
        ("local", "transformer_engine"),
    ),
)
"""What the stock MoE layer cannot be combined with where its tokens travel in chunks, or compressed."""

HOOK_REFUSALS = (
    Refusal("--sft", "the batch hook reads pretraining datasets"),
    Refusal("--fim-data", "the dataset hook builds plain GPT datasets"),
    Refusal("--dataloader-inter-document-masking", "the batch hook does not pack sequences"),
    Refusal("--hybrid-context-parallel", "the batch hook does not pack sequences"),
    Refusal("--perform-rl-step", "the forward hook computes a language-model loss"),
    Refusal("--hybrid-layer-pattern", "this script builds GPT models"),
    Refusal("--mtp-num-layers", "the batch hook has no tokens for prediction layers, and groups no place"),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "the forward hook has no schedule of two micro-batches",
        "drop it: a shortcut, or --overlap-chunks 2, overlaps inside one",
    ),
    Refusal("--check-for-spiky-loss", "the loss hook does not look at the loss, which would wait for the GPU"),
    Refusal("--logits-load-dir", "the loss hook does not distil"),
    Refusal("--inprocess-restart", "this script is not wrapped for it", "restart the job from its last checkpoint"),
    Refusal("--yaml-cfg", "settings are flags here", "give flags instead"),
)
"""What the hooks of pretrain_gpt_scmoe.py do not do, with or without a shortcut."""


def check_hooks(args: Namespace) -> None:
    """Raise ConfigError for the first flag in ``args`` that the entry script's hooks do not do."""
    for refusal in HOOK_REFUSALS:
        refusal.check(args)


def check_pipelined(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError for the first flag in ``args`` that our stock MoE layer does not do."""
    mine = f"--overlap-chunks is {args.overlap_chunks} and --a2a-codec is {args.a2a_codec}"
    for refusal in PIPELINED_REFUSALS:
        refusal.check(args, mine)
    if args.recompute_granularity == "selective" and "moe" in (args.recompute_modules or ()):
        raise ConfigError(
            f"{_RECOMPUTE_REFUSED['moe']}: --recompute-modules has moe, {mine}; drop moe from --recompute-modules"
        )
    if not args.num_experts:
        raise ConfigError(
            f"chunks and codec are those of an MoE layer: --num-experts is {args.num_experts}, {mine}; "
            "add --num-experts 8 or drop them"
        )
    _check_sequence_parallel(args)
    _check_codec(args, scmoe)


CODEC_REFUSALS = (
    Refusal(
        "--moe-apply-probs-on-input", "a centroid stands for tokens of many gate weights, which are applied at home"
    ),
)
"""What cannot be combined with --a2a-codec lsh, wherever it is."""


def _check_codec(args: Namespace, scmoe: ScMoEConfig) -> None:
    if not scmoe.compresses:
        return
    if scmoe.lsh_width > args.hidden_size:
        raise ConfigError(
            f"a hash function keeps some of a token's coordinates: --lsh-width is {scmoe.lsh_width} and --hidden-size "
            f"is {args.hidden_size}; use --lsh-width 2"
        )
    if scmoe.lsh_compensation is Compensation.LOWRANK and args.hidden_size % 8:
        raise ConfigError(
            "grouped matrix products want multiples of 8: --lsh-compensation is lowrank and --hidden-size is "
            f"{args.hidden_size}; use --lsh-compensation none"
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
    for refusal in CODEC_REFUSALS:
        refusal.check(args, f"--a2a-codec is {scmoe.a2a_codec}")


def check_megatron_args(args: Namespace, scmoe: ScMoEConfig) -> None:
    """Raise ConfigError for the first Megatron flag in ``args`` that cannot be combined with ``scmoe``."""
    for refusal in REFUSALS:
        refusal.check(args, f"--shortcut is {scmoe.shortcut}")
    for module, reason in _RECOMPUTE_REFUSED.items():
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
    _check_recomputed_blocks(args, scmoe)
    _check_router(args)
    if scmoe.router is Router.LONGCAT:
        _check_longcat_router(args)
    if scmoe.latent_scaling is LatentScaling.LONGCAT:
        _check_latent_scaling(args)
    _check_parallelism(args, scmoe)
    _check_codec(args, scmoe)


def _check_recomputed_blocks(args: Namespace, scmoe: ScMoEConfig) -> None:
    blocks, unit = args.recompute_num_layers, scmoe.moe_every
    if args.recompute_granularity == "full" and args.recompute_method == "block" and (blocks or 0) % unit:
        raise ConfigError(
            "a group is recomputed as a whole, with its last block: --recompute-method is block, "
            f"--recompute-num-layers is {blocks} and --moe-every is {unit}; use --recompute-num-layers "
            f"{blocks // unit * unit + unit}"
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


LONGCAT_REFUSALS = (
    Refusal("--moe-router-score-function", "it is a softmax over all experts", "use softmax", ("softmax",)),
    Refusal("--moe-expert-capacity-factor", "it would count the tokens of zero experts, which need no room"),
    Refusal("--moe-router-num-groups", "zero experts belong to no group"),
    Refusal("--moe-router-fusion", "the fused choice has no bias beside a softmax"),
    Refusal("--moe-enable-routing-replay", "the choice with a bias stands where a replay would"),
    Refusal("--moe-router-force-biased", "it is a benchmark of the stock router"),
)
"""What cannot be combined with --router longcat."""


def _check_longcat_router(args: Namespace) -> None:
    for refusal in LONGCAT_REFUSALS:
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


TWO_GATES_REFUSALS = (
    Refusal("--moe-shared-expert-intermediate-size", "dgmoe has no shared expert"),
    Refusal("--moe-router-topk", "dgmoe's two gates take one expert each", "use --moe-router-topk 2", (2,)),
    Refusal("--moe-router-group-topk", "each of dgmoe's gates takes one expert, which lies in one group anyway"),
    Refusal("--moe-router-fusion", "the fused choice cannot leave out the preceding layer's expert"),
    Refusal("--moe-enable-routing-replay", "the choice that leaves out an expert stands where a replay would"),
    Refusal("--moe-router-force-biased", "it is a benchmark of the stock router"),
    Refusal("--calculate-per-token-loss", "the balance loss counts the tokens of both gates, it would scale twice"),
)
"""What cannot be combined with --shortcut dgmoe."""


def _check_two_gates(args: Namespace) -> None:
    for refusal in TWO_GATES_REFUSALS:
        refusal.check(args, f"--shortcut is {args.shortcut}")
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in _balancing(args):
            raise ConfigError(
                f"{kind} routes all tokens of a gate at once and knows no second choice: --shortcut is dgmoe and "
                f"--moe-router-load-balancing-type is {kind}; use aux_loss, seq_aux_loss or global_aux_loss"
            )


def _check_parallelism(args: Namespace, scmoe: ScMoEConfig) -> None:
    if args.transformer_impl == "local" and args.context_parallel_size > 1:
        raise ConfigError(
            "context parallelism needs Transformer Engine's attention: --context-parallel-size is "
            f"{args.context_parallel_size} and --transformer-impl is local; use --transformer-impl transformer_engine"
        )
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


def check_pipeline(scmoe: ScMoEConfig, config: TransformerConfig) -> None:
    """Raise ConfigError where a (virtual) pipeline stage would hold a part of a group."""
    num_virtual = config.virtual_pipeline_model_parallel_size
    for pp_rank in range(config.pipeline_model_parallel_size):
        for vp_stage in range(num_virtual) if num_virtual else (None,):
            blocks = stages.blocks_of_stage(config, vp_stage, pp_rank)
            unit = scmoe.moe_every * scmoe.moe_share_groups
            if len(blocks) != unit * len({block // unit for block in blocks}):
                virtual = "" if vp_stage is None else f", virtual stage {vp_stage},"
                sharing = f" and --moe-share-groups {scmoe.moe_share_groups}" if scmoe.moe_share_groups > 1 else ""
                raise ConfigError(
                    f"a pipeline stage holds whole groups: stage {pp_rank}{virtual} would hold the blocks {blocks} and "
                    f"--moe-every is {scmoe.moe_every}{sharing}; give every stage whole units of {unit} blocks"
                )
