"""The truth for hybrid models: layers of a pattern, one by one, as `reference.py` is for blocks; Mamba token by token.

Each layer is a residual op, and the routed experts of an `E` read the normed input of an op before it, one (pos1), two
(pos2) or three (pos3) layers earlier. Nothing of `megatron_scmoe` or Megatron is imported here.

In shapes: s sequence, b batch, h hidden; of Mamba-2 (arXiv 2405.21060) H heads of p values, in g groups, and n values
of state of each: inner = H p. `params` are named as those of a single-rank HybridModel of the local spec.
"""

from collections.abc import Callable
from dataclasses import dataclass

import reference
import torch
import torch.nn.functional as F
from reference import Params, ReferenceConfig
from torch import Tensor

LAYERS_BEFORE = {"pos1": 1, "pos2": 2, "pos3": 3}


@dataclass(frozen=True, kw_only=True)
class PatternConfig(ReferenceConfig):
    """Sizes and choices of a hybrid model; `num_layers` and `moe_every` say no more than how many groups there are."""

    pattern: str
    mamba_heads: int
    mamba_groups: int
    mamba_state: int

    def moe_block(self, group: int) -> str:
        """Prefix of the parameters of the group's `E`."""
        layers = [layer for layer, symbol in enumerate(self.pattern) if symbol == "E"]
        return f"decoder.layers.{layers[group]}."


def mamba(params: Params, prefix: str, hidden: Tensor, cfg: PatternConfig) -> Tensor:
    """A Mamba-2 mixer of hidden [s, b, h]: S <- exp(dt A) S + dt x B^T, y = S C + D x, one token after another."""
    inner = params[prefix + "norm.weight"].shape[0]
    rows = cfg.mamba_groups * cfg.mamba_state
    projected = hidden @ params[prefix + "in_proj.weight"].T
    gate, *xbc, dt = projected.split([inner, inner, rows, rows, cfg.mamba_heads], -1)
    x, to_state, from_state = causal_convolution(params, prefix, torch.cat(xbc, -1)).split([inner, rows, rows], -1)
    x = x.unflatten(-1, (cfg.mamba_heads, -1))
    repeats = cfg.mamba_heads // cfg.mamba_groups  # neighbouring heads have the same B and C
    to_state, from_state = (
        part.unflatten(-1, (cfg.mamba_groups, -1)).repeat_interleave(repeats, dim=2) for part in (to_state, from_state)
    )
    dt = F.softplus(dt + params[prefix + "dt_bias"]).unsqueeze(-1)
    decay = torch.exp(-dt * params[prefix + "A_log"].exp().unsqueeze(-1)).unsqueeze(-1)
    state = torch.zeros(*x.shape[1:], cfg.mamba_state, dtype=x.dtype)
    outputs = []
    for now in range(len(hidden)):
        state = decay[now] * state + (dt[now] * x[now]).unsqueeze(-1) * to_state[now].unsqueeze(-2)
        read = (state * from_state[now].unsqueeze(-2)).sum(-1)
        outputs.append((read + params[prefix + "D"].unsqueeze(-1) * x[now]).flatten(1))
    gated = (torch.stack(outputs) * F.silu(gate)).unflatten(-1, (cfg.mamba_groups, -1))
    normed = gated / torch.sqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
    return normed.flatten(2) * params[prefix + "norm.weight"] @ params[prefix + "out_proj.weight"].T


def causal_convolution(params: Params, prefix: str, x: Tensor) -> Tensor:
    """silu of each channel of x [s, b, c], weighted over the token and those before it."""
    weight = params[prefix + "conv1d_weight"].squeeze(1)  # [c, width], the last one for the token itself
    width = weight.shape[1]
    padded = torch.cat([torch.zeros(width - 1, *x.shape[1:], dtype=x.dtype), x])
    total = sum(padded[tap : tap + len(x)] * weight[:, tap] for tap in range(width))
    return F.silu(total + params[prefix + "conv1d_bias"])


OPS: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    # symbol -> names of its norm and of its module, and what that does
    "M": ("norm.", "mixer.", mamba),
    "*": ("input_layernorm.", "self_attention.", reference.attention),
    "-": ("pre_mlp_layernorm.", "mlp.", reference.feed_forward),
}


def hidden_states(params: Params, hidden: Tensor, cfg: PatternConfig) -> Tensor:
    """All layers on hidden [s, b, h]; those behind the last `E` run like the others."""
    group, read = 0, []
    for layer, symbol in enumerate(cfg.pattern):
        name = f"decoder.layers.{layer}."
        if symbol == "E":
            source = read[-LAYERS_BEFORE[cfg.positions[group]]]
            current = reference.norm(params, name + "pre_mlp_layernorm.", hidden, cfg)
            shared, routed = reference.moe_outputs(params, group, source, current, cfg)
            hidden = hidden + shared + routed
            group, read = group + 1, []
        else:
            norm_name, module, op = OPS[symbol]
            read.append(reference.norm(params, name + norm_name, hidden, cfg))
            hidden = hidden + op(params, name + module, read[-1], cfg)
    return hidden


def loss_and_gradients(
    params: Params, tokens: Tensor, labels: Tensor, cfg: PatternConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token [b, s], and the gradient of its mean by every parameter; zero for an expert without a token."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    hidden = leaves["embedding.word_embeddings.weight"][tokens].transpose(0, 1)
    hidden = reference.norm(leaves, "decoder.final_norm.", hidden_states(leaves, hidden, cfg), cfg)
    logits = (hidden @ leaves["output_layer.weight"].T).transpose(0, 1)
    loss = logits.logsumexp(dim=-1) - logits.gather(-1, labels[..., None])[..., 0]
    gradients = torch.autograd.grad(loss.mean(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))
