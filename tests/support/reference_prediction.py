"""The truth of prediction layers (multi-token prediction): the reference's model with the formulas of DeepSeek-V3.

Behind the model, depth k = 1.. of them predicts the token k further on (arXiv 2412.19437, section 2.2):

    h'_i = M [norm_e(Emb(t_{i+k})); norm_h(h^{k-1}_i)],   h^k = norm_out(Block_k(h')),   logits = Out(h^k)
    loss = L_main + factor / D * sum_k mean(L_k)

h^0 is what the output layer reads, embedding and output layer are the model's, and Block is a block of the stock model:
of DGMoE's sizes a top-2 layer without shared expert, of LongCat-Flash's a dense one. A position whose token or label
lies beyond the sequence is left out, where Megatron fills in zeros and masks; attention is causal, so it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import reference
import torch
from reference import Params, ReferenceConfig
from torch import Tensor

FACTOR = 0.1  # Megatron's --mtp-loss-scaling-factor


def prefix(depth: int) -> str:
    """Of the parameters of the layer at ``depth``, from 1."""
    return f"mtp.layers.{depth - 1}."


def block_config(cfg: ReferenceConfig) -> ReferenceConfig:
    """A model of one block, which is that of a prediction layer unless it is dense."""
    dgmoe = cfg.arch == "dgmoe"
    return replace(
        cfg,
        num_layers=1,
        moe_every=1,
        positions=("none",),
        span=1,
        landing=0,
        upstream_norms=False,
        share_groups=1,
        arch="scmoe",
        topk=2 if dgmoe else cfg.topk,
        combine="cg1" if cfg.combine == "cg1" else "add",
        router_biases=(),
        zero_experts=0,
        lsh_columns=(),
        lsh_sketches=(),
    )


def is_dense(cfg: ReferenceConfig) -> bool:
    """LongCat-Flash's prediction layer has no experts."""
    return bool(cfg.router_biases)


def losses(params: Params, tokens: Tensor, labels: Tensor, cfg: ReferenceConfig, depths: int) -> Sequence[Tensor]:
    """Cross entropy per token: the model's [b, s], then of each depth k [b, s - k]."""
    hidden = reference.last_hidden(params, tokens, cfg)
    found = [reference.output_loss(params, hidden, labels, cfg)[0]]
    for depth in range(1, depths + 1):
        hidden = predicted(params, prefix(depth), hidden[:-1], tokens[:, depth:], cfg)
        found.append(reference.output_loss(params, hidden, labels[:, depth:], cfg)[0])
    return found


def predicted(params: Params, name: str, hidden: Tensor, tokens: Tensor, cfg: ReferenceConfig) -> Tensor:
    """One layer: hidden states [s, b, h] and the tokens [b, s] whose successors it predicts -> [s, b, h]."""
    embedded = params["embedding.word_embeddings.weight"][tokens].transpose(0, 1)
    both = [
        reference.norm(params, name + "enorm.", embedded, cfg),
        reference.norm(params, name + "hnorm.", hidden, cfg),
    ]
    mixed = torch.cat(both, dim=-1) @ params[name + "eh_proj.weight"].T
    inner = name + "mtp_model_layer."
    block = {key.replace(inner, "decoder.layers.0."): value for key, value in params.items() if key.startswith(inner)}
    return reference.norm(params, name + "final_layernorm.", run_block(block, mixed, cfg), cfg)


def run_block(params: Params, hidden: Tensor, cfg: ReferenceConfig) -> Tensor:
    """A block of the stock model on hidden [s, b, h]."""
    if not is_dense(cfg):
        return reference.span_forward(params, hidden, block_config(cfg), 0)
    name = "decoder.layers.0."
    normed = reference.norm(params, name + "input_layernorm.", hidden, cfg)
    hidden = hidden + reference.attention(params, name + "self_attention.", normed, cfg)
    normed = reference.norm(params, name + "pre_mlp_layernorm.", hidden, cfg)
    return hidden + reference.feed_forward(params, name + "mlp.", normed, cfg)


def loss_and_gradients(
    params: Params, tokens: Tensor, labels: Tensor, cfg: ReferenceConfig, depths: int
) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
    """``losses``, and the gradient of the whole loss by every parameter."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()}
    main, *further = losses(leaves, tokens, labels, cfg, depths)
    whole = main.mean() + FACTOR / depths * sum(loss.mean() for loss in further)
    gradients = torch.autograd.grad(whole, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return [loss.detach() for loss in (main, *further)], dict(zip(leaves, gradients, strict=True))


def parameter_shapes(cfg: ReferenceConfig, depths: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the prediction layers, as a single-rank GPTModel has them."""
    h, shapes = cfg.hidden_size, {}
    block = {
        name.removeprefix("decoder.layers.0."): shape
        for name, shape in reference.parameter_shapes(block_config(cfg), vocab_size=1, max_sequence_length=1).items()
        if name.startswith("decoder.layers.0.")
    }
    if is_dense(cfg):
        block = {name: shape for name, shape in block.items() if not name.startswith("mlp.")}
        block |= {
            "mlp.linear_fc1.weight": (2 * cfg.ffn_hidden_size, h),
            "mlp.linear_fc2.weight": (h, cfg.ffn_hidden_size),
        }
    for depth in range(1, depths + 1):
        norms = {f"{prefix(depth)}{name}.weight": (h,) for name in ("enorm", "hnorm", "final_layernorm")}
        inner = {f"{prefix(depth)}mtp_model_layer.{name}": shape for name, shape in block.items()}
        shapes |= {**norms, f"{prefix(depth)}eh_proj.weight": (h, 2 * h), **inner}
    return shapes
