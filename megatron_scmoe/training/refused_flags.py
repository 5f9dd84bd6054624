"""Megatron's flags that would bypass a group, break it, or be ignored by it, in tables that docs/refused.md has too."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from megatron_scmoe.config import ConfigError


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
_TRACES_STOCK_ROUTER = "Core's tracer writes what the stock router returns, and nothing of another"

RECOMPUTE_REFUSED = {
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
    Refusal("--moe-use-upcycling", "it writes stock MoE layers"),
    Refusal("--moe-layer-recompute", RECOMPUTE_REFUSED["moe"]),
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
    Refusal("--use-megatron-fsdp", "each chunk would overwrite the gradients that an expert has from the others"),
    Refusal("--expert-tensor-parallel-num-weight-shards", _REDUCES_ONCE),
    Refusal("--moe-layer-recompute", RECOMPUTE_REFUSED["moe"]),
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
"""What the stock MoE layer cannot go with where its tokens travel in chunks, once for a rank, or compressed."""

HOOK_REFUSALS = (
    Refusal("--fim-data", "the dataset hook builds plain GPT datasets"),
    Refusal("--hybrid-context-parallel", "the batch hook gives all sequences to the same number of ranks"),
    Refusal("--perform-rl-step", "the forward hook computes a language-model loss"),
    Refusal("--hybrid-override-pattern", "Core calls it deprecated", "use --hybrid-layer-pattern"),
    Refusal("--mtp-hybrid-override-pattern", "Core calls it deprecated", "use --hybrid-layer-pattern"),
    Refusal("--is-hybrid-model", "a pattern says so", "use --hybrid-layer-pattern"),
    Refusal(
        "--position-embedding-type",
        "Core's GPT has no relative positions, and would train without any",
        "use rope",
        ("learned_absolute", "rope", "yarn", "mrope", "none"),
    ),
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

CODEC_REFUSALS = (
    Refusal(
        "--moe-apply-probs-on-input", "a centroid stands for tokens of many gate weights, which are applied at home"
    ),
)
"""What cannot be combined with --a2a-codec lsh, wherever it is."""

LONGCAT_REFUSALS = (
    Refusal("--moe-router-score-function", "it is a softmax over all experts", "use softmax", ("softmax",)),
    Refusal("--moe-expert-capacity-factor", "it would count the tokens of zero experts, which need no room"),
    Refusal("--moe-router-num-groups", "zero experts belong to no group"),
    Refusal("--moe-router-fusion", "the fused choice has no bias beside a softmax"),
    Refusal("--moe-enable-routing-replay", "the choice with a bias stands where a replay would"),
    Refusal("--moe-router-force-biased", "it is a benchmark of the stock router"),
    Refusal("--moe-routing-trace-path", _TRACES_STOCK_ROUTER),
)
"""What cannot be combined with --router longcat."""

TWO_GATES_REFUSALS = (
    Refusal("--moe-shared-expert-intermediate-size", "dgmoe has no shared expert"),
    Refusal("--moe-router-topk", "dgmoe's two gates take one expert each", "use --moe-router-topk 2", (2,)),
    Refusal("--moe-router-group-topk", "each of dgmoe's gates takes one expert, which lies in one group anyway"),
    Refusal("--moe-router-fusion", "the fused choice cannot leave out the preceding layer's expert"),
    Refusal("--moe-enable-routing-replay", "the choice that leaves out an expert stands where a replay would"),
    Refusal("--moe-router-force-biased", "it is a benchmark of the stock router"),
    Refusal("--moe-routing-trace-path", _TRACES_STOCK_ROUTER),
    Refusal("--calculate-per-token-loss", "the balance loss counts the tokens of both gates, it would scale twice"),
)
"""What cannot be combined with --shortcut dgmoe."""
