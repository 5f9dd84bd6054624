"""Shortcut-connected mixture-of-experts models in plain PyTorch (ScMoE and DGMoE, arXiv 2404.05019).

``run_group`` shows the whole data flow. Shapes: b batch, s sequence, h hidden, d head, n tokens, e experts, k chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_scmoe import ScMoEConfig

# Residual ops of a group that lie behind the tensor which its routed experts read, the shared expert included: pos1
# [attention, shared expert], pos2 [MLP, attention, shared expert], pos3 [attention, MLP, attention, shared expert].
OPS_BEHIND_TAP = {"pos1": 2, "pos2": 3, "pos3": 4}
LONGCAT_EPSILON = 1e-6


# --- the group ---------------------------------------------------------------------------------------------------


def run_group(
    blocks: list[Block], moe: MoE | None, position: str | None, hidden: Tensor, attend: Callable[..., Tensor]
) -> Tensor:
    """Run the blocks of a group on ``hidden`` [b, s, h], the last of which carries ``moe``; returns its output.

    Its residual ops form the dense stream; for two blocks and position pos2::

                              tap                                                          output
        dense stream   attention | MLP ---------- attention -------- shared expert ---------- + -->
        routed experts           | route, experts ------------------------------------------> |

    Args:
        blocks: of the group.
        moe: its own, or that of the group it shares one with; None where the last block has an MLP.
        position: which tensor the routed experts read; None: the one that the shared expert reads.
        hidden: input of the first block.
        attend: ``attend(attention, normed)`` runs one attention.
    """
    dense_stream: list[tuple[nn.Module, Any]] = []
    for block in blocks:
        dense_stream += [(block.input_layernorm, partial(attend, block.self_attn))]
        dense_stream += [(block.post_attention_layernorm, block.mlp)]
    tap = None if position is None else len(dense_stream) - OPS_BEHIND_TAP[position]
    if moe is not None:
        # In the MoE's block the shared expert stands where the MLP would; its residual is added at the end.
        last_norm, _ = dense_stream.pop()

    for index, (norm, op) in enumerate(dense_stream):
        normed = norm(hidden)
        if index == tap:
            source = normed
        hidden = hidden + op(normed)

    if moe is None:
        return hidden
    current = last_norm(hidden)
    if tap is None:
        source = current
    return hidden + moe(source, current)


class Block(nn.Module):
    """Parameters of one block; ``run_group`` runs them.

    Args:
        config: of the model.
        index: of the block, counted from 0.
    """

    def __init__(self, config: ScMoEConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        attention = LatentAttention if config.attention == "multi_latent" else GroupedQueryAttention
        self.self_attn = attention(config, index)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.mlp = None if config.carries_moe(index) else MLP(config, config.intermediate_size)
        self.moe = MoE(config) if config.carries_moe(index) and not config.borrows_moe(index) else None


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

    def forward(self, tokens: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [n, k] and experts [n, k] of ``tokens`` [n, h]; experts ``taken`` [n, 1] are not chosen again."""
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
        return (weights * self.config.routed_scaling_factor).to(logits.dtype), chosen

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


class MoE(nn.Module):
    """Router, routed experts, shared expert, and how they become one.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__()
        self.two_gates = config.shortcut == "dgmoe"
        self.zero_experts = config.zero_experts  # they lie behind the others, and give a token back as it is
        self.router = Router(config)
        self.experts = nn.ModuleList(MLP(config, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.shared_expert = self.shared_expert_gate = self.combine_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config, config.shared_expert_intermediate_size)
            if config.shortcut_combine == "cg1":
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
            elif config.shortcut_combine == "cg2":
                self.combine_gate = nn.Linear(config.hidden_size, 2, bias=False)

    def forward(self, source: Tensor, current: Tensor) -> Tensor:
        """What the MoE adds to the residual, [b, s, h].

        Args:
            source: normed tensor at the shortcut position, [b, s, h].
            current: normed tensor in front of the MoE's place in its block, [b, s, h].
        """
        weights, chosen = self.router(source.flatten(0, 1))
        routed = self._run_experts(source, weights, chosen)
        if self.two_gates:
            weights, chosen = self.router(current.flatten(0, 1), taken=chosen)
            return routed + self._run_experts(current, weights, chosen)
        return routed if self.shared_expert is None else self._combine(current, self.shared_expert(current), routed)

    def _run_experts(self, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sum over the ``chosen`` [n, k] experts of their output, times ``weights`` [n, k]; [b, s, h]."""
        tokens = hidden.flatten(0, 1)
        output = torch.zeros_like(tokens)
        is_zero = chosen >= len(self.experts)
        for index in chosen[~is_zero].unique().tolist():
            mine, choice = torch.where(chosen == index)
            weighted = self.experts[index](tokens[mine]) * weights[mine, choice, None]
            output.index_add_(0, mine, weighted.to(output.dtype))
        if self.zero_experts:
            zero_weights = (weights * is_zero).sum(dim=1, keepdim=True)
            output = output + (tokens * zero_weights).to(output.dtype)
        return output.view_as(hidden)

    def _combine(self, current: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        if self.shared_expert_gate is not None:
            return routed + torch.sigmoid(self.shared_expert_gate(current)) * shared
        if self.combine_gate is not None:
            weights = self.combine_gate(current).softmax(dim=-1, dtype=torch.float32).to(shared.dtype)
            return weights[..., 0:1] * shared + weights[..., 1:2] * routed
        return routed + shared


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

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[b, s, heads * d] of query, key and value [b, heads, s, d]."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return output.flatten(2)


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
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> Tensor:
        """[b, s, h] to [b, s, h]; keys and values join those in ``cache``."""
        projected = (projection(hidden) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projected)
        query, key, value = self.q_norm(query).transpose(1, 2), self.k_norm(key).transpose(1, 2), value.transpose(1, 2)
        if self.config.position_embedding == "rope":
            query, key = rotate(query, angles), rotate(key, angles)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return self.o_proj(self._attend(query, key, value, mask, **kwargs))


class LatentAttention(Attention):
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1); the cache holds latents.

    Args:
        config: of the model.
        index: of the block.
    """

    def __init__(self, config: ScMoEConfig, index: int) -> None:
        query_size = config.qk_nope_head_dim + config.qk_rope_head_dim
        super().__init__(config, index, query_size)
        hidden, heads = config.hidden_size, config.num_attention_heads
        q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank
        if q_rank is None:
            self.q_proj = nn.Linear(hidden, heads * query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, q_rank, bias=False)
            self.q_a_layernorm = self._latent_norm(q_rank)
            self.q_b_proj = nn.Linear(q_rank, heads * query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, kv_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = self._latent_norm(kv_rank)
        self.kv_b_proj = nn.Linear(kv_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> Tensor:
        """[b, s, h] to [b, s, h]; latents and rotary parts of keys join those in ``cache``."""
        config = self.config
        heads, still, turning = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        query = self._query(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        query_still, query_turning = query.split([still, turning], dim=-1)
        query = torch.cat((query_still, rotate_pairs(query_turning, angles)), dim=-1)

        # One head, [b, 1, s, ...], until keys and values of all heads are made of it.
        latent, key_turning = self.kv_a_proj_with_mqa(hidden).unsqueeze(1).split([config.kv_lora_rank, turning], dim=-1)
        latent, key_turning = self._scaled(self.kv_a_layernorm(latent)), rotate_pairs(key_turning, angles)
        if cache is not None:
            latent, key_turning = cache.update(latent, key_turning, self.layer_idx)
        key_value = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (heads, -1)).transpose(1, 2)
        key_still, value = key_value.split([still, config.v_head_dim], dim=-1)
        key = torch.cat((key_still, key_turning.expand(-1, heads, -1, -1)), dim=-1)
        return self.o_proj(self._attend(query, key, value, mask, **kwargs))

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
    _supports_sdpa = True
    # Biases decide between scores that lie close together, whatever the weights are kept in.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 (the name and type are those of transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)


class ScMoEModel(ScMoEPreTrainedModel):
    """Embedding, groups and the last norm.

    Args:
        config: of the model.
    """

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding of tokens in the place of this one."""
        self.embed_tokens = value

    @can_return_tuple
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
    ) -> BaseModelOutputWithPast:
        """Run the model on ``input_ids`` [b, s] or ``inputs_embeds`` [b, s, h].

        ``hidden_states``, if wanted, are the embedding and the output of every group, the last one behind the norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden = inputs_embeds
        if self.config.position_embedding == "learned_absolute":
            hidden = hidden + self.embed_positions(position_ids)
        angles = rotary_angles(self.config, position_ids, hidden.dtype)

        def attend(attention: nn.Module, normed: Tensor) -> Tensor:
            return attention(normed, angles, mask, past_key_values, **kwargs)

        outputs = [hidden]
        moe = None
        for indices, position in self.config.groups():
            blocks = [self.layers[index] for index in indices]
            if not self.config.borrows_moe(indices[-1]):
                moe = blocks[-1].moe
            hidden = run_group(blocks, moe, position, hidden, attend)
            outputs.append(hidden)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*outputs[:-1], hidden) if output_hidden_states else None,
        )


class ScMoEForCausalLM(ScMoEPreTrainedModel, GenerationMixin):
    """The model with its output layer.

    Args:
        config: of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ScMoEConfig) -> None:
        super().__init__(config)
        self.model = ScMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
    ) -> CausalLMOutputWithPast:
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
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
