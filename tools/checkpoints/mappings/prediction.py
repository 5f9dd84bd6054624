"""LongCat-Flash's layer that predicts a further token (``model.mtp``) <-> Megatron's dense prediction layer.

Both multiply the norms of the next token's embedding and of the hidden state, in this order, by one projection, before
a block of latent attention and a dense MLP, and a norm before the output layer. Published folders have an embedding
beside it. Megatron's layer reads that of the model: so one that is another tensor has no place.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Collection, Mapping

import torch

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.mappings.links import dtype_of
from checkpoints.plan import Piece, Read
from checkpoints.tensors import CheckpointError, TensorInfo

THEIRS = "model.mtp."
SAME_EMBEDDING = "the embedding of the layer that predicts a further token is that of the model, number for number"
_EMBEDDING = f"{THEIRS}embed_tokens.weight"
_MODEL_EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
_ROWS = 4096  # of an embedding, compared at a time
_NAMES = {
    r"layers\.0\.(enorm|hnorm)\.": r"layers.0.\1.m.",
    r"layers\.0\.final_layernorm\.": "norm.",
    r"layers\.0\.layers\.0\.mlp\.": "layers.0.transformer_layer.mlp.",
    r"layers\.0\.layers\.0\.": "layers.0.",
}
"""Theirs, by what ``links`` calls them."""


def their_name(name: str) -> str:
    """What a LongcatFlash folder calls a tensor of the prediction layer that ``links`` calls ``name``."""
    rest = name.removeprefix(THEIRS)
    for ours, theirs in _NAMES.items():
        if re.match(ours, rest):
            return THEIRS + re.sub(ours, theirs, rest, count=1)
    return name


def why_left_out(source: HFFolder, known: Collection[str]) -> str | None:
    """Why the tensors of ``model.mtp`` have no place in a checkpoint; None where they have one.

    ``known`` are names of theirs that have a place, but for the embedding.
    """
    found = {name for name in source.infos if name.startswith(THEIRS)}
    if other := sorted(found ^ {_EMBEDDING, *known}):
        what = "has" if other[0] in found else "lacks"
        return f"layers that predict further tokens are known with one set of tensors, and this one {what} {other[0]}"
    if not _is_the_models(source):
        return f"Megatron's prediction layers read the embedding of the model, and {_EMBEDDING} is another one"
    return None


def _is_the_models(source: HFFolder) -> bool:
    ours, theirs = _MODEL_EMBEDDING[1], _EMBEDDING
    if source.infos.get(ours) != source.infos[theirs]:
        return False
    last = source.infos[theirs].num_rows
    parts = ((start, min(start + _ROWS, last)) for start in range(0, last, _ROWS))
    return all(torch.equal(source.read(ours, *part), source.read(theirs, *part)) for part in parts)


def embedding_piece(args: Namespace, found: Mapping[str, TensorInfo]) -> Piece:
    """The copy of the embedding that published folders have with the layer."""
    name = _MODEL_EMBEDDING[0]
    info = TensorInfo((args.padded_vocab_size, args.hidden_size), dtype_of(found, [name]))
    return Piece(name=_EMBEDDING, info=info, reads=(Read(name),))


def embedding_dropped(source: HFFolder) -> dict[str, str]:
    """What is not read of a folder whose prediction layer is taken."""
    return {_EMBEDDING: SAME_EMBEDDING} if _EMBEDDING in source.infos else {}


def check(args: Namespace) -> None:
    """Refuse prediction layers that a LongcatFlash folder cannot have."""
    if (layers := getattr(args, "mtp_num_layers", None)) not in (None, 0, 1):
        raise CheckpointError(
            f"a LongcatFlash folder has one layer that predicts a further token, and the checkpoint has {layers}; no "
            "way known"
        )
