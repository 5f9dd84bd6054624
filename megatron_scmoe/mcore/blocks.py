"""One block of Core in pieces: norms and residual ops, which a group runs one by one; what its MoE has to be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


def attention_norm(layer: TransformerLayer, hidden_states: Tensor) -> Tensor:
    """The normed tensor that the attention of ``layer`` reads, [s, b, h]."""
    return layer.input_layernorm(hidden_states)


def attention_residual(
    layer: TransformerLayer, hidden_states: Tensor, normed: Tensor, inputs: AttentionInputs
) -> Tensor:
    """``hidden_states`` plus the attention of ``layer`` on ``normed``; what Core's ``_forward_attention`` does to it.

    Core has no method that takes the normed tensor, which the routed experts read as well, so this is its attention
    without what a GPT block never has (cross attention) and without what is refused below (offloading, norm recompute).
    """
    attention_output = layer.self_attention(
        normed,
        attention_mask=inputs.attention_mask,
        inference_context=inputs.inference_context,
        rotary_pos_emb=inputs.rotary_pos_emb,
        rotary_pos_cos=inputs.rotary_pos_cos,
        rotary_pos_sin=inputs.rotary_pos_sin,
        rotary_pos_cos_sin=inputs.rotary_pos_cos_sin,
        attention_bias=inputs.attention_bias,
        packed_seq_params=inputs.packed_seq_params,
        sequence_len_offset=inputs.sequence_len_offset,
    )
    bias_dropout_add = layer.self_attn_bda(layer.training, layer.config.bias_dropout_fusion)
    with layer.bias_dropout_add_exec_handler():
        return bias_dropout_add(attention_output, _residual(layer, hidden_states), layer.hidden_dropout)


@contextmanager
def at_core_attention(layer: TransformerLayer, act: Callable[[], None]) -> Iterator[None]:
    """Within the block, call ``act`` once: when the attention of ``layer`` is about to call its core attention.

    Where core attention is recomputed it is called a second time in backward, by when nobody listens.
    """

    def first(*_: Any) -> None:
        listening.remove()
        act()

    listening = layer.self_attention.core_attention.register_forward_pre_hook(first)
    try:
        yield
    finally:
        listening.remove()


def mlp_norm(layer: TransformerLayer, hidden_states: Tensor) -> Tensor:
    """The normed tensor that the MLP, or MoE, of ``layer`` reads, [s, b, h]."""
    return layer.pre_mlp_layernorm(hidden_states)


def mlp_residual(layer: TransformerLayer, hidden_states: Tensor, normed: Tensor, _inputs: AttentionInputs) -> Tensor:
    """``hidden_states`` plus the dense MLP of ``layer`` on ``normed``."""
    if layer.recompute_mlp:
        # The product that Core checkpoints in its ``_forward_mlp``, which would compute the norm a second time.
        output_with_bias = tensor_parallel.checkpoint(layer.mlp, False, normed)
    else:
        output_with_bias = layer.mlp(normed)
    return add_mlp_output(layer, hidden_states, output_with_bias)


def mamba_norm(layer: MambaLayer, hidden_states: Tensor) -> Tensor:
    """The normed tensor that the mixer of ``layer`` reads, [s, b, h]."""
    return layer.norm(hidden_states.to(dtype=layer.config.params_dtype))


def mamba_residual(layer: MambaLayer, hidden_states: Tensor, normed: Tensor, inputs: AttentionInputs) -> Tensor:
    """``hidden_states`` plus the mixer of ``layer`` on ``normed``; what Core's Mamba layer does with it."""
    output_with_bias = layer.mixer(
        normed, inference_context=inputs.inference_context, packed_seq_params=inputs.packed_seq_params
    )
    with layer.bias_dropout_add_exec_handler():
        bias_dropout_add = layer.mamba_bda(training=layer.training, fused=layer.config.bias_dropout_fusion)
        return bias_dropout_add(output_with_bias, _residual(layer, hidden_states), layer.hidden_dropout)


def another_mlp_norm(layer: TransformerLayer) -> torch.nn.Module:
    """A norm with parameters of its own, built as that before the MLP, or MoE, of ``layer``."""
    config = layer.config
    return layer.submodules_config.pre_mlp_layernorm(
        config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
    )


def shared_expert(moe: MoELayer, normed: Tensor) -> Tensor:
    """The output of the shared expert of ``moe`` on ``normed``, gated where Core gates it; no residual yet."""
    return moe.shared_experts_compute(normed)


def width_of_experts(config: TransformerConfig) -> int:
    """Width of what routed experts read and give: latent with --moe-latent-size, else hidden size."""
    return config.moe_latent_size or config.hidden_size


def to_experts(moe: MoELayer, tokens: Tensor) -> Tensor:
    """What the routed experts of ``moe`` read of ``tokens`` [..., h]: their latents, [..., w], or themselves."""
    return moe.fc1_latent_proj(tokens)[0] if moe.config.moe_latent_size else tokens


def from_experts(moe: MoELayer, outputs: Tensor) -> Tensor:
    """Each token's sum over the routed experts of ``moe``, [..., w], as it is added to the stream, [..., h]."""
    return moe.fc2_latent_proj(outputs)[0] if moe.config.moe_latent_size else outputs


def add_mlp_output(
    layer: TransformerLayer, hidden_states: Tensor, output_with_bias: tuple[Tensor, Tensor | None]
) -> Tensor:
    """``hidden_states`` plus the output of an MLP or MoE, with bias and dropout as Core adds them."""
    return layer._forward_post_mlp(output_with_bias, _residual(layer, hidden_states))


def by_sample(tokens: Tensor, packed: PackedSeqParams | None) -> Tensor:
    """Packed samples that lie behind one another, [b s, 1, h], as Core's routers read them, [s, b, h]; others stay.

    Losses and capacities that are of a sequence would else be of all samples of the micro-batch together.
    """
    length = None if packed is None else packed.tokens_per_sample
    if length is None or len(tokens) <= length:
        return tokens
    return tokens.view(-1, length, *tokens.shape[2:]).transpose(0, 1).contiguous()


def as_stream(output: Tensor, hidden_states: Tensor) -> Tensor:
    """``output`` [s, b, h] of what ``by_sample`` gave, in the order of ``hidden_states``, the residual stream."""
    if output.shape == hidden_states.shape:
        return output
    return output.transpose(0, 1).reshape(hidden_states.shape)


def _residual(layer: TransformerLayer | MambaLayer, hidden_states: Tensor) -> Tensor:
    return hidden_states.float() if layer.config.fp32_residual_connection else hidden_states


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """What Core's ``TransformerBlock`` hands to every layer beside the hidden states; None where it has nothing."""

    attention_mask: Tensor | None = None
    rotary_pos_emb: Tensor | None = None
    rotary_pos_cos: Tensor | None = None
    rotary_pos_sin: Tensor | None = None
    rotary_pos_cos_sin: Tensor | None = None
    attention_bias: Tensor | None = None
    inference_context: Any = None
    sequence_len_offset: Tensor | None = None
    packed_seq_params: PackedSeqParams | None = None


def let_experts_run_repeatedly(moe: MoELayer) -> None:
    """Let experts and latent projections of ``moe`` run several times for one micro-batch, as for chunks and two gates.

    Core tells Transformer Engine which forward is the first of a step (in bf16, of a run), and the backward of that one
    writes weight gradients where all others add to them: of several flights it runs last, so that theirs would be
    lost. Told nothing, it adds (gradients are zeroed at the begin of a step). In fp8 every forward then casts the
    experts' weights anew.
    """
    projections = (moe.fc1_latent_proj, moe.fc2_latent_proj) if moe.config.moe_latent_size else ()
    for module in (*moe.experts.modules(), *projections):
        if hasattr(module, "disable_parameter_transpose_cache"):
            module.disable_parameter_transpose_cache = True


def let_expert_biases_move(model: torch.nn.Module) -> None:
    """Let Core update the bias of every router of ``model`` at the end of a step, at --moe-router-bias-update-rate.

    Core's configuration refuses this flag beside a softmax, which its own router could not combine with a bias. Behind
    the model's construction the flag means nothing but that biases are updated.
    """
    config: Any = model.config
    config.moe_router_enable_expert_bias = True


def split_sinks_with_heads(model: torch.nn.Module) -> None:
    """Say of the learnable attention sinks of ``model`` that each tensor-parallel rank has other ones, as of its heads.

    Core 0.19.2 does not, and leaves those of all ranks but the first out of the norm that gradients are clipped by.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".softmax_offset"):
            sinks: Any = parameter
            sinks.tensor_model_parallel, sinks.partition_dim, sinks.partition_stride = True, 0, 1
