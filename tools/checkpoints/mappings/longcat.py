"""Hugging Face LongcatFlash <-> this plugin: names, shapes and settings (arXiv 2509.01322).

One of its layers is a group of two blocks here: position pos2, whose dense MLPs are the first block's MLP and the
second block's shared expert, added without a gate. Tensors change their names, and gate and up projections lie behind
one another; no value changes on either way.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings import prediction
from checkpoints.mappings.links import Link, hf_pieces, links, megatron_pieces
from checkpoints.mappings.longcat_settings import check_form, checked_config, hf_config, megatron_args
from checkpoints.mappings.megatron_settings import check_args, complete
from checkpoints.mappings.tokenizer import tokenizer_of
from checkpoints.plan import Conversion, Piece, Target
from checkpoints.settings import check_experts, check_layers
from checkpoints.tensors import TensorInfo

_UNUSED = "zero experts have no parameters: transformers saves these and never reads them"
_HAS_UNUSED = "hf_has_unused_tensors"  # among the saved arguments


# Of a layer, behind the names that folders of hf_scmoe have; {} is 0 in its first block and 1 in its second one.
_NAMES = {
    r"(input_layernorm|self_attn|post_attention_layernorm)\.": r"\1.{}.",
    r"mlp\.": "mlps.0.",
    r"shared_expert\.": "mlps.1.",
    r"moe\.router\.weight": "mlp.router.classifier.weight",
    r"moe\.router\.expert_bias": "mlp.router.e_score_correction_bias",
    r"moe\.experts\.": "mlp.experts.",
}


def longcat_links(args: Namespace) -> Iterator[Link]:
    """Every tensor of the model of this form, block by block; ``args`` are ``complete``."""
    for link in links(args):
        yield replace(link, theirs=tuple((_their_name(name), shape) for name, shape in link.theirs))


def _their_name(name: str) -> str:
    if name.startswith(prediction.THEIRS):
        return prediction.their_name(name)
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if not found:
        return name
    layer, half = divmod(int(found[1]), 2)
    rest = next(re.sub(old, new, found[2], count=1) for old, new in _NAMES.items() if re.match(old, found[2]))
    return f"model.layers.{layer}.{rest.format(half)}"


def to_megatron(source: HFFolder) -> Target:
    """A LongcatFlash folder, in the form of LongCat-Flash as published, as a checkpoint for the local spec."""
    origin = str(source.folder / CONFIG)
    config = checked_config(source.config, origin)
    check_layers(origin, config, "num_layers", source.infos)
    check_experts(origin, config, "n_routed_experts", source.infos, num_moes=config["num_layers"])
    args = megatron_args(config)
    check_args(origin, Namespace(**args), source.infos)
    further = [name for name in source.infos if name.startswith(prediction.THEIRS)]
    why = prediction.why_left_out(source, _of_prediction(args)) if further else None
    if further and not why:
        args["mtp_num_layers"] = 1
    pieces, expected = megatron_pieces(source.infos, longcat_links(complete(Namespace(**args))))
    dropped = {name: _UNUSED for name in source.infos if _is_unused(name, config)}
    dropped |= dict.fromkeys(further, why) if why else prediction.embedding_dropped(source)
    notes = (f"{count} tensors are left out: {reason}" for reason, count in Counter(dropped.values()).items())
    return Target(
        conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=dropped, notes=tuple(notes)),
        args={**args, _HAS_UNUSED: _UNUSED in dropped.values()},
    )


def _of_prediction(args: Mapping[str, Any]) -> set[str]:
    """Names in a folder of the tensors of the layer that predicts a further token."""
    with_layer = complete(Namespace(**{**args, "mtp_num_layers": 1}))
    names = {name for link in longcat_links(with_layer) for name, _ in link.theirs}
    return {name for name in names if name.startswith(prediction.THEIRS)}


def from_megatron(source: MegatronCheckpoint) -> Target:
    """A checkpoint of this plugin in LongCat-Flash's form as a LongcatFlash folder; other forms are refused."""
    args = complete(source.args)
    check_form(args)
    prediction.check(args)
    tokenizer = tokenizer_of(source)
    config = {**hf_config(args), **tokenizer.ids}
    pieces, expected = hf_pieces(source.infos, longcat_links(args))
    if getattr(args, "mtp_num_layers", None):
        copy = prediction.embedding_piece(args, source.infos)
        pieces.append(copy)
        expected[copy.name] = copy.info
    # transformers wants them, and whoever reads published checkpoints does not: so they are there if they were.
    unused = unused_tensors(config) if getattr(args, _HAS_UNUSED, True) else {}
    for name, shape in unused.items():
        info = TensorInfo(shape, next(iter(expected.values())).dtype)
        pieces.append(Piece(name=name, info=info, reads=(), make=partial(torch.zeros, info.shape, dtype=info.dtype)))
        expected[name] = info
    zeros = [f"{len(unused)} tensors of zero experts are zeros: {_UNUSED}"] if unused else []
    notes = (*zeros, *tokenizer.notes)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return Target(
        conversion=Conversion(pieces=tuple(pieces), expected=expected, dropped=source.others, notes=notes),
        files={CONFIG: text.encode(), **tokenizer.files},
    )


def _unused_experts(config: Mapping[str, Any]) -> range:
    return range(config["n_routed_experts"], config["n_routed_experts"] + (config["zero_expert_num"] or 0))


def unused_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what transformers 5.23 saves for zero experts, and misses where it is not there."""
    shape = (config["expert_ffn_hidden_size"], config["hidden_size"])
    return {
        f"model.layers.{layer}.mlp.experts.{index}.{part}_proj.weight": shape
        for layer in range(config["num_layers"])
        for index in _unused_experts(config)
        for part in ("gate", "up")
    }


def _is_unused(name: str, config: Mapping[str, Any]) -> bool:
    expert = re.match(r"model\.layers\.[^.]*\.mlp\.experts\.(\d{1,9})(\.|$)", name)
    return expert is not None and int(expert[1]) in _unused_experts(config)
