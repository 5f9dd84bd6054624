"""One spec's checkpoints for the other spec: the same tensors, of which some norms have other names."""

from __future__ import annotations

from argparse import Namespace

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.links import expected_tensors
from checkpoints.mappings.megatron_settings import complete
from checkpoints.mappings.norms import SPECS, renamed_norms
from checkpoints.plan import Conversion, Piece, Read, Target
from checkpoints.tensors import CheckpointError


def convert(source: MegatronCheckpoint, *, transformer_impl: str) -> Target:
    """The same checkpoint, of either spec, for the other one: ``transformer_impl``, one of ``SPECS``."""
    args = source.args
    if args.transformer_impl == transformer_impl:
        raise CheckpointError(
            f"nothing to convert: {source.folder} is a checkpoint of the spec {transformer_impl} already; "
            f"use --transformer-impl {SPECS[1 - SPECS.index(transformer_impl)]}"
        )
    new_args = {**vars(args), "transformer_impl": transformer_impl}
    renamed = renamed_norms(complete(args), complete(Namespace(**new_args)))
    pieces = tuple(
        Piece(name=renamed.get(name, name), info=info, reads=(Read(name),)) for name, info in source.infos.items()
    )
    expected = expected_tensors(Namespace(**new_args), {piece.name: piece.info for piece in pieces})
    return Target(conversion=Conversion(pieces=pieces, expected=expected, dropped=source.others), args=new_args)
