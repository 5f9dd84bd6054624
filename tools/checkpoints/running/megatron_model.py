"""A Megatron checkpoint as a model that runs forward, on a rank of any layout."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

if not torch.cuda.is_available():
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from checkpoints.disk.torch_dist import MegatronCheckpoint
from checkpoints.mappings.megatron_settings import check_saved
from checkpoints.mappings.norms import renamed_norms
from checkpoints.running.megatron_args import EMBEDDING, arguments
from checkpoints.running.scores import Model, Scores
from checkpoints.tensors import CheckpointError
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.models.container import model_config_from_args

logging.getLogger("megatron").setLevel(logging.ERROR)  # what else it says is for those who train


class MegatronModel(Model):
    """This rank's part of a Megatron checkpoint."""

    def __init__(
        self, folder: Path, layout: Mapping[str, int], dtype: torch.dtype | None, settings: Mapping[str, object]
    ) -> None:
        """See ``load``; ``layout`` has sizes by Megatron's names, and ``dtype`` is the embedding's if it is None."""
        # Its reader refuses pickles that hold more than a checkpoint's index, which Core's, used below, would load.
        source = MegatronCheckpoint(folder)
        check_saved(source)
        vars(source.args).update(settings)
        if EMBEDDING not in source.infos:
            raise CheckpointError(f"{source.folder} lacks {EMBEDDING}; get the whole checkpoint")
        _start_process_group()
        args, scmoe = arguments(source, layout, dtype or source.infos[EMBEDDING].dtype)
        parallel_state.initialize_model_parallel(**layout)
        tensor_parallel.model_parallel_cuda_manual_seed(
            1234
        )  # nothing is drawn, but Megatron's layers ask for its generators
        self._module = _built(args, scmoe)
        _load_weights(self._module, source, args)
        self.vocab_size = min(args.vocab_size or args.padded_vocab_size, args.padded_vocab_size)
        self.max_length, self.usual_length = args.max_position_embeddings, args.seq_length
        self.length_multiple = args.tensor_model_parallel_size if args.sequence_parallel else 1
        stages = args.pipeline_model_parallel_size
        self.micro_batches = 1 if stages == 1 else 2 * stages
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.collects = parallel_state.is_pipeline_last_stage() and tensor_rank == 0
        self.layout = {"world_size": dist.get_world_size(), **layout}

    @torch.no_grad()
    def score(self, tokens: Tensor, labels: Tensor, *, with_logits: bool = False) -> list[Scores]:
        """See ``Model``."""
        device = torch.cuda.current_device()

        def step(batches: Iterator[tuple[Tensor, Tensor]], module: torch.nn.Module) -> tuple[Tensor, Any]:
            ids, targets = (part.to(device) for part in next(batches))
            positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
            return module(ids, positions, None), partial(self._scores, targets, with_logits)

        num_micro_batches, size, length = tokens.shape
        scores = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=zip(tokens, labels, strict=True),
            model=[self._module],
            num_microbatches=num_micro_batches,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return scores if self.collects else []

    def _scores(self, labels: Tensor, with_logits: bool, logits: Tensor, *, non_loss_data: bool) -> Scores:
        """Scores of one micro-batch, from this rank's columns of the logits, [b, s, columns]."""
        assert non_loss_data
        whole = None
        if with_logits:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            whole = whole[..., : self.vocab_size].float().cpu().clone()
        # Core's loss as in training, over all rows that the model has; it overwrites the logits that it is given.
        columns = logits.transpose(0, 1).float().clone(memory_format=torch.contiguous_format)
        losses = tensor_parallel.vocab_parallel_cross_entropy(columns, labels.transpose(0, 1).contiguous())
        return Scores(losses.transpose(0, 1).contiguous().cpu(), whole)

    def summed(self, values: Tensor) -> Tensor:
        """See ``Model``."""
        result = values.to(torch.cuda.current_device(), copy=True)
        dist.all_reduce(result)
        return result.cpu()

    def shared(self, value: Any) -> Any:
        """See ``Model``."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def _start_process_group() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _built(args: Namespace, scmoe: ScMoEConfig) -> Any:
    """This rank's part of the model, on its device."""
    config = model_config_from_args(args, scmoe)
    module = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    module.cuda(torch.cuda.current_device())
    return (Float16Module(config.transformer, module) if args.bf16 or args.fp16 else module).eval()


def _load_weights(module: Any, source: MegatronCheckpoint, args: Namespace) -> None:
    """Fill the parameters of this rank; refuses, on every rank alike, what lacks a tensor of the model or has more."""
    with _says_what_is_wrong(source), warnings.catch_warnings(action="ignore"):
        metadata = dist_checkpointing.load_content_metadata(str(source.folder)) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # Extra state is that of low-precision training. Checkpoints that were converted have none.
    sharded = {
        name: value
        for name, value in module.sharded_state_dict(metadata=metadata).items()
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    }
    then_by_now = _names_in_checkpoint(source.args, args)
    for value in sharded.values():
        value.key = then_by_now.get(value.key, value.key)
    with _says_what_is_wrong(source), warnings.catch_warnings(action="ignore"):  # of torch, about what Core calls
        state, unused, lacking = dist_checkpointing.load(
            {"model": sharded}, str(source.folder), strict=StrictHandling.RETURN_ALL
        )
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, lacking)
    if names := sorted(set().union(*of_ranks)):
        raise CheckpointError(
            f"{source.folder} lacks {len(names)} tensors of its model, such as {names[0]}; get it whole"
        )
    keys = {*source.infos, *map(_all_blocks, source.infos)}
    # Learned compensation of the codec: with every token on its way as it is, there is nothing to compensate. And
    # prediction layers: scores are those of the next token.
    needless = re.compile(r"\.residual_map\.|^mtp\.")
    if names := sorted(name for name in unused if name in keys and not needless.search(name)):
        raise CheckpointError(
            f"{source.folder} has {len(names)} tensors that its model has no place for, such as {names[0]}; its saved "
            "settings are those of another model"
        )
    module.load_state_dict(state["model"], strict=False)


@contextlib.contextmanager
def _says_what_is_wrong(source: MegatronCheckpoint) -> Iterator[None]:
    """A damaged index makes Core and torch raise all kinds of errors; torch's own is not even an Exception."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if isinstance(error, OSError):
            raise
        # Torch's is of all ranks, and its words are their tracebacks.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        raise CheckpointError(f"{source.folder} does not fit its own settings, or is damaged ({reason})") from error


def _names_in_checkpoint(then: Namespace, now: Namespace) -> dict[str, str]:
    """Names of norms that the checkpoint's spec has otherwise than this machine's, by the latter."""
    in_checkpoint = Namespace(**{**vars(now), "transformer_impl": getattr(then, "transformer_impl", "local")})
    renamed = renamed_norms(now, in_checkpoint)
    return renamed | {_all_blocks(new): _all_blocks(old) for new, old in renamed.items()}


def _all_blocks(name: str) -> str:
    """The name of one block's tensor without the block, as where all blocks are in one tensor."""
    return re.sub(r"(decoder\.layers\.)\d+\.", r"\1", name)
