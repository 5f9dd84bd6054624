"""A checkpoint as a model that runs forward, whichever format it has: ``load`` is the way in.

Only what a folder needs is imported: Megatron and transformers take seconds each.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.settings import COUNT, check_layers
from checkpoints.tensors import CheckpointError

MEGATRON, HUGGING_FACE = "megatron", "huggingface"
LONGCAT = "longcat_flash"  # model_type
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")  # in config.json of one model or another
USUAL_LENGTH = 2048
"""Tokens of a window where a checkpoint does not say on how many it was trained."""


class Scores(NamedTuple):
    """What a model makes of one micro-batch, on the CPU.

    Attributes:
        losses: of each label, in nats, float32, [b, s].
        logits: float32, [b, s, vocabulary]; None unless asked for.
    """

    losses: Tensor
    logits: Tensor | None


class Model(Protocol):
    """A model that is ready to run forward, or this rank's part of one.

    Attributes:
        vocab_size: token ids are below this.
        max_length: most tokens of a window.
        usual_length: tokens of a window in training, as far as the checkpoint says.
        length_multiple: windows have a multiple of this many tokens.
        micro_batches: in one call that keep all ranks of a pipeline busy.
        data_rank: which of ``data_size`` parts of the windows this rank gets.
        data_size: number of those parts.
        collects: whether this rank gets scores; all others get none.
        layout: of all ranks, in Megatron's words.
    """

    vocab_size: int
    max_length: int
    usual_length: int
    length_multiple: int
    micro_batches: int
    data_rank: int
    data_size: int
    collects: bool
    layout: Mapping[str, int]

    def score(self, tokens: Tensor, labels: Tensor, *, with_logits: bool = False) -> list[Scores]:
        """Run forward; every rank calls it, with equal shapes.

        Args:
            tokens: of this rank's part, [micro-batches, b, s].
            labels: the token behind each of them.
            with_logits: whether logits are returned too; the same on every rank.

        Returns:
            One for each micro-batch; none where this rank does not collect.
        """

    def summed(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks."""

    def shared(self, value: Any) -> Any:
        """The value that rank 0 has."""


def kind(folder: Path) -> str:
    """``MEGATRON`` or ``HUGGING_FACE``.

    Raises:
        CheckpointError: for a folder that is neither.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name that of a checkpoint")
    if any((folder / name).is_file() for name in ("latest_checkpointed_iteration.txt", ".metadata")):
        return MEGATRON
    if (folder / CONFIG).is_file():
        return HUGGING_FACE
    raise CheckpointError(
        f"{folder} is no checkpoint: it has neither latest_checkpointed_iteration.txt (Megatron) nor {CONFIG} (Hugging "
        "Face); name the folder that has one"
    )


def open_folder(folder: Path) -> MegatronCheckpoint | HFFolder:
    """What is in a folder of either kind; headers are read, tensors are not.

    Raises:
        CheckpointError: for a folder of neither, or a damaged one.
    """
    return MegatronCheckpoint(folder) if kind(folder) == MEGATRON else HFFolder(folder)


def load(
    folder: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Model:
    """Load a checkpoint for running it forward; in a distributed job every rank calls it.

    Args:
        folder: of a Megatron checkpoint, ours or stock, or of Hugging Face.
        tensor: tensor-parallel size; this and the other sizes are for Megatron checkpoints alone.
        pipeline: pipeline-parallel size.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of experts; None: ``tensor``.
        dtype: of parameters; None: as they are stored.
        trust_remote_code: whether Python files of a Hugging Face folder may run.
        settings: of a Megatron checkpoint, in the place of those that it has saved.

    Raises:
        CheckpointError: where it is damaged, or cannot run here or in this layout.
    """
    if kind(folder) == MEGATRON:
        from checkpoints.running.megatron_model import Layout, MegatronModel

        layout = Layout(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor or tensor)
        return MegatronModel(folder, layout, dtype, settings or {})
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 or max(tensor, pipeline, expert, expert_tensor or 1) > 1:
        raise CheckpointError(
            f"a Hugging Face folder runs in one process: {folder} and {world_size} ranks, tensor {tensor}, pipeline "
            f"{pipeline}, expert {expert}; drop these, or convert it with tools/convert_checkpoint.py"
        )
    return HFModel(folder, dtype, trust_remote_code=trust_remote_code)


class HFModel:
    """A Hugging Face folder as a ``Model``, in one process."""

    length_multiple = micro_batches = data_size = 1
    data_rank = 0
    collects = True
    layout: Mapping[str, int] = {"world_size": 1}

    def __init__(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool) -> None:
        """
        Args:
            folder: with config.json and safetensors.
            dtype: of parameters; None: as they are stored.
            trust_remote_code: whether Python files in it may run.

        Raises:
            CheckpointError: where weights are missing or do not fit, or code is not trusted.
        """
        stand_ins = sys.modules.get("megatron_scmoe.cpu.backend")
        if stand_ins is not None and stand_ins.is_installed():
            raise CheckpointError("transformers goes wrong where CUDA is replaced for Megatron; use another process")
        source = HFFolder(folder)
        for name in _LAYERS:
            if COUNT.holds(source.config.get(name)):
                check_layers(str(folder / CONFIG), source.config, name, source.infos)
        is_longcat = source.config.get("model_type") == LONGCAT
        own_code = not is_longcat and _own_code_may_run(folder, source.config, trust=trust_remote_code)
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError as error:
            raise CheckpointError("Hugging Face folders need transformers; pip install transformers") from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        options = {"dtype": dtype or "auto", "local_files_only": True, "output_loading_info": True}
        try:
            if is_longcat:
                from checkpoints.running import longcat_model

                model, found = longcat_model.load(source, **options)
            else:
                model, found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=own_code, **options)
        except Exception as error:  # code of the folder can raise anything
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"transformers cannot load {folder}: {reason!a}; see config.json") from error
        lacking = [*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]
        if lacking:
            raise CheckpointError(
                f"{folder} lacks {len(lacking)} tensors that its model has, or has them in another shape, such as "
                f"{lacking[0]}; they would be random: get it whole, or convert it anew"
            )
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.vocab_size = int(model.config.vocab_size)
        self.max_length = int(getattr(model.config, "max_position_embeddings", None) or USUAL_LENGTH)
        self.usual_length = min(self.max_length, USUAL_LENGTH)

    @torch.no_grad()
    def score(self, tokens: Tensor, labels: Tensor, *, with_logits: bool = False) -> list[Scores]:
        """See ``Model``."""
        scores = []
        for ids, targets in zip(tokens, labels, strict=True):
            logits = self._model(input_ids=ids.to(self._model.device), use_cache=False).logits.float()
            chosen = targets.flatten().to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen, reduction="none")
            scores.append(Scores(losses.view_as(targets).cpu(), logits.cpu() if with_logits else None))
        return scores

    def summed(self, values: Tensor) -> Tensor:
        """See ``Model``."""
        return values

    def shared(self, value: Any) -> Any:
        """See ``Model``."""
        return value


def _own_code_may_run(folder: Path, config: Mapping[str, Any], *, trust: bool) -> bool:
    """Whether the folder brings code of its own that may run; no trust is needed in what is ours, byte by byte.

    Raises:
        CheckpointError: for code that is not trusted.
    """
    if "auto_map" not in config:
        return False
    from checkpoints.mappings.scmoe_names import AUTO_MAP, CODE

    # A class may be named in a folder below, in another one, or on the Hub ("repository--module.Class"); and
    # custom_generate/generate.py runs while a model is loaded, whoever's classes it has.
    ours = config["auto_map"] == AUTO_MAP and all(_is_copy(path, CODE / path.name) for path in folder.glob("*.py"))
    if trust or (ours and not os.path.lexists(folder / "custom_generate")):
        return True
    raise CheckpointError(
        f"{folder} brings Python code of its own, which would run with your rights: {CONFIG} has auto_map; read what "
        "it names, and custom_generate if there is one, then add --trust-remote-code"
    )


def _is_copy(path: Path, original: Path) -> bool:
    return not path.is_symlink() and original.is_file() and original.read_bytes() == path.read_bytes()
