"""Packed sequences: several documents in one, each of whose tokens reads its own document alone.

Core's datasets say where documents begin (``--dataloader-inter-document-masking``, ``--sft``), its model and attention
read it as ``packed_seq_params``; its wheel lacks what lies between.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import flatten_batch_for_packed_sequences

BOUNDARY_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
"""Of a batch, what says where documents begin; the padded ones are None here."""


def packs_sequences(args: Namespace) -> bool:
    """Whether the datasets that ``args`` name give boundaries of documents."""
    return args.sft or args.dataloader_inter_document_masking


def as_one_sequence(batch: dict[str, Any], tokens_per_sample: int) -> dict[str, Any]:
    """The b samples of a micro-batch as one sequence, [1, b s], with its ``packed_seq_params``.

    Args:
        batch: tensors [b, s], or None where the pipeline stage does not need them; ``BOUNDARY_KEYS`` on every stage.
        tokens_per_sample: s. It tells balance losses of sequences what is one.
    """
    batch = flatten_batch_for_packed_sequences(batch)
    begins: torch.Tensor = batch["cu_seqlens"][0]
    longest = int(batch["max_seqlen"].max())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=begins,
        cu_seqlens_kv=begins,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=tokens_per_sample,
    )
    return {**batch, "packed_seq_params": packed}
