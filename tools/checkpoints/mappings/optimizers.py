"""A run's checkpoint, moments and all, for a run whose experts have an optimizer of their own, or no longer have one.

Core gives experts that are split unlike the dense layers an optimizer of their own, chained behind the other one. Of
what it saves, one thing follows that: each optimizer has a table of its groups of parameters and their
hyperparameters. Moments have the names of their parameters, so they stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from checkpoints import settings as rules
from checkpoints.disk.torch_dist import OPTIMIZER, RERUN, MegatronCheckpoint, other_reason
from checkpoints.plan import Conversion, Piece, Read, Target
from checkpoints.settings import COUNT, optional
from checkpoints.tensors import CheckpointError, TensorInfo

ONE, TWO, OTHER = "one", "two", "other"
"""How many optimizers the result has: a number, or the one that the source does not have."""
LOADED_WITH = {
    ONE: "--expert-model-parallel-size 1 and an --expert-tensor-parallel-size that is --tensor-model-parallel-size",
    TWO: "--expert-model-parallel-size above 1, or another --expert-tensor-parallel-size than "
    "--tensor-model-parallel-size",
}
_BY_PARAMETER = "fully_reshardable"  # a format of the distributed optimizer
_MOMENT = re.compile(r"optimizer\.state\.([^.]+)\.(.+)")
_PIECE_BYTES = 1 << 28

type Groups = list[dict[str, Any]]


def check(source: MegatronCheckpoint) -> None:
    """Refuse a checkpoint without moments, or in a format in which they have not the names of their parameters."""
    folder, args = source.folder, vars(source.args)
    keys = [key for key, reason in source.others.items() if reason == OPTIMIZER]
    if "optimizer" not in source.common and not keys:
        raise CheckpointError(f"{folder} has no optimizer: it is a release, or of --no-save-optim; any layout loads it")
    rules.check(f"the saved arguments of {folder}", args, {"num_experts": optional(COUNT)})
    rules.check(f"{folder}", {"iteration": source.iteration}, {"iteration": COUNT})
    if not args.get("num_experts"):
        raise CheckpointError(f"{folder} has no experts, so that every layout has one optimizer; any loads it")
    if (name := args.get("optimizer")) not in ("adam", "sgd"):
        raise CheckpointError(
            f"moments are rewritten of adam and sgd: the optimizer in {folder} is {str(name)[:40]!a}; "
            "load it with --no-load-optim"
        )
    metadata = source.common.get("content_metadata")
    kind = metadata.get("distrib_optim_sharding_type") if isinstance(metadata, Mapping) else None
    if kind != (_BY_PARAMETER if args.get("use_distributed_optimizer") else None):
        raise CheckpointError(
            f"moments in {folder} have not the names of their parameters: its optimizer has the format "
            f"{str(kind)[:40]!a}; load it in the layout that saved it, and save it with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    if chained := next((key for key in keys if not key.startswith("optimizer.")), None):
        raise CheckpointError(
            f"moments in {folder} have the names of an older Megatron, as {chained[:80]!a}; load it in the layout that "
            "saved it, and save it with this one"
        )


def convert(source: MegatronCheckpoint, *, optimizers: str) -> Target:
    """``source``, opened ``as_saved``, with so many ``optimizers``; raises CheckpointError also if it has them."""
    found = _tables(source)
    there, other = (ONE, TWO) if len(found) == 1 else (TWO, ONE)
    if optimizers == there:
        raise CheckpointError(
            f"nothing to convert: --optimizers is {there}, as many as {source.folder} has; load it with "
            f"{LOADED_WITH[there]}"
        )
    table = _divided(source, found[0]) if other == TWO else _joined(source, *found)
    dropped = {key: RERUN for key in source.objects if other_reason(key) == RERUN}
    conversion = Conversion(
        pieces=tuple(_pieces(source.infos)),
        expected=_expected(source.infos),
        dropped=dropped,
        carried={key: extent for key, extent in source.objects.items() if key not in dropped},
        notes=_notes(source, other),
    )
    rest = {key: value for key, value in source.common.items() if key != "rerun_state_machine"}
    common = {**rest, "optimizer": table, "iteration": source.iteration}
    return Target(conversion=conversion, args=vars(source.args), common=common)


def _tables(source: MegatronCheckpoint) -> list[dict[str, Any]]:
    """What was saved of each optimizer beside its tensors: that of the dense layers, or of all, comes first."""
    saved = source.common["optimizer"]
    chained = all(isinstance(key, int) for key in saved)
    tables = [saved[key] for key in sorted(saved)] if chained else [saved]
    own = [{group["is_expert_parallel"] for group in _groups(table)} for table in tables]
    if own not in ([{False}], [{False}, {True}]):
        raise CheckpointError(
            f"{source.folder} has optimizers for other parts than dense layers and experts, as "
            "--overlap-param-gather-with-optimizer-step makes them; save it without that"
        )
    return tables


def _groups(table: Mapping[str, Any]) -> Groups:
    return table["optimizer"]["param_groups"] if "optimizer" in table else table["param_groups"]


def _with_groups(table: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    if "optimizer" in table:
        return {**table, "optimizer": {**table["optimizer"], "param_groups": groups}}
    return {**table, "param_groups": groups}


def _divided(source: MegatronCheckpoint, table: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The tables of two optimizers, of that of one.

    Experts get a copy of the groups that they have been in: that of matrices, and that without weight decay if they
    have biases. Other groups are those of embeddings (--decoupled-lr).
    """
    has_bias = any(".experts." in name and name.endswith(".bias") for name in source.infos)
    common = [group for group in _groups(table) if group["default_config"]]
    decayed = [bool(group["wd_mult"]) for group in common]
    if getattr(source.args, "use_mup", False) or decayed.count(True) != 1 or decayed.count(False) > 1:
        raise CheckpointError(
            f"{source.folder} has groups of parameters beside those with and without weight decay, and it is not "
            "known in which of them experts are; load it with --no-load-optim"
        )
    own = [{**group, "is_expert_parallel": True} for group in common if group["wd_mult"] or has_bias]
    return {0: table, 1: _with_groups(table, own)}


def _joined(source: MegatronCheckpoint, dense: dict[str, Any], experts: dict[str, Any]) -> dict[str, Any]:
    """The table of one optimizer, of those of two; refuses two that have not the same settings and steps."""
    rest = [_plain(_with_groups(table, [])) for table in (dense, experts)]
    there = [_plain(group) for group in _groups(dense)]
    own = [_plain({**group, "is_expert_parallel": False}) for group in _groups(experts)]
    if rest[0] != rest[1] or any(group not in there for group in own):
        raise CheckpointError(
            f"experts in {source.folder} have other settings, or another step, than the dense layers, which one "
            "optimizer cannot have; load it with --no-load-optim"
        )
    return dense


def _plain(value: Any) -> Any:
    """Tensors as lists, so that ``==`` compares what is in them."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _pieces(infos: Mapping[str, TensorInfo]) -> Iterator[Piece]:
    """Every tensor as it is, in pieces of a size that fits into memory, or of a row that does not."""
    for name, info in infos.items():
        step = max(1, _PIECE_BYTES * info.num_rows // max(1, info.nbytes))
        for start in range(0, max(1, info.num_rows), step):
            stop = min(start + step, info.num_rows)
            yield Piece(name=name, info=info.with_rows(stop - start), reads=(Read(name, start, stop),), row=start)


def _expected(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The model's tensors, and of each that is trained what the optimizer keeps of those with its dtype."""
    model = {name: info for name, info in infos.items() if not _MOMENT.fullmatch(name)}
    found = [(kind, name) for key in infos for kind, name in _MOMENT.findall(key) if name in model]
    kinds = {(kind, model[name].dtype): infos[f"optimizer.state.{kind}.{name}"].dtype for kind, name in found}
    moments = {
        f"optimizer.state.{kind}.{name}": TensorInfo(model[name].shape, dtype)
        for name in {name for _, name in found}
        for (kind, of), dtype in kinds.items()
        if of == model[name].dtype
    }
    return model | moments


def _notes(source: MegatronCheckpoint, other: str) -> tuple[str, ...]:
    moments = {match[2] for key in source.infos if (match := _MOMENT.fullmatch(key))}
    fixed = [key for key in source.infos if not _MOMENT.fullmatch(key) and key not in moments]
    number = "two optimizers, that of experts apart" if other == TWO else "one optimizer for all"
    notes = [
        f"{number}: load it with {LOADED_WITH[other]}",
        "hyperparameters, steps, scheduler and iteration go on; so do random numbers where tensor and pipeline sizes "
        "are those of the run that saved them, as Core has it",
    ]
    if fixed:
        notes.append(f"{len(fixed)} tensors have no moments, as what is not trained has none: {fixed[0]}, ...")
    return tuple(notes)
