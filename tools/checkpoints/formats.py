"""Which format becomes which, and by what: the table of pairs, and what opens and writes a format."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.disk.files import read_json
from checkpoints.disk.hf_folder import CONFIG, HFFolder, HFWriter
from checkpoints.disk.torch_dist import TRACKER, MegatronCheckpoint
from checkpoints.disk.torch_dist_metadata import METADATA
from checkpoints.disk.torch_dist_writer import MegatronWriter
from checkpoints.mappings import dense
from checkpoints.mappings.megatron_settings import check_saved
from checkpoints.mappings.tokenizer import Tokenizer, carried
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
        tokenizer: where the target is Megatron's: files of its folder of that name, by plain file name.
    """

    conversion: Conversion
    args: Mapping[str, object] | None
    files: Mapping[str, bytes]
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for beside formats and folders.

    Attributes:
        transformer_impl: the spec that is to load a checkpoint of Megatron's; None: not asked for.
        upcycling: what a dense model is to become, an ``upcycle.Upcycling``; None: not asked for.
        upcycling_words: the options that asked for it, for a message.
    """

    transformer_impl: str | None = None
    upcycling: Any = None
    upcycling_words: str = ""


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
# What config.json calls the models of each format of Hugging Face folders.
_MODEL_TYPES = {"hf-longcat": ("longcat_flash",), "hf-scmoe": ("scmoe",), "hf-dense": dense.MODEL_TYPES}


def check_pair(source: str, target: str, request: Request) -> None:
    """Raise CheckpointError where there is no way from one format to the other, or not with these options."""
    asked = f"--from {source} --to {target} {request.upcycling_words}".rstrip()
    if (source, target) not in PAIRS:
        through = source != target and (source, MEGATRON) in PAIRS and (MEGATRON, target) in PAIRS
        steps = f"take two steps: --from {source} --to {MEGATRON}, then --from {MEGATRON} --to {target}"
        raise CheckpointError(f"no way from {source} to {target}; {steps if through else 'nothing needs to be done'}")
    if request.upcycling and (source not in _UPCYCLED or target != MEGATRON):
        raise CheckpointError(
            f"upcycling makes {MEGATRON} checkpoints of {' or '.join(_UPCYCLED)}, and {asked} asks for another; drop "
            f"{request.upcycling_words}, or upcycle first"
        )
    if request.transformer_impl and (request.upcycling or (source, target) != (MEGATRON, MEGATRON)):
        raise CheckpointError(
            f"--transformer-impl turns one spec's checkpoint into the other's, in a step of its own: it is "
            f"{request.transformer_impl} with {asked}; drop it, then --from {MEGATRON} --to {MEGATRON} "
            f"--transformer-impl {request.transformer_impl}"
        )
    if target == MEGATRON and source in _UPCYCLED and not (request.upcycling or request.transformer_impl):
        other = " or --transformer-impl for the other spec" if source == MEGATRON else ""
        raise CheckpointError(f"from {source} to {target} something has to change: add --experts N to upcycle{other}")


def check_format(source: str, path: Path) -> None:
    """Raise CheckpointError unless ``path`` is a folder that may be a checkpoint of format ``source``."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; name that of a checkpoint")
    found = _seeming_format(path)
    if found not in (None, source):
        raise CheckpointError(f"{path} seems to be {found}, and --from is {source}; use --from {found}")


def opened(source: str, path: Path) -> MegatronCheckpoint | HFFolder:
    """A checkpoint of format ``source`` to read from.

    Raises:
        CheckpointError: where it is none, or damaged.
    """
    return MegatronCheckpoint(path) if source == MEGATRON else HFFolder(path)


def _seeming_format(path: Path) -> str | None:
    """The format that a folder seems to have, by its files and by what config.json calls the model; None: none."""
    if any((path / name).is_file() for name in (TRACKER, METADATA)):
        return MEGATRON
    if not (path / CONFIG).is_file():
        return None
    model_type = read_json(path / CONFIG).get("model_type")
    for name, known in _MODEL_TYPES.items():
        if model_type in known:
            return name
    types = ", ".join(kind for known in _MODEL_TYPES.values() for kind in known)
    raise CheckpointError(
        f"{path / CONFIG} has the model_type {model_type!r:.60}; models of these can be read: {types}"
    )


def mapped(source_format: str, target_format: str, source: MegatronCheckpoint | HFFolder, request: Request) -> Target:
    """What becomes of a source.

    Raises:
        CheckpointError: where its settings have no counterpart.
    """
    if isinstance(source, MegatronCheckpoint):
        check_saved(source)
    if request.upcycling:
        function = getattr(importlib.import_module("checkpoints.mappings.upcycle"), _UPCYCLED[source_format])
        call = partial(function, source, request.upcycling)
    else:
        module, name = PAIRS[source_format, target_format]
        call = partial(getattr(importlib.import_module(module), name), source)
        if request.transformer_impl:
            call = partial(call, transformer_impl=request.transformer_impl)
    try:
        target = call()
    except CheckpointError:
        raise
    except (
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # a setting that is not sound
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(
            f"{source.folder} has settings of which no {source_format} model can be made ({reason}); get it anew"
        ) from error
    return _with_tokenizer(target, carried(source)) if target_format == MEGATRON else target


def _with_tokenizer(target: Target, found: Tokenizer) -> Target:
    conversion = replace(target.conversion, notes=(*target.conversion.notes, *found.notes))
    return replace(target, conversion=conversion, tokenizer=found.files)


def writer(target_format: str, target: Target) -> MegatronWriter | HFWriter:
    """What writes ``target``.

    Raises:
        CheckpointError: for settings or file names that cannot be saved.
    """
    if target_format == MEGATRON:
        return MegatronWriter(target.conversion.expected, target.args or {}, target.tokenizer)
    return HFWriter(target.files)
