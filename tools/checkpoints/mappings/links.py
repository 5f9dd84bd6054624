"""Which tensors of this plugin's checkpoints and of a Hugging Face folder hold the same numbers.

Folders are those of ``hf_scmoe``, whose dense models have the names of Llama's. The same links make pieces in both
directions.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from checkpoints.mappings.layers import (
    Layer,
    carries_moe,
    layers_of,
    owns_moe,
    parts_of,
    pattern_of,
    prediction_models,
)
from checkpoints.mappings.mamba import mixer_rows
from checkpoints.mappings.megatron_settings import complete
from checkpoints.mappings.norms import norm_names
from checkpoints.mappings.scmoe_settings import has_residual_maps
from checkpoints.plan import Piece, Read, as_it_is
from checkpoints.tensors import CheckpointError, TensorInfo

Shape = tuple[int, ...]


def _alone(rows: Tensor) -> Sequence[Tensor]:
    return (rows,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Rows of a tensor of ours, and the tensors of a Hugging Face folder that hold the same numbers.

    Attributes:
        ours: name of our tensor.
        shape: of the whole of it.
        theirs: names and shapes of their tensors.
        row: the first row of ours; only that of joined projections and experts is not 0.
        rows: how many; None for all.
        their_row: the first row of theirs, where ours is a part of a single tensor of theirs; None for all of it.
        split: makes their tensors of our rows.
        join: makes our rows of their tensors.
    """

    ours: str
    shape: Shape
    theirs: tuple[tuple[str, Shape], ...]
    row: int = 0
    rows: int | None = None
    their_row: int | None = None
    split: Callable[[Tensor], Sequence[Tensor]] = _alone
    join: Callable[..., Tensor] = as_it_is

    @property
    def num_rows(self) -> int:
        """Rows of ours."""
        return self.shape[0] if self.rows is None else self.rows

    def reads(self) -> tuple[Read, ...]:
        """What of theirs makes our rows."""
        if self.their_row is None:
            return tuple(Read(name) for name, _ in self.theirs)
        ((name, _),) = self.theirs
        return (Read(name, self.their_row, self.their_row + self.num_rows),)


def links(args: Namespace) -> Iterator[Link]:
    """Every tensor of the model that ``args``, ``complete``, describe, block by block; its prediction layers too."""
    vocab = (args.padded_vocab_size, args.hidden_size)
    yield _same("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab)
    if args.position_embedding_type == "learned_absolute":
        positions = (args.max_position_embeddings, args.hidden_size)
        yield _same("embedding.position_embeddings.weight", "model.embed_positions.weight", positions)
    for layer in layers_of(args):
        yield from _layer(layer)
    for depth in range(len(prediction_models(args))):
        yield from _around_prediction(args, f"mtp.layers.{depth}.", f"model.mtp.layers.{depth}.")
    final = "decoder.final_norm." if pattern_of(args) else "decoder.final_layernorm."
    yield from _norm(args, final, "model.norm.", args.hidden_size)
    if args.untie_embeddings_and_output_weights:
        yield _same("output_layer.weight", "lm_head.weight", vocab)


type Infos = Mapping[str, TensorInfo]


def megatron_pieces(found: Infos, all_links: Iterable[Link]) -> tuple[list[Piece], dict[str, TensorInfo]]:
    """Pieces of a Megatron checkpoint, and all tensors that it should have.

    Tensors ``found`` in the Hugging Face folder in another shape than its configuration says are refused.
    """
    pieces: list[Piece] = []
    expected: dict[str, TensorInfo] = {}
    for link in all_links:
        for name, shape in link.theirs:
            _check_shape(found, name, shape, "config.json says", "the folder is damaged, or of another model")
        names = [name for name, _ in link.theirs]
        info = expected[link.ours] = TensorInfo(link.shape, dtype_of(found, names))
        piece_info = info.with_rows(link.num_rows)
        pieces.append(Piece(name=link.ours, info=piece_info, reads=link.reads(), make=link.join, row=link.row))
    return pieces, expected


def hf_pieces(found: Infos, all_links: Iterable[Link]) -> tuple[list[Piece], dict[str, TensorInfo]]:
    """Pieces of a Hugging Face folder, and all tensors that it should have.

    Tensors ``found`` in the Megatron checkpoint in another shape than its saved settings say are refused.
    """
    pieces: list[Piece] = []
    expected: dict[str, TensorInfo] = {}
    for link in all_links:
        _check_shape(found, link.ours, link.shape, "the saved settings say", "the checkpoint is damaged")
        dtype = dtype_of(found, [link.ours])
        reads = (Read(link.ours, link.row, link.row + link.num_rows),)
        for index, (name, shape) in enumerate(link.theirs):
            whole = expected[name] = TensorInfo(shape, dtype)
            make = partial(_part, split=link.split, index=index)
            info = whole if link.their_row is None else whole.with_rows(link.num_rows)
            pieces.append(Piece(name=name, info=info, reads=reads, make=make, row=link.their_row or 0))
    return pieces, expected


def dtype_of(found: Infos, names: Iterable[str]) -> torch.dtype:
    """That of the first of ``names``, which tensors keep. What is missing is named by the account of the conversion."""
    return next((found[name].dtype for name in names if name in found), torch.float32)


def _part(rows: Tensor, *, split: Callable[[Tensor], Sequence[Tensor]], index: int) -> Tensor:
    return split(rows)[index].contiguous()


def _check_shape(found: Infos, name: str, shape: Shape, says: str, reason: str) -> None:
    info = found.get(name)
    if info is not None and tuple(info.shape) != shape:
        raise CheckpointError(f"{name} has another shape than {says}: {tuple(info.shape)} and {shape}; {reason}")


def expected_tensors(args: Namespace, found: Infos) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint with these arguments has.

    Dtypes are those of ``found``, and so are names and shapes of what a codec has learned.
    """
    args = complete(args)
    all_links = (*links(args), *_norms_without_counterpart(args))
    expected = {link.ours: TensorInfo(link.shape, dtype_of(found, [link.ours])) for link in all_links}
    if has_residual_maps(args):
        expected |= {name: info for name, info in found.items() if ".residual_map." in name}
    return expected


def _norms_without_counterpart(args: Namespace) -> Iterator[Link]:
    """Norms of --shortcut-norms upstream, which no Hugging Face model here has."""
    for block in range(args.num_layers if args.shortcut_norms == "upstream" else 0):
        if carries_moe(args, block):
            for name in ("shortcut_pre_mlp_layernorm.", "shortcut_post_norm."):
                yield from _norm(args, f"decoder.layers.{block}.{name}", "", args.hidden_size)


def _same(ours: str, theirs: str, shape: Shape) -> Link:
    return Link(ours=ours, shape=shape, theirs=((theirs, shape),))


def _norm(args: Namespace, ours: str, theirs: str, size: int) -> Iterator[Link]:
    """A norm over ``size`` channels; names are prefixes, here and below."""
    for part in ("weight", "bias") if args.normalization == "LayerNorm" else ("weight",):
        yield _same(ours + part, theirs + part, (size,))


def _around_prediction(args: Namespace, ours: str, theirs: str) -> Iterator[Link]:
    """What a prediction layer has beside its layers: norms of embedding and hidden state, their projection, a norm."""
    hidden = args.hidden_size
    for name in ("enorm.", "hnorm.", "final_layernorm."):
        yield from _norm(args, ours + name, theirs + name, hidden)
    yield _same(f"{ours}eh_proj.weight", f"{theirs}eh_proj.weight", (hidden, 2 * hidden))


def _layer(layer: Layer) -> Iterator[Link]:
    ours, theirs, args, block = layer
    norms = norm_names(args, args.transformer_impl, block)
    parts = parts_of(args, block)
    if parts.mamba:
        yield from _norm(args, f"{ours}mixer.in_proj.layer_norm_", f"{theirs}input_layernorm.", args.hidden_size)
        yield from _mixer(args, f"{ours}mixer.", f"{theirs}mamba.")
    if parts.attention:
        yield from _norm(args, ours + norms["input_layernorm"], f"{theirs}input_layernorm.", args.hidden_size)
        attention = _latent_attention if args.multi_latent_attention else _grouped_query_attention
        yield from attention(args, ours, f"{theirs}self_attn.", norms)
    if not parts.feed_forward:
        return
    yield from _norm(args, ours + norms["pre_mlp_layernorm"], f"{theirs}post_attention_layernorm.", args.hidden_size)
    if not carries_moe(args, block):
        yield from _mlp(args, f"{ours}mlp.", f"{theirs}mlp.", args.ffn_hidden_size)
        return
    if owns_moe(args, block):
        yield from _moe(args, ours, theirs)
    if args.shortcut == "scmoe" and args.shortcut_combine == "cg2":
        yield _same(f"{ours}combine_gate.weight", f"{theirs}combine_gate.weight", (2, args.hidden_size))


def _mixer(args: Namespace, ours: str, theirs: str) -> Iterator[Link]:
    for part in mixer_rows(args):
        whole = ((theirs + part.theirs, (part.rows, *part.shape[1:])),)
        yield Link(ours=ours + part.ours, shape=part.shape, theirs=whole, their_row=part.first)


def _grouped_query_attention(args: Namespace, ours: str, theirs: str, _norms: Mapping[str, str]) -> Iterator[Link]:
    hidden, heads = args.hidden_size, args.num_attention_heads
    size = args.kv_channels or hidden // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    counts = {"q": heads, "k": groups, "v": groups}
    parts: tuple[tuple[str, Shape], ...] = (("weight", (hidden,)), ("bias", ()))
    for part, rest in parts if args.add_qkv_bias else parts[:1]:
        yield Link(
            ours=f"{ours}self_attention.linear_qkv.{part}",
            shape=(sum(counts.values()) * size, *rest),
            theirs=tuple((f"{theirs}{x}_proj.{part}", (count * size, *rest)) for x, count in counts.items()),
            split=partial(_split_by_group, groups=groups, size=size),
            join=partial(_join_by_group, groups=groups),
        )
    yield _same(f"{ours}self_attention.linear_proj.weight", f"{theirs}o_proj.weight", (hidden, heads * size))
    if args.qk_layernorm:
        for x in "qk":
            yield from _norm(args, f"{ours}self_attention.{x}_layernorm.", f"{theirs}{x}_norm.", size)


def _latent_attention(args: Namespace, ours: str, theirs: str, norms: Mapping[str, str]) -> Iterator[Link]:
    hidden, heads, kv_rank = args.hidden_size, args.num_attention_heads, args.kv_lora_rank
    queries = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim)
    shapes = {
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"): (kv_rank + args.qk_pos_emb_head_dim, hidden),
        ("linear_kv_up_proj", "kv_b_proj"): (heads * (args.qk_head_dim + args.v_head_dim), kv_rank),
        ("linear_proj", "o_proj"): (hidden, heads * args.v_head_dim),
    }
    if args.q_lora_rank is None:
        shapes["linear_q_proj", "q_proj"] = (queries, hidden)
    else:
        shapes["linear_q_down_proj", "q_a_proj"] = (args.q_lora_rank, hidden)
        shapes["linear_q_up_proj", "q_b_proj"] = (queries, args.q_lora_rank)
    for (our_name, their_name), shape in shapes.items():
        yield _same(f"{ours}self_attention.{our_name}.weight", f"{theirs}{their_name}.weight", shape)
    for x, rank in (("q", args.q_lora_rank), ("kv", kv_rank)):
        if f"{x}_layernorm" in norms:
            yield from _norm(args, ours + norms[f"{x}_layernorm"], f"{theirs}{x}_a_layernorm.", rank)


def _mlp(args: Namespace, ours: str, theirs: str, size: int) -> Iterator[Link]:
    hidden = args.hidden_size
    names = ("gate_proj", "up_proj") if args.swiglu else ("up_proj",)
    for index, name in enumerate(names):
        yield Link(
            ours=f"{ours}linear_fc1.weight",
            shape=(len(names) * size, hidden),
            theirs=((f"{theirs}{name}.weight", (size, hidden)),),
            row=index * size,
            rows=size,
        )
    yield _same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, size))


def _moe(args: Namespace, ours: str, theirs: str) -> Iterator[Link]:
    hidden, choices = args.hidden_size, args.num_experts + args.zero_experts
    yield _same(f"{ours}mlp.router.weight", f"{theirs}moe.router.weight", (choices, hidden))
    if args.moe_router_enable_expert_bias or args.router == "longcat":
        yield _same(f"{ours}mlp.router.expert_bias", f"{theirs}moe.router.expert_bias", (choices,))
    if latent := args.moe_latent_size:  # refused on the way to Hugging Face
        yield _same(f"{ours}mlp.fc1_latent_proj.weight", f"{theirs}moe.fc1_latent_proj.weight", (latent, hidden))
        yield _same(f"{ours}mlp.fc2_latent_proj.weight", f"{theirs}moe.fc2_latent_proj.weight", (hidden, latent))
    for index in range(args.num_experts):
        yield from _expert(args, f"{ours}mlp.experts.experts.", f"{theirs}moe.experts.{index}.", index)
    if args.moe_shared_expert_intermediate_size:
        shared = f"{ours}mlp.shared_experts."
        yield from _mlp(args, shared, f"{theirs}shared_expert.", args.moe_shared_expert_intermediate_size)
        if args.moe_shared_expert_gate and not (args.shortcut == "scmoe" and args.shortcut_combine == "cg2"):
            yield _same(f"{shared}gate_weight", f"{theirs}shared_expert_gate.weight", (1, hidden))


def _expert(args: Namespace, ours: str, theirs: str, index: int) -> Iterator[Link]:
    """One of the rows of tensors that count experts along their first dimension."""
    width, size = args.moe_latent_size or args.hidden_size, args.moe_ffn_hidden_size or args.ffn_hidden_size
    names = ("gate_proj", "up_proj") if args.swiglu else ("up_proj",)
    for linear, parts, shape in (("linear_fc1", names, (size, width)), ("linear_fc2", ("down_proj",), (width, size))):
        yield Link(
            ours=f"{ours}{linear}.weight",
            shape=(args.num_experts, len(parts) * shape[0], shape[1]),
            theirs=tuple((f"{theirs}{name}.weight", shape) for name in parts),
            row=index,
            rows=1,
            split=partial(_split_expert, parts=len(parts)),
            join=_join_expert,
        )


def _split_expert(rows: Tensor, *, parts: int) -> Sequence[Tensor]:
    return rows.squeeze(0).chunk(parts)


def _join_expert(*parts: Tensor) -> Tensor:
    return torch.cat(parts).unsqueeze(0)


def _split_by_group(rows: Tensor, *, groups: int, size: int) -> Sequence[Tensor]:
    """Queries, keys and values of rows that lie by query group: its query heads, its key head, its value head."""
    heads = rows.unflatten(0, (groups, -1, size))
    return heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)


def _join_by_group(*parts: Tensor, groups: int) -> Tensor:
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
