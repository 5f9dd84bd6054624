"""The seam to Megatron-Core: every private or version-sensitive name that we use, in one place.

Written against megatron-core 0.19.2. When Core changes, this is the file to read first.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.training.checkpointing import _load_base_checkpoint
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from megatron_scmoe.config import ConfigError

SUPPORTED_CORE = ("0.19.2", "0.20")
"""Lowest tested version of megatron-core, and the first one that is refused."""


def check_core_version() -> None:
    """Raise ConfigError where megatron-core is not a version this seam was written for."""
    lowest, refused = SUPPORTED_CORE
    installed = importlib.metadata.version("megatron-core")
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:3] if part.isdigit())
    if not _numbers(lowest) <= numbers < _numbers(refused):
        raise ConfigError(
            f"megatron-core must be >={lowest},<{refused}: {installed} is installed; "
            f"pip install 'megatron-core=={lowest}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def saved_args(args: Namespace) -> Namespace | None:
    """The arguments saved in the checkpoint that ``args`` would load; None where there is no checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on a load that is not happening yet
        state_dict, *_ = _load_base_checkpoint(args.load, args, rank0=True)
    return state_dict.get("args") if state_dict else None


def mend_help(parser: ArgumentParser) -> None:
    """Escape bare percent signs in Megatron's help texts: argparse fails on them, and shows no help at all."""
    for action in parser._actions:
        if action.help:
            action.help = re.sub(r"%(?![%(])", "%%", action.help.replace("%%", "%"))


def uses_torch_optimizers() -> bool:
    """Whether Core has neither Transformer Engine's nor Apex's optimizers to use."""
    return not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))


# --- one block's halves ------------------------------------------------------------------------------------------


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
        packed_seq_params=None,
        sequence_len_offset=inputs.sequence_len_offset,
    )
    bias_dropout_add = layer.self_attn_bda(layer.training, layer.config.bias_dropout_fusion)
    with layer.bias_dropout_add_exec_handler():
        return bias_dropout_add(attention_output, _residual(layer, hidden_states), layer.hidden_dropout)


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


def shared_expert(layer: TransformerLayer, _hidden_states: Tensor, normed: Tensor, _inputs: AttentionInputs) -> Tensor:
    """The output of the shared expert of ``layer`` on ``normed``, gated where Core gates it; no residual yet."""
    return layer.mlp.shared_experts_compute(normed)


def add_mlp_output(
    layer: TransformerLayer, hidden_states: Tensor, output_with_bias: tuple[Tensor, Tensor | None]
) -> Tensor:
    """``hidden_states`` plus the output of an MLP or MoE, with bias and dropout as Core adds them."""
    return layer._forward_post_mlp(output_with_bias, _residual(layer, hidden_states))


def sequence_first(padding_mask: Tensor | None) -> Tensor | None:
    """A padding mask [b, s] in the layout that routers expect, [s, b]; True marks padding."""
    return None if padding_mask is None else padding_mask.transpose(0, 1).bool()


def _residual(layer: TransformerLayer, hidden_states: Tensor) -> Tensor:
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


# --- experts -----------------------------------------------------------------------------------------------------


def let_experts_run_repeatedly(moe: MoELayer) -> None:
    """Let the experts of ``moe`` run several times for one micro-batch, as those of chunks and of two gates do.

    Core tells Transformer Engine which forward is the first of a step (in bf16, of a run), and the backward of that one
    writes weight gradients where all others add to them: of several flights it runs last, so that theirs would be
    lost. Told nothing, it adds (gradients are zeroed at the begin of a step). In fp8 every forward then casts the
    experts' weights anew.
    """
    for module in moe.experts.modules():
        if hasattr(module, "disable_parameter_transpose_cache"):
            module.disable_parameter_transpose_cache = True


# --- one dispatch ------------------------------------------------------------------------------------------------


def dispatcher_for_one_flight(moe: MoELayer, *, keeps_capacity: bool) -> MoEAlltoAllTokenDispatcher:
    """A dispatcher that holds the state of one flight alone.

    Core's writes the state of the current dispatch onto itself (14 attributes), so two dispatches of one layer that fly
    at once would overwrite each other. A shallow copy shares everything that does not change.

    Args:
        moe: the layer whose tokens fly.
        keeps_capacity: whether as many rows as the router padded each expert to travel in this flight.
    """
    dispatcher = copy.copy(moe.token_dispatcher)
    if not keeps_capacity:
        dispatcher.drop_and_pad = False
    return dispatcher


def exchange_counts(dispatcher: MoEAlltoAllTokenDispatcher, routing_map: Tensor, *, travels_topk: bool = True) -> None:
    """Let ``dispatcher`` know what every rank sends.

    Core exchanges the counts where it permutes the tokens. Here that happens before, for all chunks.

    Args:
        dispatcher: of one flight.
        routing_map: which expert gets which token, bool, [n, experts].
        travels_topk: whether every token goes to as many experts as the router chose, unless capacity drops some.
    """
    tokens_per_expert = dispatcher.preprocess(routing_map)
    if not travels_topk:
        # What Core does where capacity drops tokens, with a host sync before it permutes.
        dispatcher.num_out_tokens = routing_map.sum()
        dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
    dispatcher.preprocess = lambda _routing_map: tokens_per_expert


def rows_by_expert(
    dispatcher: MoEAlltoAllTokenDispatcher,
    hidden_states: Tensor,
    routing_map: Tensor,
    probs: Tensor,
    *,
    travels_topk: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokens in the order of their experts, one row for each choice, and their gate weights; nothing is exchanged.

    Args:
        dispatcher: takes note of how to put the rows back in token order.
        hidden_states: [..., h], n tokens.
        routing_map: which expert gets which token, bool, [n, experts].
        probs: gate weights, [n, experts].
        travels_topk: see ``exchange_counts``.
    """
    if travels_topk and dispatcher.config.moe_expert_capacity_factor is None:
        dispatcher.num_out_tokens = routing_map.shape[0] * dispatcher.config.moe_router_topk
    else:
        dispatcher.num_out_tokens = int(routing_map.sum())  # a host sync, which Core has here too where it does not pad
    dispatcher.preprocess = lambda _routing_map: None
    dispatcher.num_global_tokens_per_local_expert = None  # Core copies it to the host, where its preprocess has set it
    rows, weights = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
    del dispatcher.preprocess
    return rows, weights


def exchange_row_counts(dispatcher: MoEAlltoAllTokenDispatcher, rows_per_expert: Tensor, probs: Tensor) -> None:
    """Let ``dispatcher`` know what every rank sends, where that is not its tokens.

    Args:
        dispatcher: of one flight.
        rows_per_expert: what this rank sends to each expert, [experts].
        probs: gate weights; Core sums outputs over tensor-parallel ranks in their dtype.
    """
    dispatcher.probs = probs
    # One row of counts has the column sums of a routing map with that many tokens.
    tokens_per_expert = dispatcher.preprocess(rows_per_expert.unsqueeze(0))
    # Core copies the counts to the host where it permutes tokens, which is done by now.
    dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize("before_permutation_1", tokens_per_expert)


def split_rows(dispatcher: MoEAlltoAllTokenDispatcher) -> tuple[list[int] | None, list[int] | None]:
    """Rows that ``dispatcher`` sends to and receives from each expert-parallel rank; None for equal parts.

    On a GPU this is the one host sync of a dispatch (none where experts are padded to capacity). With a codec, capacity
    or zero experts ask for one more (``rows_by_expert``), as capacity does in Core.
    """
    dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize(
        "before_ep_alltoall", dispatcher.tokens_per_expert
    )
    if dispatcher.input_splits is None:
        return None, None
    return dispatcher.input_splits.tolist(), dispatcher.output_splits.tolist()


def num_rows_to_send(dispatcher: MoEAlltoAllTokenDispatcher) -> int:
    """Rows that this rank sends after ``exchange_row_counts``, those for its own experts included."""
    send_rows, _ = split_rows(dispatcher)
    return sum(_own_counts(dispatcher)) if send_rows is None else sum(send_rows)


BAD_ROWS = -(1 << 40)
"""Counts that a rank with bad rows gives to ``exchange_row_counts``: any sum with counts of others is negative."""


def ranks_with_bad_rows(dispatcher: MoEAlltoAllTokenDispatcher) -> list[str]:
    """Who gave ``exchange_row_counts`` BAD_ROWS and sends to this rank, or to another of its expert-tensor group."""
    _, receive_rows = split_rows(dispatcher)
    bad = _with_negative(dispatcher.ep_group, [min(_own_counts(dispatcher))] if receive_rows is None else receive_rows)
    if dispatcher.tp_size > 1:
        # Of the others in its tensor group this rank knows what they get from all of their expert-parallel peers.
        of_group = _with_negative(dispatcher.tp_group, dispatcher.output_splits_tp.tolist())
        if dispatcher.ep_size == 1:
            return of_group
        mine = str(dist.get_rank())
        bad += [f"{rank} or an expert-parallel peer of it" for rank in of_group if rank != mine]
    return bad


def _with_negative(group: dist.ProcessGroup, counts: list[int]) -> list[str]:
    ranks = dist.get_process_group_ranks(group)
    return [str(rank) for rank, count in zip(ranks, counts, strict=True) if count < 0]


def _own_counts(dispatcher: MoEAlltoAllTokenDispatcher) -> list[int]:
    """Rows of every expert where there is one rank, for whom Core waits later than here: only before the experts."""
    dispatcher.d2h_event.synchronize()
    return dispatcher.tokens_per_expert.tolist()


# --- routers -----------------------------------------------------------------------------------------------------


def let_expert_biases_move(model: torch.nn.Module) -> None:
    """Let Core update the bias of every router of ``model`` at the end of a step, at --moe-router-bias-update-rate.

    Core's configuration refuses this flag beside a softmax, which its own router could not combine with a bias. Behind
    the model's construction the flag means nothing but that biases are updated.
    """
    config: Any = model.config
    config.moe_router_enable_expert_bias = True


# --- pipeline stages ---------------------------------------------------------------------------------------------


def blocks_of_stage(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None = None) -> list[int]:
    """Blocks that a (virtual) pipeline stage holds, counted from 0 over the whole model; ``pp_rank``: default this
    rank.
    """
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank)))


def stage_group() -> dist.ProcessGroup:
    """All ranks of this pipeline stage: tensor, context, expert and data parallel."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def stage_rank() -> int:
    """Which pipeline stage this rank belongs to."""
    return parallel_state.get_pipeline_model_parallel_rank()


def is_stage_root() -> bool:
    """Whether this rank speaks for its pipeline stage."""
    return dist.get_rank() == dist.get_process_group_ranks(stage_group())[0]


def is_last_of_stage() -> bool:
    """Whether this rank is the last one of its pipeline stage."""
    return dist.get_rank() == dist.get_process_group_ranks(stage_group())[-1]


# --- between stages ----------------------------------------------------------------------------------------------


class StageMail:
    """Texts from any rank to one that reads, without waiting: stages of a pipeline must not wait for one another here.

    Args:
        key: names the mail in the store that the process group was made with.
    """

    def __init__(self, key: str) -> None:
        self._store = _get_default_store()
        self._key = key
        self._read = 0

    def send(self, text: str) -> None:
        """Leave a text for the rank that reads."""
        number = self._store.add(f"{self._key}/count", 1)
        self._store.set(f"{self._key}/{number}", text)

    def receive(self) -> list[str]:
        """The texts that have come since the last call; they leave the store, which would grow with every step."""
        first, self._read = self._read + 1, self._store.add(f"{self._key}/count", 0)
        return [self._take(f"{self._key}/{number}") for number in range(first, self._read + 1)]

    def _take(self, key: str) -> str:
        text = self._store.get(key).decode()
        self._store.delete_key(key)
        return text


# --- gradient buckets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBucket:
    """A gradient bucket that ends in padding and has another behind it.

    Attributes:
        place: which bucket of how many, in words.
        numel: elements of its parameters.
        numel_padded: elements that it takes.
        bucket_size: the bucket size at which its buffer would be one bucket; None where it ends because a tied
            embedding, which has a bucket of its own, begins or ends there.
    """

    place: str
    numel: int
    numel_padded: int
    bucket_size: int | None


def padded_buckets(model_chunk: torch.nn.Module) -> list[PaddedBucket]:
    """Buckets of ``model_chunk`` that end in padding and are not the last of their buffer; none if nothing trains."""
    found: list[PaddedBucket] = []
    if not isinstance(model_chunk, DistributedDataParallel):
        return found
    for buffer in model_chunk.buffers + model_chunk.expert_parallel_buffers:
        tied = [any(getattr(param, "shared_embedding", False) for param in bucket.params) for bucket in buffer.buckets]
        for i, bucket in enumerate(buffer.buckets[:-1]):
            numel_padded = bucket.grad_data.numel()
            if bucket.numel_unpadded != numel_padded:
                found.append(
                    PaddedBucket(
                        place=f"bucket {i + 1} of {len(buffer.buckets)}",
                        numel=bucket.numel_unpadded,
                        numel_padded=numel_padded,
                        bucket_size=None if tied[i] or tied[i + 1] else buffer.numel,
                    )
                )
    return found
