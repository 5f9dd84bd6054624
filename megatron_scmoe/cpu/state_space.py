"""Mamba's scan in plain torch: what stands in for mamba_ssm's kernels where there is no CUDA.

Core's MambaMixer trains with two functions and a norm of that package. What stands for them here takes what Core gives
them. Each token changes the state of every head, S <- exp(dt A) S + dt x B^T, and reads y = S C + D x from it. Token by
token that would be a long Python loop; so, as in the Mamba-2 paper (arXiv 2405.21060, section 6), tokens of a chunk see
one another as in attention, weighted by what has decayed in between, and what lies before the chunk through its state.

In shapes: b batch, l tokens, h heads, g groups, r = h / g heads of a group, p values of a head, n values of a state's
row, c channels of the convolution: p h + 2 n g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

NO_PACKING = "cpu_backend: packed sequences in a Mamba layer need mamba_ssm's kernels; leave packing out"


def split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    *,
    D: Tensor,
    ngroups: int,
    chunk_size: int,
    seq_idx: Tensor | None,
    state_dtype: torch.dtype | None,
    activation: str,
    headdim: int | None,
    norm_before_gate: bool,
) -> Tensor:
    """All of a Mamba layer between its two projections, but for the norm. It keeps for backward no more than its input.

    Args:
        zxbcdt: what the first projection returns, [b, l, p h + c + h].
        conv1d_weight: [c, width].
        conv1d_bias: [c].
        dt_bias: added to the step sizes before softplus, [h].
        A: below 0, [h].
        D: skip connection, [h] or [h, p].
        ngroups: heads of a group read and write with the same B and C.
        chunk_size: tokens that see one another directly.
        seq_idx: of packed sequences, which are refused.
        state_dtype: states of earlier chunks are rounded to it where they are read; None: the dtype of ``zxbcdt``.
        activation: silu, as Core has it.
        headdim: p, which the shapes tell.
        norm_before_gate: of a norm that Core does not ask for here.

    Returns:
        [b, l, p h], gated with silu(z).
    """
    if seq_idx is not None:
        raise RuntimeError(NO_PACKING)
    scan = partial(_conv1d_and_scan, ngroups=ngroups, chunk_size=chunk_size, state_dtype=state_dtype)
    return _Recomputed.apply(scan, zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D)


def chunk_scan_combined(  # noqa: PLR0917 - so Core gives them
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_softplus: bool = True,
    initial_states: None = None,
    return_final_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan alone, in fp32 or above.

    Args:
        x: [b, l, h, p].
        dt: step sizes before bias and softplus, [b, l, h].
        A: below 0, [h].
        B: what of x is written into which row of the state, [b, l, g, n].
        C: what of the state is read, [b, l, g, n].
        chunk_size: tokens that see one another directly.
        D: skip connection, [h] or [h, p].
        z: gate, [b, l, h, p], or None.
        dt_bias: [h].
        dt_softplus: True, as Core has it.
        initial_states: None, as Core has it: zeros before the first token.
        return_final_states: also return the states behind the last token, [b, h, p, n].
        state_dtype: states of earlier chunks are rounded to it where they are read; None: the dtype of ``x``.

    Returns:
        [b, l, h, p], in the dtype of ``x``.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, A, B, C, D = (tensor.to(wide) for tensor in (x, A, B, C, D))
    dt = F.softplus(dt.to(wide) + dt_bias.to(wide))
    y, state = _scan(x, dt, A, B, C, chunk_size=chunk_size, state_dtype=state_dtype or dtype)
    y = y + D.view(len(A), -1) * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(dtype)
    return (y, state) if return_final_states else y


def _conv1d_and_scan(  # noqa: PLR0917 - those that have gradients
    zxbcdt: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, *, ngroups: int, **scan: Any
) -> Tensor:
    heads, channels = len(A), len(weight)
    inner = zxbcdt.shape[-1] - channels - heads
    z, xbc, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    rows = (channels - inner) // 2
    x, B, C = _causal_conv1d(xbc, weight, bias).split([inner, rows, rows], dim=-1)
    x, z = (tensor.unflatten(-1, (heads, -1)) for tensor in (x, z))
    B, C = (tensor.unflatten(-1, (ngroups, -1)) for tensor in (B, C))
    y = chunk_scan_combined(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, **scan)
    assert isinstance(y, Tensor)
    return y.flatten(2)


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel over the token and those before it, then silu; x [b, l, c], weight [c, width]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    channels, width = weight.shape
    padded = F.pad(x.to(wide).mT, (width - 1, 0))
    y = F.conv1d(padded, weight.to(wide).unsqueeze(1), bias.to(wide), groups=channels)
    return F.silu(y).mT.to(x.dtype)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Without skip connection and gate: y like x, and the states behind the last token, [b, h, p, n]."""
    ngroups = B.shape[2]

    def by_group(tensor: Tensor) -> Tensor:  # [b, l, h, ...] to [b, g, r, l, ...]
        return tensor.movedim(1, 2).unflatten(1, (ngroups, -1))

    x, dt, A, B, C = by_group(x), by_group(dt), A.view(ngroups, -1, 1), B.movedim(1, 2), C.movedim(1, 2)
    state = x.new_zeros(*x.shape[:3], x.shape[-1], B.shape[-1])
    chunks = (tensor.split(chunk_size, dim) for tensor, dim in ((x * dt.unsqueeze(-1), 3), (dt * A, 3), (B, 2), (C, 2)))
    outputs = []
    for chunk in zip(*chunks, strict=True):
        y, state = _scan_chunk(*chunk, state=state, state_dtype=state_dtype)
        outputs.append(y)
    return torch.cat(outputs, dim=3).flatten(1, 2).movedim(1, 2), state.flatten(1, 2)


def _scan_chunk(
    dt_x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, *, state: Tensor, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a chunk reads, and the state behind it, [b, g, r, p, n], from that before it.

    Shapes [b, g, r, l, p] and [b, g, r, l] of dt x and dt A, [b, g, l, n] of B and C.
    """
    B, C = B.unsqueeze(2), C.unsqueeze(2)
    tokens = log_decay.shape[-1]
    # [later, earlier]: decay from one token to another; sums of their own, since differences of sums lose digits.
    between = log_decay.unsqueeze(-1).expand(*log_decay.shape, tokens).tril(-1).cumsum(-2).exp().tril()
    y = (C @ B.mT * between) @ dt_x
    y = y + log_decay.cumsum(-1).exp().unsqueeze(-1) * (C @ state.to(state_dtype).to(C.dtype).mT)
    written = (dt_x * between[..., -1, :, None]).mT @ B
    return y, state * log_decay.sum(-1).exp()[..., None, None] + written


class _Recomputed(torch.autograd.Function):
    """A function whose backward computes it once more, as that of the kernels does."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        found = iter(torch.autograd.grad(output, [tensor for tensor in inputs if tensor.requires_grad], gradients))
        return (None, *(next(found) if need else None for need in needed))


class GatedRMSNorm(torch.nn.Module):
    """RMSNorm of each group of values, behind a gate where one is given; Core's ``ExtendedRMSNorm``.

    Args:
        hidden_size: values of this tensor-parallel rank, [p h].
        eps: added to the mean square.
        group_size: values that are normed together.
        norm_before_gate: False, as Core asserts.
        device: of the weight.
        dtype: of the weight.
    """

    tp_group: torch.distributed.ProcessGroup
    """Whose ranks each have a part of the values; Core sets it."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x`` and the gate ``z``, [..., p h] each."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide) if z is None else x.to(wide) * F.silu(z.to(wide))
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps).flatten(-2)
        return (y * self.weight.to(wide)).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Core's: the weight is split over tensor-parallel ranks."""
        from megatron.core.transformer.utils import (  # noqa: PLC0415 - importing this module imports no Megatron
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
        )

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
