"""Shortcut-connected mixture-of-experts models in plain PyTorch (ScMoE and DGMoE, arXiv 2404.05019).

``Block`` shows the whole data flow. Shapes: b batch, s sequence, h hidden, d head, n tokens, e experts, k chosen.
"""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_scmoe import ScMoEConfig

LONGCAT_EPSILON = 1e-6
MAMBA_EPSILON = 1e-5  # of the norm in a Mamba mixer, whatever that of the other norms is
MAMBA_KERNEL, MAMBA_CHUNK = 4, 128
TORN_GROUP = "the blocks of a group run one after another: give a pipeline stage whole groups of blocks"


class Block(GradientCheckpointingLayer):
    """One block: attention, then an MLP or an MoE, whose routed experts may read an earlier tensor of the group.

    A group of two blocks with position pos2::

                                   block 0        |            block 1
        dense stream    attention | MLP           |  attention    shared expert ---------- + -->
        routed experts            | source ------ | ------------> route, experts --------> |

    With ``layer_pattern`` it is one of these alone, or a Mamba layer.

    Args:
        config: of the model.
        index: of the block, counted from 0.
    """

    def __init__(self, config: ScMoEConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = self.self_attn = self.mamba = self.post_attention_layernorm = None
        if mixer := config.mixer(index):
            self.input_layernorm = build_norm(config, config.hidden_size)
        if mixer == "mamba":
            self.mamba = Mamba2Mixer(mamba_config(config), index, initialize_mixer_weights=False)
        elif mixer == "attention":
            attention = LatentAttention if config.attention == "multi_latent" else GroupedQueryAttention
            self.self_attn = attention(config, index)
        self.mlp = self.moe = self.shared_expert = self.shared_expert_gate = self.combine_gate = None
        self.tapped_op = config.tapped_op(index)
        self.has_shortcut = config.shortcut != "none"
        if not config.has_feed_forward(index):
            return
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        if not config.carries_moe(index):
            self.mlp = MLP(config, config.intermediate_size)
        elif not config.borrows_moe(index):
            self.moe = MoE(config)
            if config.shared_expert_intermediate_size:
                # Beside the MoE, since programs that serve add up over ranks whatever is in there with the experts.
                self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
                if config.shortcut_combine == "cg1":
                    self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
                elif config.shortcut_combine == "cg2":
                    self.combine_gate = nn.Linear(config.hidden_size, 2, bias=False)

    def forward(
        self, hidden: Tensor, source: Tensor | None = None, current: Tensor | None = None, **mixer_inputs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the block, or, with ``current``, its MoE alone for a later block that has none of its own.

        Args:
            hidden: [b, s, h].
            source: what the group's routed experts read, [b, s, h], where an earlier block of the group tapped it.
            current: the normed tensor in front of the later block's MoE, [b, s, h].
            mixer_inputs: angles, mask, padding, past_key_values, and what attention functions take beside them.

        Returns:
            The next hidden state; ``source`` for the next block of the group; and ``current`` where the MoE of an
            earlier block has yet to be added. None where there is nothing to hand on.

        Raises:
            ValueError: where the block that taps ``source`` is not run before this one, as in a part of a pipeline.
        """
        if current is not None:
            assert self.moe is not None
            return hidden + self.moe(source, current)[0], None, None
        if self.input_layernorm is not None:
            normed = self.input_layernorm(hidden)
            if self.tapped_op == "mixer":
                source = normed
            hidden = hidden + self._mixed(normed, **mixer_inputs)
        if self.post_attention_layernorm is None:
            return hidden, source, None
        normed = self.post_attention_layernorm(hidden)
        if self.tapped_op == "mlp":
            source = normed
        if self.mlp is not None:
            return hidden + self.mlp(normed), source, None
        if source is None and self.has_shortcut:
            raise ValueError(TORN_GROUP)
        if self.moe is None:
            return hidden, source, normed
        # The shared expert comes first: fused experts may write over what they read.
        shared, share = self._run_shared_expert(normed)
        routed, _ = self.moe(normed if source is None else source, normed)
        if share is not None:
            routed = share * routed
        return hidden + (routed if shared is None else routed + shared), None, None

    def _mixed(
        self, normed: Tensor, padding: Tensor | None = None, past_key_values: Cache | None = None, **inputs: Any
    ) -> Tensor:
        """What attention, or the Mamba mixer, adds to the residual, [b, s, h]."""
        if self.mamba is not None:
            return self.mamba(normed, cache_params=past_key_values, attention_mask=padding)
        assert self.self_attn is not None
        return self.self_attn(normed, past_key_values=past_key_values, **inputs)[0]

    def _run_shared_expert(self, normed: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the shared expert adds to the residual, [b, s, h], and what the routed ones are multiplied by."""
        if self.shared_expert is None:
            return None, None
        shared = self.shared_expert(normed)
        if self.shared_expert_gate is not None:
            return torch.sigmoid(self.shared_expert_gate(normed)) * shared, None
        if self.combine_gate is not None:
            weights = self.combine_gate(normed).softmax(dim=-1, dtype=torch.float32).to(shared.dtype)
            return weights[..., 0:1] * shared, weights[..., 1:2]
        return shared, None


def mamba_config(config: ScMoEConfig) -> SimpleNamespace:
    """The settings of transformers' Mamba-2 mixer."""
    inner = config.mamba_num_heads * config.mamba_head_dim
    return SimpleNamespace(
        hidden_size=config.hidden_size,
        expand=Fraction(inner, config.hidden_size),
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        n_groups=config.mamba_num_groups,
        state_size=config.mamba_state_size,
        conv_kernel=MAMBA_KERNEL,
        use_conv_bias=True,
        use_bias=False,
        hidden_act="silu",
        layer_norm_epsilon=MAMBA_EPSILON,
        time_step_rank=0,
        time_step_limit=(0.0, math.inf),
        time_step_min=1e-3,
        time_step_max=0.1,
        time_step_floor=1e-4,
        chunk_size=MAMBA_CHUNK,
        layer_types=config.layer_types,
    )


def build_norm(config: ScMoEConfig, size: int, eps: float | None = None) -> nn.Module:
    """The norm that ``config`` names, over the last ``size`` channels."""
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps if eps is None else eps)


class MLP(nn.Module):
    """An MLP, or an expert.

    Args:
        config: of the model.
        size: its width.
    """

    def __init__(self, config: ScMoEConfig, size: int) -> None:
        super().__init__()
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        inner = self.up_proj(hidden)
        if self.activation == "swiglu":
            inner = functional.silu(self.gate_proj(hidden)) * inner
        elif self.activation == "squared_relu":
            inner = functional.relu(inner).square()
        else:
            inner = functional.gelu(inner)
        return self.down_proj(inner)


# --- the experts -------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Which experts get a token, and with which weights.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        self.config = config
        num_choices = config.num_experts + config.zero_experts
        self.topk = 1 if config.shortcut == "dgmoe" else config.num_experts_per_tok  # for each of dgmoe's two gates
        self.weight = nn.Parameter(torch.empty(num_choices, config.hidden_size))
        if config.router_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(num_choices, dtype=torch.float32))
        else:
            self.expert_bias = None

    def forward(self, tokens: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [n, k], experts [n, k], logits [n, e] of ``tokens`` [n, h]; ``taken`` [n, 1] is not chosen again."""
        dtype = getattr(torch, self.config.router_dtype) if self.config.router_dtype else tokens.dtype
        logits = functional.linear(tokens.to(dtype), self.weight.to(dtype))
        scores = self._scores(logits)
        preference = scores if self.expert_bias is None else scores + self.expert_bias
        if taken is not None:
            preference = preference.scatter(1, taken, -torch.inf)
        if limit := self.config.router_group_topk:
            preference = self._within_best_groups(preference, limit)
        chosen = preference.topk(self.topk, dim=1).indices
        weights = scores.gather(1, chosen)
        if self._over_chosen:
            weights = weights.softmax(dim=1)
        elif self.config.router_score_function != "softmax" and self.topk > 1:
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
        return (weights * self.config.routed_scaling_factor).to(logits.dtype), chosen, logits

    @property
    def _over_chosen(self) -> bool:
        """Whether the softmax runs over the chosen logits alone."""
        of_all = self.config.router_pre_softmax or self.config.router == "longcat"
        return self.config.router_score_function == "softmax" and not of_all

    def _scores(self, logits: Tensor) -> Tensor:
        if self._over_chosen:
            return logits.float()
        if self.config.router_score_function == "sigmoid":
            return logits.float().sigmoid()
        if self.config.router_score_function == "sqrtsoftplus":
            return functional.softplus(logits.float()).sqrt()
        return logits.softmax(dim=1, dtype=torch.float32)

    def _within_best_groups(self, preference: Tensor, limit: int) -> Tensor:
        """Leave the ``limit`` groups of experts whose best ones, as many as each would give, have the largest sum."""
        grouped = preference.unflatten(1, (self.config.router_num_groups, -1))
        of_group = grouped.topk(self.topk // limit, dim=-1).values.sum(dim=-1)
        best = of_group.topk(limit, dim=1).indices
        left_out = torch.ones_like(of_group, dtype=torch.bool).scatter(1, best, False)
        return grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)


def run_experts(experts: Experts | OtherExperts, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum over the experts ``index`` [n, k] of their output for ``hidden_states`` [n, h], times ``weights`` [n, k]."""
    output = torch.zeros_like(hidden_states)
    if hidden_states.is_meta:  # no values to route by: shapes are all that is asked for
        return output
    counts = weights != 0
    for expert in index[counts].unique().tolist():
        mine, choice = torch.where((index == expert) & counts)
        weighted = experts.get_submodule(str(expert))(hidden_states[mine]) * weights[mine, choice, None]
        output.index_add_(0, mine, weighted.to(output.dtype))
    return output


class Experts(nn.ModuleList):
    """Routed experts as programs that serve models know them: they put fused ones in the place of this list.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``run_experts``."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights)


class OtherExperts(nn.Module):
    """Routed experts with another activation than SwiGLU, which fused ones would compute as if it were SwiGLU.

    No ``ModuleList``, so that programs that serve models leave them as they are.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        for index in range(config.num_experts):
            self.add_module(str(index), MLP(config, config.moe_intermediate_size))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``run_experts``."""
        return run_experts(self, hidden_states, top_k_index, top_k_weights)


class MoE(nn.Module):
    """Router and routed experts.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        self.two_gates = config.shortcut == "dgmoe"
        self.num_experts, self.zero_experts = config.num_experts, config.zero_experts
        self.router = Router(config)
        self.experts = (Experts if config.activation == "swiglu" else OtherExperts)(config)

    def forward(self, source: Tensor, current: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What routed experts give, [b, s, h], and the router's logits, [n, e], of each gate.

        A program that serves would route by itself for an MoE that gives one tensor, and from one input.

        Args:
            source: normed tensor at the shortcut position, [b, s, h].
            current: normed tensor in front of the MoE's place in its block, [b, s, h], which dgmoe's other gate reads.
        """
        run = self._run_two_gates if self.two_gates else self._run_one_gate
        output, logits = run(source.flatten(0, 1), current.flatten(0, 1))
        return output.view_as(source), logits

    def _run_one_gate(self, tokens: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights, chosen, logits = self.router(tokens)
        # Zero experts lie behind the others and give a token back as it is: the others never hear of them. That comes
        # first, since fused experts may write over what they read.
        is_zero = chosen >= self.num_experts
        given_back = tokens * (weights * is_zero).sum(dim=1, keepdim=True) if self.zero_experts else None
        routed = self.experts(tokens, chosen.masked_fill(is_zero, 0), weights.masked_fill(is_zero, 0))
        return routed if given_back is None else routed + given_back.to(routed.dtype), (logits,)

    def _run_two_gates(self, source: Tensor, current: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One expert for each of two tensors [n, h]: two calls, in each of which the other choice weighs nothing."""
        first_weights, first, first_logits = self.router(source)
        second_weights, second, second_logits = self.router(current, taken=first)
        nothing = torch.zeros_like(first_weights)
        chosen = torch.cat((first, second), dim=1)
        of_source = self.experts(source, chosen, torch.cat((first_weights, nothing), dim=1))
        of_current = self.experts(current, chosen, torch.cat((nothing, second_weights), dim=1))
        return of_source + of_current, (first_logits, second_logits)


# --- attention ---------------------------------------------------------------------------------------------------


def rotary_angles(config: ScMoEConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine [b, 1, s, r] of the angles of the r channels that turn, at ``positions`` [b, s]."""
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default":
        size = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        channels = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
        frequencies, factor = 1.0 / parameters["rope_theta"] ** (channels / size), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first r channels of ``heads`` [b, heads, s, d]: channel i with channel i + r/2."""
    cos, sin = angles
    turning, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def rotate_pairs(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """``rotate`` for channels that lie pair by pair, as multi-latent attention has them: 2i with 2i + 1."""
    size = angles[0].shape[-1]
    turning, rest = heads[..., :size], heads[..., size:]
    return rotate(torch.cat((turning[..., 0::2], turning[..., 1::2], rest), dim=-1), angles)


def eager_attention(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention as it is written; the shapes are those of transformers' attention functions."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """What both kinds of attention have in common.

    Args:
        config: of the model.
        index: of the block, for the cache.
        query_size: of a query, which gives the scale.
    """

    is_causal = True

    def __init__(self, config: ScMoEConfig, index: int, query_size: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = index
        self.scaling = config.softmax_scale or query_size**-0.5
        self.num_key_value_groups = 1

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [b, s, heads * d] of query, key and value [b, heads, s, d], and the weights where they are made."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return output.reshape(query.shape[0], query.shape[2], -1), weights  # some give [b * s, heads * d]


class GroupedQueryAttention(Attention):
    """Attention whose key and value heads serve several query heads each.

    Args:
        config: of the model.
        index: of the block.
    """

    def __init__(self, config: ScMoEConfig, index: int) -> None:
        super().__init__(config, index, config.head_dim)
        hidden, bias = config.hidden_size, config.attention_bias
        heads, key_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = heads // key_heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, h] to [b, s, h], and the weights; keys and values join those in ``past_key_values``."""
        projected = (projection(hidden) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        query, key, value = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2), value.transpose(1, 2)
        if self.config.position_embedding == "rope":
            query, key = rotate(query, angles), rotate(key, angles)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, mask, **kwargs)
        return self.o_proj(output), weights


class LatentAttention(Attention):
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); the cache holds latents.

    Args:
        config: of the model.
        index: of the block.
    """

    def __init__(self, config: ScMoEConfig, index: int) -> None:
        kv_rank, still, turning, value_size = config.latent_sizes
        query_size = still + turning
        super().__init__(config, index, query_size)
        hidden, heads, q_rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        if q_rank is None:
            self.q_proj = nn.Linear(hidden, heads * query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
            self.q_a_layernorm = self._latent_norm(q_rank)
            self.q_b_proj = nn.Linear(q_rank, heads * query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, kv_rank + turning, bias=False)
        self.kv_a_layernorm = self._latent_norm(kv_rank)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (still + value_size), bias=False)
        self.o_proj = nn.Linear(heads * value_size, hidden, bias=False)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[b, s, h] to [b, s, h], and the weights; latents and turned keys join those in ``past_key_values``."""
        kv_rank, still, turning, value_size = self.config.latent_sizes
        query = self._query(hidden).unflatten(-1, (-1, still + turning)).transpose(1, 2)
        query_still, query_turning = query.split([still, turning], dim=-1)
        query = torch.cat((query_still, rotate_pairs(query_turning, angles)), dim=-1)

        # One head, [b, 1, s, ...], until keys and values of all heads are made of it.
        latent, key_turning = self.kv_a_proj_with_mqa(hidden).unsqueeze(1).split([kv_rank, turning], dim=-1)
        latent, key_turning = self._scaled(self.kv_a_layernorm(latent)), rotate_pairs(key_turning, angles)
        if past_key_values is not None:
            latent, key_turning = past_key_values.update(latent, key_turning, self.layer_idx)
        key_value = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, still + value_size)).transpose(1, 2)
        key_still, value = key_value.split([still, value_size], dim=-1)
        key = torch.cat((key_still, key_turning.expand(-1, key_still.shape[1], -1, -1)), dim=-1)
        any_size = self.config._attn_implementation in ("eager", "sdpa", "flex_attention")
        if pads := not any_size and value_size < still + turning:
            # Flash attention and the attention of programs that serve want equal sizes.
            value = functional.pad(value, (0, still + turning - value_size))
        output, weights = self._attend(query, key, value, mask, **kwargs)
        if pads:
            output = output.unflatten(-1, (-1, still + turning))[..., :value_size].flatten(2)
        return self.o_proj(output), weights

    def _query(self, hidden: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden)
        return self.q_b_proj(self._scaled(self.q_a_layernorm(self.q_a_proj(hidden))))

    def _latent_norm(self, size: int) -> nn.Module:
        if not self.config.qk_norm:
            return nn.Identity()
        return build_norm(self.config, size, LONGCAT_EPSILON if self.config.latent_scaling == "longcat" else None)

    def _scaled(self, latent: Tensor) -> Tensor:
        if self.config.latent_scaling == "none":
            return latent
        return latent * math.sqrt(self.config.hidden_size / latent.shape[-1])


# --- the model ---------------------------------------------------------------------------------------------------


class ScMoEPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of these models."""

    config_class = ScMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (the name and type are those of transformers, as below)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "attentions": OutputRecorder(Attention, index=1),
        "router_logits": OutputRecorder(Router, index=2),
    }
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, Mamba2Mixer):
            module.init_mamba2_weights()


class ScMoEModel(ScMoEPreTrainedModel):
    """Embedding, groups and the last norm.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        config.check()  # it may have been changed since it was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        if config.router_expert_bias:
            # Biases decide between scores that lie close together, whatever the weights are kept in.
            self._keep_in_fp32_modules_strict = ["expert_bias"]
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding of tokens in the place of this one."""
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the model on ``input_ids`` [b, s] or ``inputs_embeds`` [b, s, h].

        ``hidden_states``, if wanted, are the embedding and the output of every block, the last one behind the norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None and self.config.attends else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        tokens = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        mask = create_causal_mask(**tokens, position_ids=position_ids) if self.config.attends else None
        padding = create_recurrent_attention_mask(**tokens) if "M" in self.config.layer_pattern else None
        hidden = inputs_embeds
        # A pipeline stage has identities in the places of other stages' blocks, and gets hidden states for embeddings.
        if self.config.position_embedding == "learned_absolute" and not isinstance(self.layers[0], nn.Identity):
            hidden = hidden + self.embed_positions(position_ids)
        inputs = {
            "angles": rotary_angles(self.config, position_ids, hidden.dtype),
            "mask": mask,
            "padding": padding,
            "past_key_values": past_key_values,
            **kwargs,
        }
        outputs = [hidden]
        source: Tensor | None = None
        lender: nn.Module | None = None
        for block in self.layers:
            if isinstance(block, nn.Identity):
                continue
            hidden, source, current = block(hidden, source, **inputs)
            if current is not None:
                if lender is None:
                    raise ValueError(TORN_GROUP)
                hidden, source, _ = lender(hidden, source, current)
            elif block.moe is not None:
                lender = block
            outputs.append(hidden)
        hidden = self.norm(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*outputs[:-1], hidden) if output_hidden_states else None,
        )


class ScMoEForCausalLM(ScMoEPreTrainedModel, GenerationMixin):
    """The model with its output layer.

    Args:
        config: of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.model = ScMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = "M" in config.layer_pattern  # a Mamba layer's state cannot be rolled back
        self.post_init()

    def _supports_default_dynamic_cache(self) -> bool:
        # transformers asks the cache that it makes for its length, which one without any attention does not know. The
        # model makes that one.
        return self.config.attends

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [b, s, v], and with ``labels`` [b, s] the mean loss of each next token (-100: does not count)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
