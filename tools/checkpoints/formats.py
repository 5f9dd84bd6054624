"""Which format becomes which, and by what: the table of pairs, and what opens and writes a format."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.disk.hf_folder import CONFIG, HFFolder, HFWriter, read_config
from checkpoints.disk.torch_dist import TRACKER, MegatronCheckpoint
from checkpoints.disk.torch_dist_metadata import METADATA
from checkpoints.disk.torch_dist_writer import MegatronWriter
from checkpoints.mappings import dense, hybrid, optimizers
from checkpoints.mappings.megatron_settings import check_saved
from checkpoints.mappings.tokenizer import carried
from checkpoints.plan import Target
from checkpoints.tensors import Checkpoint, CheckpointError, check_plain

MEGATRON = "megatron"


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


def check_pair(
    source: str,
    target: str,
    *,
    transformer_impl: str | None,
    upcycling: str,
    number: str | None = None,
    container: str | None = None,
) -> None:
    """Refuse a way from one format to the other that does not exist, or not with these options.

    ``transformer_impl`` is the spec that is to load a checkpoint of Megatron's, if another one is asked for,
    ``upcycling`` are the words that ask for that, or none, ``number`` is that of optimizers, if they go along, and
    ``container`` the one that is to hold the result, if it is asked for.
    """
    asked = f"--from {source} --to {target} {upcycling}".rstrip()
    if (source, target) not in PAIRS:
        through = source != target and (source, MEGATRON) in PAIRS and (MEGATRON, target) in PAIRS
        steps = f"take two steps: --from {source} --to {MEGATRON}, then --from {MEGATRON} --to {target}"
        raise CheckpointError(f"no way from {source} to {target}; {steps if through else 'nothing needs to be done'}")
    if upcycling and (source not in _UPCYCLED or target != MEGATRON):
        raise CheckpointError(
            f"upcycling makes {MEGATRON} checkpoints of {' or '.join(_UPCYCLED)}, and {asked} asks for another; drop "
            f"{upcycling}, or upcycle first"
        )
    _check_container(asked, container, target, number)
    if number and (transformer_impl or upcycling or (source, target) != (MEGATRON, MEGATRON)):
        spec = f"--transformer-impl {transformer_impl}" if transformer_impl else ""
        raise CheckpointError(
            "moments are rewritten from one run of a model to another, in a step of its own: --with-optimizer is set "
            f"with {' '.join(f'{asked} {spec}'.split())}; drop it, then --from {MEGATRON} --to {MEGATRON} "
            "--with-optimizer"
        )
    if transformer_impl and (upcycling or (source, target) != (MEGATRON, MEGATRON)):
        raise CheckpointError(
            f"--transformer-impl turns one spec's checkpoint into the other's, in a step of its own: it is "
            f"{transformer_impl} with {asked}; drop it, then --from {MEGATRON} --to {MEGATRON} "
            f"--transformer-impl {transformer_impl}"
        )
    changes = upcycling or transformer_impl or number or (container if source == MEGATRON else None)
    if target == MEGATRON and source in _UPCYCLED and not changes:
        other = " or --transformer-impl for the other spec" if source == MEGATRON else ""
        other += ", or --container for the other one" if source == MEGATRON else ""
        other += ", or --with-optimizer for another number of optimizers" if source == MEGATRON else ""
        raise CheckpointError(f"from {source} to {target} something has to change: add --experts N to upcycle{other}")


def _check_container(asked: str, container: str | None, target: str, number: str | None) -> None:
    if container and (target != MEGATRON or number):
        raise CheckpointError(
            f"--container says what holds a {MEGATRON} checkpoint, without moments: it is {container} with {asked}"
            f"{' --with-optimizer' if number else ''}; drop one of them"
        )


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a checkpoint of Megatron's, by its files; refuses what is no folder."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name that of a checkpoint")
    return any((folder / name).is_file() for name in (TRACKER, METADATA))


def check_format(source: str, path: Path) -> None:
    """Refuse a folder that is seen to be a checkpoint of another format than ``source``, or of one that is not read."""
    found: str | None = MEGATRON if is_megatron(path) else None
    if not found and (path / CONFIG).is_file():
        model_type = read_config(path / CONFIG).get("model_type")
        found = next((name for name, known in _MODEL_TYPES.items() if model_type in known), None)
        if not found:
            types = ", ".join(kind for known in _MODEL_TYPES.values() for kind in known)
            raise CheckpointError(
                f"{path / CONFIG} has the model_type {model_type!r:.60}; models of these can be read: {types}"
            )
    if found not in (None, source):
        raise CheckpointError(f"{path} seems to be {found}, and --from is {source}; use --from {found}")


def opened(source: str, path: Path) -> Checkpoint:
    """A checkpoint of format ``source`` to read from; a hybrid one as that of a GPT model, if it can be."""
    return hybrid.opened(path) if source == MEGATRON else HFFolder(path)


def opened_run(path: Path) -> MegatronCheckpoint:
    """A checkpoint of Megatron's with all that a run goes on from; refuses one whose moments cannot be rewritten."""
    optimizers.check(MegatronCheckpoint(path))
    return MegatronCheckpoint(path, as_saved=True)


def open_any(folder: Path) -> MegatronCheckpoint | HFFolder:
    """What is in a folder of either kind; headers are read, tensors are not."""
    if is_megatron(folder):
        return MegatronCheckpoint(folder)
    if (folder / CONFIG).is_file():
        return HFFolder(folder)
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither {TRACKER} (Megatron) nor {CONFIG} (Hugging Face); name the folder "
        "that has one"
    )


def mapped(
    source_format: str,
    target_format: str,
    source: Checkpoint,
    *,
    transformer_impl: str | None,
    upcycling: Any,
    number: str | None = None,
    container: str | None = None,
) -> Target:
    """What becomes of a source; refuses settings that have no counterpart, and quantized weights.

    ``transformer_impl`` is a spec, ``upcycling`` an ``upcycle.Upcycling``, ``number`` that of optimizers,
    ``container`` what is to hold the result; None: not asked for.
    """
    if isinstance(source, MegatronCheckpoint) and not number:
        check_saved(source)
    check_plain(source)
    module, name = PAIRS[source_format, target_format]
    options: dict[str, Any] = {"transformer_impl": transformer_impl} if transformer_impl else {}
    if number:
        module, name, options = optimizers.__name__, "convert", {"optimizers": number}
    if upcycling:
        module, name, options = "checkpoints.mappings.upcycle", _UPCYCLED[source_format], {"options": upcycling}
    if container and not (options or source_format != MEGATRON):
        _check_other_container(source, container)
        module, name = hybrid.__name__, "unchanged"
    try:
        target = getattr(importlib.import_module(module), name)(source, **options)
        if target_format == MEGATRON and not number:
            target = hybrid.in_container(target, container, source)
    except CheckpointError:
        raise
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        # of a setting that is not sound
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise CheckpointError(
            f"{source.folder} has settings of which no {source_format} model can be made ({reason}); get it anew"
        ) from error
    if target_format != MEGATRON or number:
        return target
    tokenizer = carried(source)
    conversion = replace(target.conversion, notes=(*target.conversion.notes, *tokenizer.notes))
    return replace(target, conversion=conversion, tokenizer=tokenizer.files)


def _check_other_container(source: Checkpoint, container: str) -> None:
    if (found := hybrid.container_of(source)) == container:
        raise CheckpointError(f"nothing to convert: the container of {source.folder} is {found} already")


def writer(target_format: str, target: Target) -> MegatronWriter | HFWriter:
    """What writes ``target``; refuses settings and file names that cannot be saved."""
    if target_format == MEGATRON:
        carried = target.conversion.carried if target.common else None
        expected, args = target.conversion.expected, target.args or {}
        return MegatronWriter(expected, args, target.tokenizer, common=target.common, carried=carried)
    return HFWriter(target.files)
