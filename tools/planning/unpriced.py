"""What of a run the planner predicts as if it were otherwise, and what it has no price for at all."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

from command_line import UserError

from planning.running import fuses_experts

_OFF = (False, None, 0)


class Unpriced(NamedTuple):
    """A flag whose value changes a step's time or memory, where all values have one price.

    Attributes:
        flag: the flag.
        priced: values for which the price is right, the first of which it is.
        name: of the value in Megatron's namespace, where that is another than the flag's.
        only: whether it counts for a run at all.
    """

    flag: str
    priced: tuple[object, ...] = _OFF
    name: str = ""
    only: Callable[[Namespace], object] = lambda _: True

    def found_in(self, args: Namespace) -> str:
        """What to say of ``args``, as "--moe-permute-fusion off (priced: on)"; nothing where the price is right."""
        value = getattr(args, self.name or self.flag.removeprefix("--").replace("-", "_"))
        values = value if isinstance(value, list) else [value]
        if all(one in self.priced for one in values) or not self.only(args):
            return ""
        return f"{self.flag} {self._shown(values)} (priced: {self._shown(self.priced[:1])})"

    def _shown(self, values: Sequence[object]) -> str:
        inverse = self.flag.startswith(("--no-", "--disable-"))
        switch = {True: "off" if inverse else "on", False: "on" if inverse else "off", None: "off"}
        return " ".join(switch[one] if isinstance(one, bool | None) else str(one) for one in values)


def _has_experts(args: Namespace) -> object:
    return args.num_experts


def _has_low_precision(args: Namespace) -> object:
    return args.fp8 or args.fp4


_ON = (True,)
_ROTARY = ("rope", "yarn", "mrope")
UNPRICED = (
    Unpriced("--attention-dropout"),
    Unpriced("--hidden-dropout"),
    Unpriced("--fp32-residual-connection"),
    Unpriced("--qk-layernorm"),
    Unpriced("--qk-l2-norm"),
    Unpriced("--qk-clip"),
    Unpriced("--cross-entropy-loss-fusion", _ON),
    Unpriced("--cross-entropy-fusion-impl", ("native",)),
    Unpriced("--fp16-lm-cross-entropy"),
    Unpriced("--no-masked-softmax-fusion", _ON, "masked_softmax_fusion"),
    Unpriced("--no-bias-gelu-fusion", _ON, "bias_gelu_fusion", lambda args: args.add_bias_linear and not args.swiglu),
    Unpriced("--no-bias-swiglu-fusion", _ON, "bias_swiglu_fusion", lambda args: args.swiglu),
    Unpriced("--no-bias-dropout-fusion", _ON, "bias_dropout_fusion"),
    Unpriced("--no-rope-fusion", _ON, "apply_rope_fusion", lambda args: args.position_embedding_type in _ROTARY),
    Unpriced("--no-persist-layer-norm", _OFF),
    Unpriced("--no-gradient-accumulation-fusion", _ON, "gradient_accumulation_fusion"),
    Unpriced("--disable-jit-fuser"),
    Unpriced("--fused-residual-rmsnorm"),
    Unpriced("--use-fused-weighted-squared-relu"),
    Unpriced("--use-te-activation-func"),
    Unpriced("--mla-down-proj-fusion"),
    Unpriced("--cache-mla-latents"),
    Unpriced("--use-kitchen-attention"),
    Unpriced("--deterministic-mode"),
    Unpriced("--batch-invariant-mode"),
    Unpriced("--disable-mamba-mem-eff-path", _ON, "use_mamba_mem_eff_path"),
    Unpriced("--mamba-training-ssm-states-dtype"),
    Unpriced("--mlp-chunks-for-training", (1,)),
    Unpriced("--transformer-impl", ("transformer_engine",)),  # of the local one attention alone is priced
    Unpriced("--mtp-use-repeated-layer"),
    Unpriced("--shortcut-norms", ("none",)),
    Unpriced("--moe-grouped-gemm", _ON, only=_has_experts),
    Unpriced("--moe-permute-fusion", _ON, only=_has_experts),
    Unpriced("--moe-router-fusion", only=_has_experts),
    Unpriced("--use-transformer-engine-op-fuser", only=lambda args: not fuses_experts(args)),
    Unpriced("--moe-permute-fusion-into-hybridep"),
    Unpriced("--moe-shared-expert-overlap"),
    Unpriced("--moe-expert-rank-capacity-factor"),
    Unpriced("--moe-router-padding-for-quantization"),
    Unpriced("--moe-router-padding-for-fp8"),
    Unpriced("--use-grouped-gemm-for-shared-expert"),
    Unpriced("--use-grouped-gemm-for-dense-mlp"),
    Unpriced("--moe-flex-dispatcher-num-sms"),
    Unpriced("--moe-deepep-num-sms"),
    Unpriced("--moe-hybridep-num-sms"),
    Unpriced("--moe-hybridep-num-blocks-permute"),
    Unpriced("--moe-hybridep-num-blocks-unpermute"),
    Unpriced("--moe-hybridep-num-sms-preprocessing", (108,)),
    Unpriced("--delay-wgrad-compute"),
    Unpriced("--overlap-dispatch-backward-with-experts-wgrad"),
    Unpriced("--first-last-layers-bf16", only=_has_low_precision),
    Unpriced("--fp8-output-proj", only=_has_low_precision),
    Unpriced("--no-fp8-wgrad", _ON, "fp8_wgrad", _has_low_precision),
    Unpriced("--fp8-quantizer-factory"),
    Unpriced("--fp4-quantizer-factory"),
    Unpriced("--te-precision-config-file"),
    Unpriced("--reuse-grad-buf-for-mxfp8-param-ag"),
    Unpriced("--cp-comm-type", ("p2p",), only=lambda args: args.context_parallel_size > 1),
    Unpriced("--hierarchical-context-parallel-sizes"),
    Unpriced("--tp-comm-overlap"),
    Unpriced("--symmetric-ar-type"),
    Unpriced(
        "--tensor-parallel-num-weight-shards",
        (None, 1),
        only=lambda args: args.tensor_parallel_num_weight_shards > args.tensor_model_parallel_size,
    ),
    Unpriced(
        "--expert-tensor-parallel-num-weight-shards",
        (None, 1),
        only=lambda args: args.expert_tensor_parallel_num_weight_shards > args.expert_tensor_parallel_size,
    ),
    Unpriced("--use-tp-pp-dp-mapping"),
    Unpriced("--pipeline-model-parallel-comm-backend", (None, "nccl")),
    Unpriced("--use-ring-exchange-p2p"),
    Unpriced(
        "--no-overlap-p2p-communication",
        _ON,
        "overlap_p2p_comm",
        lambda args: args.virtual_pipeline_model_parallel_size,
    ),
    Unpriced("--overlap-p2p-communication-warmup-flush", name="overlap_p2p_comm_warmup_flush"),
    Unpriced("--defer-embedding-wgrad-compute"),
    Unpriced("--ddp-num-buckets"),
    Unpriced("--ddp-bucket-size"),
    Unpriced("--ddp-pad-buckets-for-high-nccl-busbw"),
    Unpriced("--ddp-reduce-scatter-with-fp32-accumulation"),
    Unpriced("--ddp-param-name-patterns-for-fp32-local-accumulation"),
    Unpriced("--overlap-param-gather-with-optimizer-step"),
    Unpriced("--num-distributed-optimizer-instances", (1,)),
    Unpriced("--use-nccl-ub", name="nccl_ub"),
    Unpriced("--disable-symmetric-registration"),
    Unpriced("--use-sharp"),
    Unpriced("--high-priority-stream-groups"),
    Unpriced("--optimizer-cuda-graph"),
    Unpriced("--distribute-saved-activations"),
    Unpriced("--cpu-offloading-num-layers"),
    Unpriced("--fine-grained-activation-offloading"),
    Unpriced("--moe-paged-stash"),
    Unpriced("--empty-unused-memory-level"),
    Unpriced("--step-batch-size-schedule"),
    Unpriced("--reset-attention-mask"),
    Unpriced("--dataloader-inter-document-masking"),
    Unpriced("--sft"),
    Unpriced("--profile"),
)
"""What is predicted, and counted of memory, as if it were otherwise."""


class Refused(NamedTuple):
    """A flag for which there is no price at all.

    Attributes:
        flag: the flag.
        reason: why not.
        values: that are refused; none: all.
    """

    flag: str
    reason: str
    values: tuple[str, ...] = ()


REFUSED = (
    Refused("--use-megatron-fsdp", "there is no price for parameters that ranks fetch layer by layer"),
    Refused("--use-torch-fsdp2", "there is no price for parameters that ranks fetch layer by layer"),
    Refused("--experimental-attention-variant", "there is no price for attention of other kinds"),
    Refused("--linear-attention-freq", "there is no price for attention of other kinds"),
    Refused("--heterogeneous-layers-config-path", "layers have one size each here"),
    Refused("--heterogeneous-layers-config-encoded-json", "layers have one size each here"),
    Refused("--attention-backend", "Core 0.19.2 builds no model with it; use unfused", ("local",)),
)
"""What a plan refuses before any dry run."""


def refuse(flags: Sequence[str]) -> None:
    """Raise UserError for the first of ``flags`` that no plan has a price for."""
    for one in REFUSED:
        for place, word in enumerate(flags):
            value = flags[place + 1] if place + 1 < len(flags) else ""
            if word == one.flag and (not one.values or value in one.values):
                given = f" {value}" if one.values else ""
                raise UserError(f"{one.reason}: {one.flag}{given} is given; drop it")
