"""From Megatron's validated namespace to how a step runs: precision, dispatcher, recomputation, reduction, graphs."""

from __future__ import annotations

from argparse import Namespace

from command_line import UserError

from planning.hardware import Hardware
from planning.workload import Dispatcher, Graphs, Precision, Training

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
    if args.a2a_codec != "none":
        raise UserError(
            f"the model of time sends rows as they are: --a2a-codec is {args.a2a_codec}; drop it, and read what the "
            "page says of fp8 dispatch"
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
        grad_bytes=2 if args.grad_reduce_in_bf16 else 4,
        distributed_optimizer=args.use_distributed_optimizer,
        cuda_graphs=_cuda_graphs(args),
        expert_rows=args.moe_expert_capacity_factor if args.moe_pad_expert_input_to_capacity else 1.0,
    )


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
    if args.recompute_granularity == "selective":
        return frozenset(args.recompute_modules or ()), 1.0
    if args.recompute_granularity != "full":
        return frozenset(), 1.0
    if args.recompute_method != "block":
        return frozenset({"full"}), 1.0
    parts = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    return frozenset({"full"}), min(1.0, args.recompute_num_layers * parts / num_layers)


def _cuda_graphs(args: Namespace) -> Graphs:
    if args.cuda_graph_impl == "none":
        return Graphs.NONE
    of_all = args.cuda_graph_impl == "full_iteration" or not args.cuda_graph_modules
    return Graphs.FULL if of_all else Graphs.PARTIAL
