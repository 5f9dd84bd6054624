"""From Megatron's validated namespace to what travels with each row to experts, and how many rows there are."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from command_line import UserError

from megatron_scmoe.config import Codec, ScMoEConfig, expected_unique_share


def of_rows(args: Namespace, scmoe: ScMoEConfig) -> dict[str, Any]:
    """Attributes of a ``workload.Moe`` that say what its rows are.

    Args:
        args: Megatron's namespace, validated.
        scmoe: our settings in it.

    Raises:
        UserError: for choices of which nobody knows to how many ranks they go.
    """
    rounded = {"rounded": frozenset(scmoe.fp8_transfers)} if scmoe.a2a_codec is Codec.FP8 else {}
    if not scmoe.sends_once:
        return rounded
    weights, ids = _beside(args)
    return {**rounded, "once": _once(args, scmoe), "beside": weights + ids, "beside_back": weights}


def _once(args: Namespace, scmoe: ScMoEConfig) -> float:
    """Rows for each that would travel without, where every choice that the router allows is as likely."""
    if words := unknown(args, scmoe):
        raise UserError(f"{words}; plan with --a2a-unique none")
    experts, topk, ep = args.num_experts, args.moe_router_topk, args.expert_model_parallel_size
    if not args.moe_router_group_topk:
        return expected_unique_share(experts, topk, ep, scmoe.zero_experts)
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    return expected_unique_share(experts * chosen // groups, topk, ep * chosen // groups)


def unknown(args: Namespace, scmoe: ScMoEConfig) -> str:
    """Why nobody knows to how many ranks a token goes, in words; empty where it is known."""
    groups, chosen = args.moe_router_num_groups, args.moe_router_group_topk
    ep = args.expert_model_parallel_size
    if not chosen or not (scmoe.zero_experts or ep * chosen % groups):
        return ""
    return (
        f"to how many ranks a token goes is not known where the groups that it chooses are not whole ranks: "
        f"--moe-router-num-groups is {groups}, --moe-router-group-topk {chosen}, --expert-model-parallel-size {ep} and "
        f"--zero-experts {scmoe.zero_experts}"
    )


def _beside(args: Namespace) -> tuple[int, int]:
    """Bytes of a row's gate weights, and of the ids of their experts, as they are packed (``dispatch/unique.py``)."""
    import torch  # noqa: PLC0415 - with a namespace it is there

    from megatron_scmoe.dispatch import payload, unique  # noqa: PLC0415 - imports Megatron

    here = args.num_experts // args.expert_model_parallel_size
    of_row = min(args.moe_router_topk, here)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(args.moe_router_dtype, args.params_dtype)

    def nbytes(its: torch.dtype, number: int) -> int:
        return payload.Column(its, torch.Size([number])).nbytes

    if unique.ids_are_shorter(dtype, of_row, here):
        return nbytes(dtype, of_row), nbytes(torch.int16, of_row)
    return nbytes(dtype, here), 0
