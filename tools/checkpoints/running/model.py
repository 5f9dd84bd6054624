"""A checkpoint as a model that runs forward, whichever format it has: ``load`` is the way in.

Only what a folder needs is imported: Megatron and transformers take seconds each.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.disk.hf_folder import CONFIG, HFFolder
from checkpoints.formats import is_megatron
from checkpoints.mappings.longcat import unused_tensors
from checkpoints.mappings.longcat_settings import MODEL_TYPE
from checkpoints.mappings.scmoe_names import AUTO_MAP, CODE
from checkpoints.running.scores import USUAL_LENGTH, Model, Scores
from checkpoints.settings import COUNT, check_layers
from checkpoints.tensors import CheckpointError

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")  # in config.json of one model or another


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
    """Load a Megatron checkpoint, ours or stock, or a Hugging Face folder; in a distributed job every rank calls it.

    Args:
        folder: of either kind.
        tensor: tensor-parallel size; this and the other sizes are for Megatron checkpoints alone.
        pipeline: pipeline-parallel size.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of experts; None: ``tensor``.
        dtype: of parameters; None: as they are stored.
        trust_remote_code: whether Python files of a Hugging Face folder may run.
        settings: of a Megatron checkpoint, in the place of those that it has saved.
    """
    if is_megatron(folder):
        from checkpoints.running.megatron_model import MegatronModel

        sizes = {"tensor": tensor, "pipeline": pipeline, "expert": expert}
        layout = {f"{name}_model_parallel_size": size for name, size in sizes.items()}
        layout["expert_tensor_parallel_size"] = expert_tensor or tensor
        return MegatronModel(folder, layout, dtype, settings or {})
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 or max(tensor, pipeline, expert, expert_tensor or 1) > 1:
        raise CheckpointError(
            f"a Hugging Face folder runs in one process: {folder} and {world_size} ranks, tensor {tensor}, pipeline "
            f"{pipeline}, expert {expert}; drop these, or convert it with tools/convert_checkpoint.py"
        )
    return HFModel(folder, dtype, trust_remote_code=trust_remote_code)


class HFModel(Model):
    """A Hugging Face folder in one process."""

    def __init__(self, folder: Path, dtype: torch.dtype | None, *, trust_remote_code: bool) -> None:
        """See ``load``; all weights have to be there."""
        stand_ins = sys.modules.get("megatron_scmoe.cpu.backend")
        if stand_ins is not None and stand_ins.is_installed():
            raise CheckpointError("transformers goes wrong where CUDA is replaced for Megatron; use another process")
        source = HFFolder(folder)
        for name in _LAYERS:
            if COUNT.holds(source.config.get(name)):
                check_layers(str(folder / CONFIG), source.config, name, source.infos)
        self._model = _loaded(source, dtype, trust=trust_remote_code)
        self._model = self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.vocab_size = int(self._model.config.vocab_size)
        self.max_length = int(getattr(self._model.config, "max_position_embeddings", None) or USUAL_LENGTH)
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


def _loaded(source: HFFolder, dtype: torch.dtype | None, *, trust: bool) -> Any:
    folder = source.folder
    is_longcat = source.config.get("model_type") == MODEL_TYPE
    own_code = not is_longcat and _own_code_may_run(folder, source.config, trust=trust)
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
            model, found = _longcat(source, **options)
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
    return model


def _longcat(source: HFFolder, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """LongcatFlash, also of published folders: rows of zero experts that they lack are zeros, which nothing reads.

    The class is always that of transformers: Python files in the folder do not run.
    """
    from safetensors.torch import load_file
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig.from_pretrained(source.folder, local_files_only=True)
    state = {name: tensor for shard in source.shards for name, tensor in load_file(shard).items()}
    for name, shape in unused_tensors(config.to_dict()).items():
        state.setdefault(name, torch.zeros(()).expand(shape))  # a single number in memory
    return LongcatFlashForCausalLM.from_pretrained(None, config=config, state_dict=state, **options)


def _own_code_may_run(folder: Path, config: Mapping[str, Any], *, trust: bool) -> bool:
    """Whether the folder brings code of its own that may run; no trust is needed in what is ours, byte by byte.

    Other code that is not trusted is refused.
    """
    if "auto_map" not in config:
        return False
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
