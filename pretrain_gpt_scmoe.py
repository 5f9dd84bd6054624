#!/usr/bin/env python3
"""Pretrain a GPT with shortcut-connected mixture-of-experts layers; started by torchrun.

    torchrun --nproc-per-node 8 pretrain_gpt_scmoe.py <Megatron flags> --shortcut scmoe ...

Megatron's flags work, but those of docs/refused.md: its own ``pretrain`` runs. Only what its wheel lacks is
here: the hooks that fetch a batch, run a forward step, reduce the loss and build the datasets. Without an accelerator
the same trainer runs on gloo ranks (``megatron_scmoe/cpu/backend.py``).

    DRY_RUN=1 WORLD_SIZE=64 python pretrain_gpt_scmoe.py <the same flags>

tells, on any machine, what each rank would hold (``megatron_scmoe/dry_run/``).
"""

from __future__ import annotations

import signal

from megatron_scmoe.job import witness
from megatron_scmoe.job.orphans import die_with_launcher, end_with_rank

if __name__ == "__main__":  # before the slow imports
    die_with_launcher()
    witness.begin()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import that ^C ends
elif __name__ == "__mp_main__":  # a process that Core starts beside a rank imports this, too
    end_with_rank()

import json
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from megatron_scmoe.job import last_words

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

if __name__ == "__main__":
    last_words.begin()

DRY_RUN = os.environ.get("DRY_RUN", "0") not in ("", "0")
if DRY_RUN:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it says the same on every machine

if torch.cuda.is_available():
    from megatron_scmoe.mcore import wheel

    wheel.mend()
else:
    # Before any import of Megatron, which decides at import time what it finds.
    from megatron_scmoe.cpu import backend as cpu_backend

    cpu_backend.install()

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_scmoe.config import ConfigError
from megatron_scmoe.dry_run import run as dry_run
from megatron_scmoe.job.start import joined
from megatron_scmoe.mcore import fault_hooks, packing, save_helpers
from megatron_scmoe.mcore.chats import ChatDataset
from megatron_scmoe.mcore.datasets import HashedDataset, HashedDatasetConfig, dataset_prefixes, index_hashes
from megatron_scmoe.models.container import model_config_from_args
from megatron_scmoe.training import resume
from megatron_scmoe.training.arguments import parse_and_validate_args, refuse
from megatron_scmoe.training.session import OverlapSession

_STRAGGLERS = StragglerDetector()  # Core's one of the process, which measures nothing without --log-straggler
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator: Any, vp_stage: int | None, micro_batch_size: int) -> dict[str, Any]:
    """The next micro-batch of b sequences, on this rank's device, cut for its tensor and context parallel rank.

    The keys are ``_BATCH_KEYS``; shapes [b, s / CP], the mask [b, 1, s / CP, s]. All are None on pipeline stages that
    need no data, and each is None where a stage does not need it. Packed sequences lie behind one another, [1, b s],
    and ``packed_seq_params`` says where documents begin, on every stage.
    """
    args = get_args()
    packs = packing.packs_sequences(args)  # of which attention reads on every stage where documents begin
    if not (packs or is_first_or_last_pipeline_stage(vp_stage)):
        return dict.fromkeys(_BATCH_KEYS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        keys = (*_BATCH_KEYS, *packing.BOUNDARY_KEYS)
        batch = {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in keys}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packs,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=is_last and bool(args.mtp_num_layers),  # prediction layers read tokens, too
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        is_pipeline_last_stage=is_last,
    )
    if packs:
        return packing.as_one_sequence(batch, args.seq_length)
    batch = {key: batch.get(key) for key in _BATCH_KEYS}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss over the tokens that count.

    Args:
        loss_mask: [b, s], 1 for tokens that count.
        output: loss per token, [b, s].

    Returns:
        The summed loss, the number of tokens, and for the log both in one tensor: Megatron sums it over micro-batches
        and data-parallel ranks and divides.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    reported = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": reported}


class TimeLeft:
    """Says every --log-interval iterations how long the rest of the training will take, which Megatron does not."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._began_s = 0.0
        self._seen = -1

    def say(self, args: Any) -> None:
        """Called by every micro-batch; prints on rank 0. The first iteration of a run, which warms up, does not
        count.
        """
        done = getattr(args, "curr_iteration", 0)  # --skip-train has none
        if done == self._seen:
            return
        self._seen = done
        if self._first is None:
            self._first = done + 1
        elif done == self._first:
            self._began_s = time.perf_counter()
        elif done % args.log_interval == 0:
            left_s = (time.perf_counter() - self._began_s) / (done - self._first) * (args.train_iters - done)
            print_rank_0(
                f" > {done} of {args.train_iters} iterations done, about {timedelta(seconds=round(left_s))} left"
            )


def forward_step(
    data_iterator: Any, model: GPTModel, *, time_left: TimeLeft, session: OverlapSession | None = None
) -> tuple[torch.Tensor, partial[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]]:
    """Run one micro-batch through this pipeline stage; the shape of this hook is Megatron's."""
    args = get_args()
    time_left.say(args)
    if session is not None and model.training:
        session.before_micro_batch(model)
    elif session is not None:
        session.in_evaluation(model)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _STRAGGLERS(bdata=True):
        size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage, size)
    packed = batch.get("packed_seq_params")
    if packed is not None and model.training and not vp_stage:
        update_seqlen_stats_from_cu_seqlens(packed.cu_seqlens_q)  # for the throughput that Megatron logs
    timers("batch-generator").stop()
    with _STRAGGLERS:
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
        )
    # Megatron calls the loss on the last stage alone, where the mask is a tensor.
    return output, partial(loss_func, cast(torch.Tensor, batch["loss_mask"]))


def train_valid_test_datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """Build the three datasets from --data-path and its relatives, or from --mock-data.

    Args:
        num_samples: samples that training, validation and test need.
        vp_stage: virtual pipeline stage, None without interleaving.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    config = HashedDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        sequences_per_dataset=json.loads(Path(sequences).read_text(encoding="utf-8")) if sequences else None,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        index_hashes=index_hashes(dataset_prefixes(args)),
    )
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    with fault_hooks.section("data"):
        return BlendedMegatronDatasetBuilder(
            ChatDataset if args.sft else MockGPTDataset if args.mock_data else HashedDataset,
            num_samples,
            partial(_builds_datasets, args, vp_stage),
            config,
        ).build()


def _builds_datasets(args: Any, vp_stage: int | None) -> bool:
    reads = packing.packs_sequences(args) or is_first_or_last_pipeline_stage(vp_stage)
    return parallel_state.get_tensor_model_parallel_rank() == 0 and reads


def main() -> None:
    """Parse, refuse or train; or say what training would need."""
    if DRY_RUN:
        dry_run.run()
        return
    args, scmoe, meeting = parse_and_validate_args()
    save_helpers.prepare(args.async_save, end_with_rank)
    # Each rank of a pipeline builds its own datasets, so Megatron must not build them on one rank alone.
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    model_config = model_config_from_args(args, scmoe)
    model_config.post_wrap_hooks.append(partial(resume.check_buckets, args))
    session = OverlapSession(args, scmoe) if scmoe.watches_steps else None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on there is something to flush
    try:
        with joined(args, meeting, scmoe.hang_limit):
            pretrain(
                pretrain_cfg_container_from_args(args, model_config),
                train_valid_test_datasets_provider,
                ModelType.encoder_or_decoder,
                partial(forward_step, time_left=TimeLeft(), session=session),
                store=meeting.job_store,
            )
    except ConfigError as error:  # what cannot be known before the model is there
        refuse(str(error))
    except KeyboardInterrupt:
        if args.local_rank == 0:
            print("pretrain_gpt_scmoe.py: stopped by SIGINT; what it saved is whole", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as end:
        # After --exit-interval, for one, every rank ends with code 0 behind the same step. A step that Megatron gave up
        # ends with another code, or without a process group, and is none to report.
        if session is not None and not end.code and torch.distributed.is_initialized():
            session.close()
        raise
    if session is not None:
        session.close()


if __name__ == "__main__":
    main()
