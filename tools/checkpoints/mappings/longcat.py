"""Hugging Face LongcatFlash <-> this plugin: names, shapes and settings (arXiv 2509.01322).

One of its layers is a group of two blocks here: position pos2, whose dense MLPs are the first block's MLP and the
second block's shared expert, added without a gate. Tensors change their names, and gate and up projections lie behind
one another; no value changes on either way.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import Target
from checkpoints.mappings.longcat_settings import check_form, checked_config, hf_config, megatron_args
from checkpoints.mappings.norms import norm_names
from checkpoints.plan import Conversion, Piece, Read
from checkpoints.tensors import CheckpointError, TensorInfo

_PREDICTION = "layers that predict further tokens are not part of the model"
_UNUSED = "zero experts have no parameters: transformers saves these and never reads them"
_HAS_UNUSED = "hf_has_unused_tensors"  # among the saved arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What decides names and shapes of a LongcatFlash model.

    Attributes:
        layers: of LongcatFlash, each two blocks here.
        The others are those of its configuration.
    """

    layers: int
    vocab: int
    hidden: int
    ffn: int
    expert_ffn: int
    experts: int
    zero_experts: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Sizes:
        """From config.json."""
        return cls(
            layers=config["num_layers"],
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            ffn=config["ffn_hidden_size"],
            expert_ffn=config["expert_ffn_hidden_size"],
            experts=config["n_routed_experts"],
            zero_experts=config["zero_expert_num"] or 0,
            heads=config["num_attention_heads"],
            q_rank=config["q_lora_rank"],
            kv_rank=config["kv_lora_rank"],
            nope=config["qk_nope_head_dim"],
            rope=config["qk_rope_head_dim"],
            value=config["v_head_dim"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """One tensor here and its counterpart there.

    Attributes:
        ours: its name in a Megatron checkpoint.
        shape: there.
        theirs: the tensors that make it up in the Hugging Face folder, one behind the other along the first dimension.
        expert: which row along the first dimension of ours it is, where that counts experts; None: all of it.
        experts: rows of ours, where that counts experts.
    """

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[tuple[str, tuple[int, ...]], ...]
    expert: int | None = None
    experts: int = 0

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the whole tensor in a Megatron checkpoint."""
        return self.shape if self.expert is None else (self.experts, *self.shape)


def twins(sizes: Sizes) -> Iterator[Twin]:
    """Every tensor of the model, group by group."""
    vocab = (sizes.vocab, sizes.hidden)
    yield _one("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab)
    for layer in range(sizes.layers):
        yield from _layer(sizes, layer)
    yield _one("decoder.final_layernorm.weight", "model.norm.weight", (sizes.hidden,))
    yield _one("output_layer.weight", "lm_head.weight", vocab)


def _one(ours: str, theirs: str, shape: tuple[int, ...]) -> Twin:
    return Twin(ours=ours, shape=shape, theirs=((theirs, shape),))


def _gated(ours: str, theirs: str, ffn: int, hidden: int, **row: int) -> Iterator[Twin]:
    """An MLP: gate and up projection behind one another, then the down projection."""
    parts = tuple((f"{theirs}{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
    yield Twin(ours=f"{ours}linear_fc1.weight", shape=(2 * ffn, hidden), theirs=parts, **row)
    down = (hidden, ffn)
    yield Twin(ours=f"{ours}linear_fc2.weight", shape=down, theirs=((f"{theirs}down_proj.weight", down),), **row)


def _layer(sizes: Sizes, layer: int) -> Iterator[Twin]:
    theirs = f"model.layers.{layer}."
    for half in (0, 1):
        ours = f"decoder.layers.{2 * layer + half}."
        for norm, name in (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm")):
            yield _one(f"{ours}{norm}.weight", f"{theirs}{name}.{half}.weight", (sizes.hidden,))
        yield from _attention(sizes, ours + "self_attention.", f"{theirs}self_attn.{half}.")
    first, second = (f"decoder.layers.{2 * layer + half}.mlp." for half in (0, 1))
    yield from _gated(first, f"{theirs}mlps.0.", sizes.ffn, sizes.hidden)
    yield from _gated(f"{second}shared_experts.", f"{theirs}mlps.1.", sizes.ffn, sizes.hidden)
    choices = sizes.experts + sizes.zero_experts
    yield _one(f"{second}router.weight", f"{theirs}mlp.router.classifier.weight", (choices, sizes.hidden))
    yield _one(f"{second}router.expert_bias", f"{theirs}mlp.router.e_score_correction_bias", (choices,))
    for expert in range(sizes.experts):
        row = {"expert": expert, "experts": sizes.experts}
        yield from _gated(
            f"{second}experts.experts.", f"{theirs}mlp.experts.{expert}.", sizes.expert_ffn, sizes.hidden, **row
        )


def _attention(sizes: Sizes, ours: str, theirs: str) -> Iterator[Twin]:
    shapes = {
        ("linear_q_down_proj", "q_a_proj"): (sizes.q_rank, sizes.hidden),
        ("q_layernorm", "q_a_layernorm"): (sizes.q_rank,),
        ("linear_q_up_proj", "q_b_proj"): (sizes.heads * (sizes.nope + sizes.rope), sizes.q_rank),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"): (sizes.kv_rank + sizes.rope, sizes.hidden),
        ("kv_layernorm", "kv_a_layernorm"): (sizes.kv_rank,),
        ("linear_kv_up_proj", "kv_b_proj"): (sizes.heads * (sizes.nope + sizes.value), sizes.kv_rank),
        ("linear_proj", "o_proj"): (sizes.hidden, sizes.heads * sizes.value),
    }
    for (our_name, their_name), shape in shapes.items():
        yield _one(f"{ours}{our_name}.weight", f"{theirs}{their_name}.weight", shape)


def _stack(*parts: Tensor, expert: bool) -> Tensor:
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensor.unsqueeze(0) if expert else tensor


def _squeeze(tensor: Tensor, *, expert: bool) -> Tensor:
    return tensor.squeeze(0) if expert else tensor


def to_megatron(source: HFFolder) -> Target:
    """A LongcatFlash folder as a checkpoint of this plugin, for the local spec.

    Raises:
        CheckpointError: for a configuration that LongCat-Flash as published does not have.
    """
    config = checked_config(source.config)
    if max(config["num_layers"], config["n_routed_experts"]) > len(source.infos):
        raise CheckpointError(
            f"{source.folder} has {len(source.infos)} tensors, too few for num_layers {config['num_layers']} and "
            f"n_routed_experts {config['n_routed_experts']} of its config.json; get the whole folder"
        )
    args = megatron_args(config)
    rename = _spec_names(Namespace(**args))
    pieces, expected = [], {}
    for twin in twins(Sizes.of_config(config)):
        names = tuple(name for name, _ in twin.theirs)
        # A tensor that the source lacks is named by the account of the conversion; until then any dtype will do.
        dtype = next((source.infos[name].dtype for name in names if name in source.infos), torch.float32)
        _check_shapes(source, twin)
        is_expert = twin.expert is not None
        pieces.append(
            Piece(
                name=rename(twin.ours),
                info=TensorInfo(((1,) if is_expert else ()) + twin.shape, dtype),
                reads=tuple(Read(name) for name in names),
                make=partial(_stack, expert=is_expert),
                row=twin.expert or 0,
            )
        )
        expected[rename(twin.ours)] = TensorInfo(twin.whole_shape, dtype)
    dropped = {name: reason for name in source.infos if (reason := _reason_to_drop(name, config))}
    args[_HAS_UNUSED] = _UNUSED in dropped.values()
    return Target(
        conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped, notes=_notes(dropped)),
        args=args,
        files={},
    )


def from_megatron(source: MegatronCheckpoint) -> Target:
    """A checkpoint of this plugin in LongCat-Flash's form as a LongcatFlash folder.

    Raises:
        CheckpointError: for a checkpoint of another form.
    """
    args = source.args
    check_form(args)
    config = hf_config(args)
    rename = _spec_names(args)
    pieces, expected = [], {}
    for twin in twins(Sizes.of_config(config)):
        ours = rename(twin.ours)
        info = source.infos.get(ours)
        if info is not None and info.shape != twin.whole_shape:
            raise CheckpointError(
                f"{ours} has another shape than the saved settings say: {info.shape} and {twin.whole_shape}; "
                "the checkpoint is damaged"
            )
        dtype = info.dtype if info is not None else torch.float32
        row = 0
        for name, shape in twin.theirs:
            rows = shape[0]
            read, make = _cut(ours, twin, row, rows)
            pieces.append(Piece(name=name, info=TensorInfo(shape, dtype), reads=(read,), make=make))
            expected[name] = TensorInfo(shape, dtype)
            row += rows
    # transformers wants them, and whoever reads published checkpoints does not: so they are there if they were.
    unused = _unused_tensors(Sizes.of_config(config)) if getattr(args, _HAS_UNUSED, True) else {}
    for name, shape in unused.items():
        info = TensorInfo(shape, next(iter(expected.values())).dtype)
        pieces.append(Piece(name=name, info=info, reads=(), make=partial(torch.zeros, info.shape, dtype=info.dtype)))
        expected[name] = info
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return Target(
        conversion=Conversion(
            pieces=tuple(pieces),
            expected=expected,
            dropped=source.others,
            notes=(f"{len(unused)} tensors of zero experts are zeros: {_UNUSED}",) if unused else (),
        ),
        args=None,
        files={"config.json": text.encode()},
    )


def _unused_tensors(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """What transformers 5.23 saves for zero experts, and misses where it is not there."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": (sizes.expert_ffn, sizes.hidden)
        for layer in range(sizes.layers)
        for expert in range(sizes.experts, sizes.experts + sizes.zero_experts)
        for part in ("gate", "up")
    }


def _cut(ours: str, twin: Twin, row: int, rows: int) -> tuple[Read, Callable[..., Tensor]]:
    """What to read of our tensor, and how to make rows ``row`` to ``row + rows`` of the twin's part of it."""
    if twin.expert is None:
        return Read(ours, row, row + rows), partial(_squeeze, expert=False)
    return Read(ours, twin.expert, twin.expert + 1), partial(_rows_of_expert, row=row, rows=rows)


def _rows_of_expert(tensor: Tensor, *, row: int, rows: int) -> Tensor:
    return tensor[0, row : row + rows].clone()


def _spec_names(args: Namespace) -> Callable[[str], str]:
    """Our names with each norm under the name that the spec of ``args`` has for it."""
    names = {}
    for block in range(args.num_layers):
        for module, prefix in norm_names(args, args.transformer_impl, block).items():
            inside = "self_attention." if module in ("q_layernorm", "kv_layernorm") else ""
            names[f"decoder.layers.{block}.{inside}{module}.weight"] = f"decoder.layers.{block}.{prefix}weight"
    return lambda name: names.get(name, name)


def _check_shapes(source: HFFolder, twin: Twin) -> None:
    for name, shape in twin.theirs:
        info = source.infos.get(name)
        if info is not None and info.shape != shape:
            raise CheckpointError(
                f"{name} has another shape than config.json says: {info.shape} and {shape}; the folder is damaged, "
                "or of another model"
            )


def _reason_to_drop(name: str, config: Mapping[str, Any]) -> str | None:
    if name.startswith("model.mtp."):
        return _PREDICTION
    parts = name.split(".")
    is_expert = parts[:2] == ["model", "layers"] and parts[3:5] == ["mlp", "experts"] and parts[5:6] != []
    if is_expert and parts[5].isdecimal():
        first, behind = config["n_routed_experts"], config["n_routed_experts"] + (config["zero_expert_num"] or 0)
        if first <= int(parts[5]) < behind:
            return _UNUSED
    return None


def _notes(dropped: Mapping[str, str]) -> tuple[str, ...]:
    counts = Counter(dropped.values())
    return tuple(f"{count} tensors are left out: {reason}" for reason, count in counts.items())
