"""This plugin's checkpoints <-> Hugging Face folders with a model of their own (hf_scmoe/modeling_scmoe.py).

Tensors get readable names; the rows of joined projections are taken apart and experts get a tensor each. No value
changes on either way. The vocabulary keeps the rows that Megatron padded it with, so that the way back is bit-equal.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import Target
from checkpoints.mappings import scmoe_settings
from checkpoints.mappings.scmoe_links import Shape, links
from checkpoints.mappings.scmoe_tokenizer import Tokenizer, tokenizer_of
from checkpoints.plan import Conversion, Piece, Read
from checkpoints.tensors import CheckpointError, TensorInfo

CODE = Path(__file__).with_name("hf_scmoe")
CODE_FILES = ("configuration_scmoe.py", "modeling_scmoe.py")

_COMPENSATION = "a learned compensation of the codec lsh: the Hugging Face model sends nothing, and so has no residuals"
_TIED = "the output layer is the embedding"


def from_megatron(source: MegatronCheckpoint) -> Target:
    """A checkpoint of this plugin, or of stock Megatron, as a Hugging Face folder with its own model.

    Raises:
        CheckpointError: for a setting that the Hugging Face model does not know, and for a tensor of another shape than
            the saved settings say.
    """
    args = scmoe_settings.complete(source.args)
    config = scmoe_settings.config_of(args)
    tokenizer = tokenizer_of(args)
    pieces: list[Piece] = []
    expected: dict[str, TensorInfo] = {}
    for link in links(args):
        _check_shape(source, link.ours, link.shape, "the saved settings say: the checkpoint is damaged")
        dtype = _dtype(source, [link.ours])
        for index, (name, shape) in enumerate(link.theirs):
            expected[name] = TensorInfo(shape, dtype)
            read = Read(link.ours, link.row, link.row + link.num_rows)
            make = partial(_part, split=link.split, index=index)
            pieces.append(Piece(name=name, info=expected[name], reads=(read,), make=make))
    maps = _residual_maps(source, args)
    return Target(
        conversion=Conversion(
            pieces=tuple(pieces),
            expected=expected,
            dropped={**source.others, **dict.fromkeys(maps, _COMPENSATION)},
            notes=(*_notes(args), *tokenizer.notes),
        ),
        args=None,
        files=_files(config, tokenizer, _dtype(source, ["embedding.word_embeddings.weight"])),
    )


def to_megatron(source: HFFolder) -> Target:
    """A Hugging Face folder that ``from_megatron`` wrote, or that was trained on from one, as a checkpoint.

    Raises:
        CheckpointError: for another model, and for a tensor of another shape than config.json says.
    """
    config = _loaded_config(source.config)
    saved = scmoe_settings.args_of(config, _dtype(source, ["model.embed_tokens.weight"]))
    args = scmoe_settings.complete(Namespace(**saved))
    _check_kept(config, scmoe_settings.config_of(args))
    pieces: list[Piece] = []
    expected: dict[str, TensorInfo] = {}
    for link in links(args):
        names = [name for name, _ in link.theirs]
        for name, shape in link.theirs:
            _check_shape(source, name, shape, "config.json says: the folder is damaged, or of another model")
        dtype = _dtype(source, names)
        expected[link.ours] = TensorInfo(link.shape, dtype)
        pieces.append(
            Piece(
                name=link.ours,
                info=TensorInfo((link.num_rows, *link.shape[1:]), dtype),
                reads=tuple(Read(name) for name in names),
                make=link.join,
                row=link.row,
            )
        )
    tied = config.tie_word_embeddings and "lm_head.weight" in source.infos
    dropped = {"lm_head.weight": _TIED} if tied else {}
    return Target(conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped), args=saved, files={})


def _check_kept(config: Any, again: Mapping[str, Any]) -> None:
    """Refuse a configuration that would come back from Megatron's arguments as another one."""
    here, there = config.rope_parameters or {}, again.get("rope_parameters") or {}
    kind = here.get("rope_type", "default")
    names = ("rope_type",) if kind == "default" else tuple(here)
    lost = [f"rope_parameters {name} {here.get(name)!r}" for name in names if here.get(name) != there.get(name)]
    if config.softmax_scale != again.get("softmax_scale"):
        lost.append(f"softmax_scale {config.softmax_scale!r}")
    if lost:
        raise CheckpointError(f"Megatron has no setting for what config.json says: {', '.join(lost)}; no way known")


def _part(rows: Tensor, *, split: Callable[[Tensor], Sequence[Tensor]], index: int) -> Tensor:
    return split(rows)[index].contiguous()


def _dtype(source: HFFolder | MegatronCheckpoint, names: Iterable[str]) -> torch.dtype:
    """That of the first of ``names``, which tensors keep. What is missing is named by the account of the conversion."""
    return next((source.infos[name].dtype for name in names if name in source.infos), torch.float32)


def _check_shape(source: HFFolder | MegatronCheckpoint, name: str, shape: Shape, says: str) -> None:
    info = source.infos.get(name)
    if info is not None and tuple(info.shape) != shape:
        raise CheckpointError(f"{name} has another shape, {tuple(info.shape)}, than the {shape} that {says}")


def _residual_maps(source: MegatronCheckpoint, args: Namespace) -> list[str]:
    if not scmoe_settings.has_residual_maps(args):
        return []
    return [name for name in source.infos if ".residual_map." in name]


def _notes(args: Namespace) -> Iterator[str]:
    if args.a2a_codec == "lsh":
        yield (
            "trained with --a2a-codec lsh, whose means depend on which tokens travel together: the Hugging Face model "
            "sends every token as it is, and gives other numbers than a forward with the codec"
        )
    if getattr(args, "moe_expert_capacity_factor", None) is not None:
        yield (
            f"trained with --moe-expert-capacity-factor {args.moe_expert_capacity_factor}: experts of the Hugging Face "
            "model have room for every token"
        )


def _files(config: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, bytes]:
    config = {
        "model_type": "scmoe",
        "architectures": ["ScMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_scmoe.ScMoEConfig",
            "AutoModel": "modeling_scmoe.ScMoEModel",
            "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        **config,
        **tokenizer.ids,
    }
    code = {name: (CODE / name).read_bytes() for name in CODE_FILES}
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **code, **tokenizer.files}


def _loaded_config(config: Mapping[str, Any]) -> Any:
    """config.json as a ``ScMoEConfig``: what is missing gets its default, and what is there is checked."""
    if config.get("model_type") != "scmoe":
        raise CheckpointError(
            f"config.json is that of another model: model_type is {config.get('model_type')!r}, not 'scmoe'; "
            "use --from hf-longcat or --from hf-dense"
        )
    try:
        from checkpoints.mappings.hf_scmoe.configuration_scmoe import ScMoEConfig  # noqa: PLC0415 (slow, and needed here alone)
    except ImportError as error:
        raise CheckpointError("transformers reads config.json, and is missing; pip install transformers") from error
    try:
        return ScMoEConfig(**config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"config.json describes no ScMoE model: {reason}; correct it") from error
