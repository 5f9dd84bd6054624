"""From Megatron's validated namespace to how a step runs: precision, dispatcher, recomputation, reduction, graphs."""

from __future__ import annotations

from argparse import Namespace

from command_line import UserError

from planning.hardware import Hardware
from planning.passes import RECOMPUTED
from planning.training import Dispatcher, Graphs, Precision, Training

_FP8 = {
    "tensorwise": Precision.FP8,
    "delayed": Precision.FP8,
    "blockwise": Precision.FP8_BLOCKWISE,
    "mxfp8": Precision.MXFP8,
}
_FLEX = {"deepep": Dispatcher.DEEPEP, "hybridep": Dispatcher.HYBRIDEP}


def training(args: Namespace, num_layers: int) -> Training:
    """How the steps of a run are done.

    Args:
        args: Megatron's namespace, validated.
        num_layers: of the whole model.

    Raises:
        UserError: for what the model of time has no price for.
    """
    if not (args.bf16 or args.fp16):
        raise UserError(
            "the model of time multiplies in 16 bits or fewer: neither --bf16 nor --fp16 is set; add --bf16"
        )
    recompute, part = _recompute(args, num_layers)
    return Training(
        precision=_precision(args),
        dispatcher=_dispatcher(args),
        recompute=recompute,
        recomputed_layers=part,
        overlap_moe=args.overlap_moe_expert_parallel_comm,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        param_bytes=1 if args.fp8_param_gather or args.fp4_param_gather else 2,
        fused_experts=fuses_experts(args),
        grad_bytes=2 if args.grad_reduce_in_bf16 else 4,
        update_bytes=_update_bytes(args),
        sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer,
        cuda_graphs=_cuda_graphs(args),
        expert_rows=args.moe_expert_capacity_factor if args.moe_pad_expert_input_to_capacity else 1.0,
    )


def fuses_experts(args: Namespace) -> bool:
    """Whether a rank's experts are one kernel for each product, as Transformer Engine's op fuser makes them in MXFP8.

    It does so where NVTE_CUTEDSL_FUSED_GROUPED_MLP is 1 (Core 0.19.2, transformer/moe/experts.py).
    """
    grouped = args.use_transformer_engine_op_fuser and args.moe_grouped_gemm
    return bool(grouped and args.fp8 and args.fp8_recipe == "mxfp8")


def _update_bytes(args: Namespace) -> int:
    """What the optimizer moves for a parameter (``Training.update_bytes``), by what it keeps (the dry run's count)."""
    from megatron_scmoe.dry_run.memory import optimizer_bytes_per_parameter  # noqa: PLC0415 - imports Megatron

    kept, gradient, written = optimizer_bytes_per_parameter(args), 4, 2
    if args.use_precision_aware_optimizer:
        gradient = args.main_grads_dtype.itemsize
        if args.bf16 and args.main_params_dtype.itemsize == 4:
            kept += written  # a parameter is read and written as bf16 and the bits that this lacks
            written = 0
    return 2 * gradient + 2 * kept + written


def _precision(args: Namespace) -> Precision:
    if args.fp4:
        return Precision.NVFP4
    if not args.fp8:
        return Precision.BF16
    if args.fp8_recipe not in _FP8:
        raise UserError(
            f"the model of time knows the recipes {', '.join(_FP8)}: --fp8-recipe is {args.fp8_recipe}; use one of them"
        )
    return _FP8[args.fp8_recipe]


def check_precision(args: Namespace, hardware: Hardware) -> None:
    """Raise UserError for a precision that ``hardware`` has no matrix units for: the table gives it the next wider's.

    MXFP8 came with the GPUs that have fp4 (Transformer Engine: compute capability 10.0).
    """
    precision = _precision(args)
    has_fp8, has_fp4 = hardware.fp8 > hardware.bf16, hardware.fp4 > hardware.fp8
    if precision is Precision.BF16 or (has_fp4 if precision in (Precision.NVFP4, Precision.MXFP8) else has_fp8):
        return
    flag = "--fp4-format" if precision is Precision.NVFP4 else "--fp8-format"
    raise UserError(
        f"{hardware.name} multiplies in no {precision} (bf16, fp8 and fp4 at {hardware.bf16 / 1e12:.0f}, "
        f"{hardware.fp8 / 1e12:.0f} and {hardware.fp4 / 1e12:.0f} TFLOP/s): drop {flag}, or plan for another GPU"
    )


def _dispatcher(args: Namespace) -> Dispatcher:
    if args.moe_token_dispatcher_type == "alltoall" or not args.num_experts:
        return Dispatcher.ALLTOALL
    backend = getattr(args, "moe_flex_dispatcher_backend", None)
    if args.moe_token_dispatcher_type == "flex" and backend in _FLEX:
        return _FLEX[backend]
    raise UserError(
        "the model of time knows the all-to-all, DeepEP and HybridEP: --moe-token-dispatcher-type is "
        f"{args.moe_token_dispatcher_type}; use --moe-token-dispatcher-type alltoall"
    )


def _recompute(args: Namespace, num_layers: int) -> tuple[frozenset[str], float]:
    if args.recompute_granularity == "full":
        if args.recompute_method != "block":
            return frozenset({"full"}), 1.0
        parts = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
        return frozenset({"full"}), min(1.0, args.recompute_num_layers * parts / num_layers)
    modules = {"moe"} if args.moe_layer_recompute else set()
    if args.recompute_granularity == "selective":  # Core takes core_attn where no modules are named
        modules |= set(["core_attn"] if args.recompute_modules is None else args.recompute_modules)
    if unknown := modules - RECOMPUTED:
        raise UserError(
            f"the model of time knows no recomputation of {min(unknown)}: --recompute-modules has it; use some of "
            f"{', '.join(sorted(RECOMPUTED))}"
        )
    return frozenset(modules), 1.0


def _cuda_graphs(args: Namespace) -> Graphs:
    if args.cuda_graph_impl == "none":
        return Graphs.NONE
    of_all = args.cuda_graph_impl == "full_iteration" or not args.cuda_graph_modules
    return Graphs.FULL if of_all else Graphs.PARTIAL
