"""One spec's checkpoints for the other spec: the same tensors, of which some norms have other names."""

from __future__ import annotations

from argparse import Namespace

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.formats import Target
from checkpoints.mappings.links import expected_tensors
from checkpoints.mappings.norms import SPECS, renamed_norms
from checkpoints.plan import Conversion, Piece, Read
from checkpoints.tensors import CheckpointError


def convert(source: MegatronCheckpoint, *, transformer_impl: str) -> Target:
    """The same checkpoint for the other spec.

    Args:
        source: of either spec.
        transformer_impl: the spec that is to load the result, one of ``SPECS``.

    Raises:
        CheckpointError: where it is of that spec already.
    """
    args = source.args
    if args.transformer_impl == transformer_impl:
        raise CheckpointError(
            f"nothing to convert: {source.folder} is a checkpoint of the spec {transformer_impl} already; "
            f"use --transformer-impl {SPECS[1 - SPECS.index(transformer_impl)]}"
        )
    new_args = {**vars(args), "transformer_impl": transformer_impl}
    renamed = renamed_norms(args, Namespace(**new_args))
    names = {name: renamed.get(name, name) for name in source.infos}
    written = {names[name]: info for name, info in source.infos.items()}
    return Target(
        conversion=Conversion(
            pieces=tuple(
                Piece(name=names[name], info=info, reads=(Read(name),)) for name, info in source.infos.items()
            ),
            expected=expected_tensors(Namespace(**new_args), written),
            dropped=source.others,
        ),
        args=new_args,
        files={},
    )
