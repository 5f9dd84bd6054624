"""LongCat-Flash's layer that predicts a further token (``model.mtp``) <-> Megatron's dense prediction layer.

Both multiply the norms of the next token's embedding and of the hidden state, in this order, by one projection, before
a block of latent attention and a dense MLP, and a norm before the output layer. Published folders have an embedding
beside it. Megatron's layer reads that of the model: so one that is another tensor has no place.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from checkpoints.disk.hf_folder import HFFolder
from checkpoints.mappings.links import Link, dtype_of, links
from checkpoints.plan import Piece, Read
from checkpoints.tensors import CheckpointError, TensorInfo

THEIRS, OURS = "model.mtp.", "mtp.layers.0."
SAME_EMBEDDING = "the embedding of the layer that predicts a further token is that of the model, number for number"
_EMBEDDING = f"{THEIRS}embed_tokens.weight"
_MODEL_EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
_ROWS = 4096  # of an embedding, compared at a time
_BLOCK = ("decoder.layers.0.", "model.layers.0.")


def prediction_links(args: Namespace) -> Iterator[Link]:
    """Every tensor of the prediction layer of ``args``, which are ``complete``; none where there is no such layer."""
    if not getattr(args, "mtp_num_layers", None):
        return
    layer, hidden = f"{THEIRS}layers.0.", args.hidden_size
    shapes = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "final_layernorm": (hidden,)}
    names = {"enorm": f"{layer}enorm.m", "hnorm": f"{layer}hnorm.m", "eh_proj": f"{layer}eh_proj"}
    for ours, shape in shapes.items():
        theirs = names.get(ours, f"{THEIRS}norm")
        yield Link(ours=f"{OURS}{ours}.weight", shape=shape, theirs=((f"{theirs}.weight", shape),))
    alone = {"num_layers": 1, "num_experts": None, "shortcut": "none"}
    for link in links(Namespace(**{**vars(args), **alone})):
        if link.ours.startswith(_BLOCK[0]):
            ours = link.ours.replace(_BLOCK[0], f"{OURS}transformer_layer.")
            yield replace(link, ours=ours, theirs=tuple((_their_name(name), shape) for name, shape in link.theirs))


def _their_name(name: str) -> str:
    rest = name.removeprefix(_BLOCK[1])
    return f"{THEIRS}layers.0." + (f"transformer_layer.{rest}" if rest.startswith("mlp.") else rest)


def why_left_out(source: HFFolder, args: Namespace) -> str | None:
    """Why the tensors of ``model.mtp`` have no place in a checkpoint with these ``args``; None where they have one."""
    found = {name for name in source.infos if name.startswith(THEIRS)}
    with_layer = Namespace(**{**vars(args), "mtp_num_layers": 1})
    known = {_EMBEDDING, *(name for link in prediction_links(with_layer) for name, _ in link.theirs)}
    if other := sorted(found ^ known):
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
