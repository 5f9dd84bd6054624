"""Each pipeline stage as one of its ranks builds it, without data: its parameters, and what they keep in memory."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_attr_wrapped_model
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.models.base import ModelConfig

from megatron_scmoe.dry_run.memory import Parameters, Standing, standing_bytes
from megatron_scmoe.dry_run.meta import META, SavedForBackward, balance, shapes_only
from megatron_scmoe.layers.group import GroupBlock, passes_through
from megatron_scmoe.mcore import checkpoints
from megatron_scmoe.mcore.fake_world import fake_world, first_ranks_of_stages
from megatron_scmoe.training import resume

_Form = tuple[Any, ...]
"""What tells a part of the model from one that keeps other activations."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One rank of a pipeline stage.

    Attributes:
        blocks: that it holds.
        moe_layers: how many of them have routed experts.
        predictions: layers behind them that predict further tokens.
        held: parameters on this rank.
        in_the_model: parameters that the ranks of the stage hold together, but for the copy of tied embeddings.
        standing: bytes for parameters, gradients and optimizer.
        saved: bytes that autograd keeps of one micro-batch, for each virtual stage.
        in_flight: micro-batches of which it is kept at once, for each virtual stage.
        recomputed: bytes on top of these while blocks are recomputed.
    """

    blocks: list[int]
    moe_layers: int
    predictions: int
    held: Parameters
    in_the_model: Parameters
    standing: Standing
    saved: list[int]
    in_flight: list[int]
    recomputed: int

    @property
    def activations(self) -> int:
        """Bytes of them at their most."""
        return self.recomputed + sum(saved * number for saved, number in zip(self.saved, self.in_flight, strict=True))

    @property
    def total(self) -> int:
        """Bytes of all that is estimated."""
        return self.standing.total + self.activations


def find_stages(args: Namespace, config: ModelConfig) -> list[Stage]:
    """Every pipeline stage of the world of ``args``, which are validated and the global ones.

    Raises:
        ConfigError: where a training would be refused as soon as its model is there.
    """
    with fake_world(args, 0):
        ranks = first_ranks_of_stages()
    found, buckets = [], {}
    known: dict[_Form, tuple[int, int]] = {}
    for rank in ranks:
        with fake_world(args, rank) as groups, shapes_only():
            chunks = _build(args, config, groups)
            buckets[rank] = [bucket for chunk in chunks for bucket in checkpoints.padded_buckets(chunk)]
            found.append(_stage(args, chunks, known))
    resume.refuse_padded_buckets(args, buckets)
    return found


def _build(args: Namespace, config: ModelConfig, groups: ProcessGroupCollection) -> list[Any]:
    """This rank's part of the model as Megatron's trainer builds it, with buffers for gradients."""
    chunks = config.get_builder_cls()(config).build_distributed_models(
        groups, ddp_config=pretrain_cfg_container_from_args(args, config).ddp
    )
    for chunk in chunks:
        balance(chunk)
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook(param_sync=False)  # there is nothing to gather
    return chunks


def _form(chunk: torch.nn.Module) -> _Form:
    spans = tuple(module.span for module in chunk.modules() if isinstance(module, GroupBlock))
    return tuple(span and span.shape for span in spans), tuple(
        (name, parameter.shape) for name, parameter in chunk.named_parameters()
    )


def _stage(args: Namespace, chunks: list[Any], known: dict[_Form, tuple[int, int]]) -> Stage:
    for chunk in chunks:
        if (form := _form(chunk.module)) not in known:  # most stages of a long pipeline are alike
            known[form] = _saved_bytes(args, chunk.module)
    saved = [known[_form(chunk.module)] for chunk in chunks]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    copy_of_tied = parallel_state.get_pipeline_model_parallel_rank() > 0
    own = [one for one in parameters if not (copy_of_tied and getattr(one, "shared_embedding", False))]
    return Stage(
        blocks=[layer.layer_number - 1 for chunk in chunks for layer in _core_model(chunk).decoder.layers],
        moe_layers=sum(
            isinstance(module, MoELayer) for chunk in chunks for module in _core_model(chunk).decoder.modules()
        ),
        predictions=sum(len(_predictions(chunk)) for chunk in chunks),
        held=Parameters.on_this_rank(parameters),
        in_the_model=Parameters.in_the_model(own),
        standing=standing_bytes(args, chunks),
        saved=[kept for kept, _ in saved],
        in_flight=micro_batches_in_flight(
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            num_stages=args.pipeline_model_parallel_size,
            num_chunks=len(chunks),
            round_size=args.microbatch_group_size_per_vp_stage or args.pipeline_model_parallel_size,
            num_micro_batches=get_num_microbatches(),
        ),
        recomputed=max(more for _, more in saved),
    )


def micro_batches_in_flight(
    *, stage: int, num_stages: int, num_chunks: int, round_size: int, num_micro_batches: int
) -> list[int]:
    """Micro-batches that have gone forward and not yet back, at their most, for each of a stage's model chunks.

    Core's 1F1B schedules: a stage goes forward with ``num_stages - stage - 1`` of them before the first turns back
    behind one more. Interleaved, chunks take turns, ``round_size`` micro-batches each, and twice as many are under way
    on top of what the other chunks hold.
    """
    ahead = num_stages - stage - 1
    if num_chunks > 1:
        ahead = 2 * ahead + (num_chunks - 1) * round_size
    forwards = min(ahead + 1, num_micro_batches * num_chunks)
    chunk_of = [index // round_size % num_chunks for index in range(forwards)]
    return [chunk_of.count(chunk) for chunk in range(num_chunks)]


def _saved_bytes(args: Namespace, chunk: torch.nn.Module) -> tuple[int, int]:
    """What autograd keeps of one micro-batch that went forward through ``chunk``; and what more, for a while.

    That is where ``--recompute-granularity full`` runs blocks again: by then what was kept of those behind is gone.
    """
    kept, in_all = _saved_by_block(args, chunk)
    if args.recompute_granularity != "full":
        return in_all, 0
    model_config = _core_model(chunk).decoder.config
    model_config.recompute_granularity = None
    whole, _ = _saved_by_block(args, chunk)
    model_config.recompute_granularity = "full"
    layers = _layers(chunk)
    unit, recomputed = args.recompute_num_layers, len(layers)
    if args.recompute_method == "block":
        unit, recomputed = 1, min(args.recompute_num_layers, len(layers) - len(_predictions(chunk)))
    ends = [min(first + unit, len(layers)) for first in range(0, recomputed, unit)]
    # The last layer of a span runs all of it: what is recomputed before it passes its input through.
    ends = [end for end in ends if not passes_through(layers[end - 1])]
    peaks = [kept[first] + whole[end] - whole[first] for first, end in pairwise([0, *ends])]
    return in_all, max([0, *(peak - in_all for peak in peaks)])


def _saved_by_block(args: Namespace, chunk: torch.nn.Module) -> tuple[list[int], int]:
    """Let one micro-batch go forward; bytes that were kept before each layer and behind the last one, and in all."""
    saved = SavedForBackward(chunk)
    blocks = _layers(chunk)
    so_far: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda *_: so_far.append(saved.nbytes)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: so_far.append(saved.nbytes)) for block in blocks[-1:]]
    _forward(args, chunk, saved)
    for hook in hooks:
        hook.remove()
    return so_far, saved.nbytes


def _layers(chunk: torch.nn.Module) -> list[Any]:
    """Its blocks, and the prediction layers behind them."""
    return [*_core_model(chunk).decoder.layers, *_predictions(chunk)]


def _predictions(chunk: torch.nn.Module) -> list[Any]:
    model = _core_model(chunk)
    return list(model.mtp.layers) if model.mtp_process else []


def _core_model(chunk: torch.nn.Module) -> Any:
    return get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)


def _forward(args: Namespace, chunk: torch.nn.Module, saved: SavedForBackward) -> None:
    """Let one micro-batch go forward through ``chunk``."""
    model = _core_model(chunk)
    if not model.pre_process:
        model.set_input_tensor(_from_the_stage_before(args))
    with saved.counting():
        chunk(**_micro_batch(args, labelled=model.post_process))


def _micro_batch(args: Namespace, *, labelled: bool) -> dict[str, Any]:
    shape = (args.micro_batch_size, args.seq_length // args.context_parallel_size)
    tokens = torch.zeros(shape, dtype=torch.long)
    mask = None
    if args.create_attention_mask_in_dataloader:
        mask = torch.empty((args.micro_batch_size, 1, shape[1], args.seq_length), dtype=torch.bool, device=META)
    return {
        "input_ids": tokens,
        "position_ids": tokens,
        "attention_mask": mask,
        "labels": tokens if labelled else None,
        "loss_mask": torch.ones(shape) if labelled else None,
    }


def _from_the_stage_before(args: Namespace) -> torch.Tensor:
    sequence = args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        sequence //= args.tensor_model_parallel_size
    dtype = args.params_dtype if not args.fp32_residual_connection else torch.float32
    return torch.empty(sequence, args.micro_batch_size, args.hidden_size, dtype=dtype, device=META, requires_grad=True)
