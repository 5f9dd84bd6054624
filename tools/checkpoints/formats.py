"""Which format becomes which, and by what: the table of pairs, and what opens and writes a format."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.disk.hf_folder import CONFIG, HFFolder, HFWriter
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.disk.torch_dist_writer import MegatronWriter
from checkpoints.plan import Conversion
from checkpoints.tensors import CheckpointError

MEGATRON = "megatron"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a mapping makes of a source.

    Attributes:
        conversion: of its tensors.
        args: where the target is Megatron's: the saved arguments, as far as they differ from Megatron's defaults.
        files: where the target is a Hugging Face folder: config.json and others, by plain file name.
    """

    conversion: Conversion
    args: Mapping[str, object] | None
    files: Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for beside formats and folders.

    Attributes:
        transformer_impl: the spec that is to load a checkpoint of Megatron's; None: not asked for.
        upcycling: what a dense model is to become, an ``upcycle.Upcycling``; None: not asked for.
    """

    transformer_impl: str | None = None
    upcycling: Any = None


# Module and function, imported when they are needed: each takes a source, and returns a Target.
PAIRS: dict[tuple[str, str], tuple[str, str]] = {
    ("hf-longcat", MEGATRON): ("checkpoints.mappings.longcat", "to_megatron"),
    (MEGATRON, "hf-longcat"): ("checkpoints.mappings.longcat", "from_megatron"),
    ("hf-scmoe", MEGATRON): ("checkpoints.mappings.scmoe_names", "to_megatron"),
    (MEGATRON, "hf-scmoe"): ("checkpoints.mappings.scmoe_names", "from_megatron"),
    ("hf-dense", MEGATRON): ("checkpoints.mappings.upcycle", "from_hf_dense"),
    (MEGATRON, MEGATRON): ("checkpoints.mappings.specs", "convert"),
}
_UPCYCLED = {"hf-dense": "from_hf_dense", MEGATRON: "from_megatron"}


def check_pair(source: str, target: str, request: Request) -> None:
    """Raise CheckpointError where there is no way from one format to the other, or not with these options."""
    if (source, target) not in PAIRS:
        through = source != target and (source, MEGATRON) in PAIRS and (MEGATRON, target) in PAIRS
        steps = f"take two steps: --from {source} --to {MEGATRON}, then --from {MEGATRON} --to {target}"
        raise CheckpointError(f"no way from {source} to {target}; {steps if through else 'nothing needs to be done'}")
    if request.upcycling and (source not in _UPCYCLED or target != MEGATRON):
        raise CheckpointError(
            f"upcycling makes {MEGATRON} checkpoints of {' or '.join(_UPCYCLED)}: --experts is set with --from "
            f"{source} --to {target}; drop it, or upcycle first"
        )
    if request.transformer_impl and (request.upcycling or (source, target) != (MEGATRON, MEGATRON)):
        raise CheckpointError(
            f"--transformer-impl turns one spec's checkpoint into the other's, in a step of its own: it is "
            f"{request.transformer_impl} with --from {source} --to {target}{' --experts' * bool(request.upcycling)}; "
            f"drop it, then --from {MEGATRON} --to {MEGATRON} --transformer-impl {request.transformer_impl}"
        )
    if target == MEGATRON and source in _UPCYCLED and not (request.upcycling or request.transformer_impl):
        other = " or --transformer-impl for the other spec" if source == MEGATRON else ""
        raise CheckpointError(f"from {source} to {target} something has to change: add --experts N to upcycle{other}")


def opened(source: str, path: Path) -> MegatronCheckpoint | HFFolder:
    """A checkpoint of format ``source`` to read from.

    Raises:
        CheckpointError: where it is another format, or damaged.
    """
    if source == MEGATRON:
        if (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is a Hugging Face folder; use --from hf-longcat, hf-scmoe or hf-dense")
        return MegatronCheckpoint(path)
    if not (path / CONFIG).is_file() and any(path.glob("latest_checkpointed_iteration.txt")):
        raise CheckpointError(f"{path} is a checkpoint of Megatron's; use --from {MEGATRON}")
    return HFFolder(path)


def mapped(source_format: str, target_format: str, source: MegatronCheckpoint | HFFolder, request: Request) -> Target:
    """What becomes of a source.

    Raises:
        CheckpointError: where its settings have no counterpart.
    """
    if request.upcycling:
        function = getattr(importlib.import_module("checkpoints.mappings.upcycle"), _UPCYCLED[source_format])
        call = partial(function, source, request.upcycling)
    else:
        module, name = PAIRS[source_format, target_format]
        call = partial(getattr(importlib.import_module(module), name), source)
        if request.transformer_impl:
            call = partial(call, transformer_impl=request.transformer_impl)
    try:
        return call()
    except CheckpointError:
        raise
    except (
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # a setting that is not sound
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(
            f"{source.folder} has not the settings of a {source_format} model ({reason}); use another --from"
        ) from error


def writer(target_format: str, target: Target) -> MegatronWriter | HFWriter:
    """What writes ``target``.

    Raises:
        CheckpointError: for settings or file names that cannot be saved.
    """
    if target_format == MEGATRON:
        return MegatronWriter(target.conversion.expected, target.args or {})
    return HFWriter(target.files)
