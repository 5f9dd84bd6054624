"""What context parallelism and packed sequences cannot be combined with, with either spec or in the local one alone."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_scmoe.config import ConfigError
from megatron_scmoe.mcore.packing import packs_sequences

_CHATS = "SFTTokenizer"


def check_sequences(args: Namespace) -> None:
    """Raise ConfigError for the first flag in ``args``, as parsed, that cut or packed sequences do not take."""
    if packs_sequences(args):
        _check_packed(args, "--sft" if args.sft else "--dataloader-inter-document-masking")
    if args.sft:
        _check_chats(args)
    if args.transformer_impl == "local":
        if packs_sequences(args):
            _check_local_attention(args, "sequences are packed")
        if args.context_parallel_size > 1:
            _check_local_attention(args, f"--context-parallel-size is {args.context_parallel_size}")
            _check_local_context(args)


def check_chat_template(args: Namespace, tokenizer: Any, chat: list[dict[str, str]] | None) -> None:
    """Raise ConfigError where the tokenizer of ``args`` cannot make tokens of ``chat``, if there is one, or pad."""
    named = f"--tokenizer-model is {args.tokenizer_model}, --sft-tokenizer-prompt-format "
    named += args.sft_tokenizer_prompt_format
    try:
        if chat is not None:
            tokenizer.tokenize_conversation(chat, return_target=True, add_generation_prompt=False)
    except Exception as error:  # of a template, which may raise anything
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the first chat goes through the tokenizer's template: {named}, which fails ({reason}); use another "
            "--sft-tokenizer-prompt-format (default takes the tokenizer's own template), or mend the chat"
        ) from error
    if tokenizer.pad is None:
        raise ConfigError(f"short chats are filled up: {named}, has no token to pad with; give the tokenizer one")


def _check_packed(args: Namespace, flag: str) -> None:
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"documents are not cut among ranks: {flag} is set and --context-parallel-size is "
            f"{args.context_parallel_size}; use 1"
        )
    samples = max(args.micro_batch_size or 1, args.eval_micro_batch_size or 1)
    ranks = {"tensor": args.tensor_model_parallel_size, "pipeline": args.pipeline_model_parallel_size}
    for name, size in ranks.items():
        if samples > 1 and size > 1:
            raise ConfigError(
                f"packed samples of a micro-batch are one long sequence, which {name}-parallel ranks would cut, or "
                f"take, in another shape: {flag} is set, --micro-batch-size or --eval-micro-batch-size is {samples} "
                f"and --{name}-model-parallel-size is {size}; use --micro-batch-size 1"
            )
    for name in ("reset_position_ids", "reset_attention_mask"):
        if getattr(args, name):
            other = f"--{name.replace('_', '-')}"
            raise ConfigError(f"it does so anyway: {flag} and {other} are set; drop {other}")
    if "M" in (args.hybrid_layer_pattern or ""):
        raise ConfigError(
            f"Mamba layers have not run with packed sequences: {flag} is set and --hybrid-layer-pattern is "
            f"{args.hybrid_layer_pattern}; drop {flag}"
        )


def _check_chats(args: Namespace) -> None:
    """--sft: what its dataset does not do."""
    if args.tokenizer_type != _CHATS:
        raise ConfigError(
            f"chats need a tokenizer with a template: --sft is set and --tokenizer-type is {args.tokenizer_type}; use "
            f"--tokenizer-type {_CHATS} --tokenizer-model DIR, a tokenizer of Hugging Face"
        )
    if args.create_attention_mask_in_dataloader:
        raise ConfigError(
            "chats tell attention where they begin, and make no mask: --sft is set and "
            "--no-create-attention-mask-in-dataloader is not; add it"
        )
    for name in ("mock_data", "dataloader_inter_document_masking", "full_validation", "object_storage_cache_path"):
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"chats are read from files, and are apart: --sft and {flag} are set; drop {flag}")


def _check_local_attention(args: Namespace, asked: str) -> None:
    """A mask says what a token may read: two ways of Core's softmax do not look at it."""
    if args.window_size is not None:
        raise ConfigError(
            f"Core's local attention makes the mask of a window itself: {asked}, --window-size is "
            f"{args.window_size} and --transformer-impl is local; drop --window-size"
        )
    if args.masked_softmax_fusion and (args.bf16 or args.fp16):
        raise ConfigError(
            f"Core's fused softmax reads no mask: {asked}, --no-masked-softmax-fusion is not set and "
            "--transformer-impl is local; add --no-masked-softmax-fusion"
        )


def _check_local_context(args: Namespace) -> None:
    if "M" in (args.hybrid_layer_pattern or ""):
        raise ConfigError(
            "Mamba layers have not run on parts of sequences: --context-parallel-size is "
            f"{args.context_parallel_size}, --hybrid-layer-pattern is {args.hybrid_layer_pattern} and "
            "--transformer-impl is local; use --context-parallel-size 1"
        )
    ways = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
    if unknown := [
        way for way in ways if way not in ("p2p", "allgather", "all_gather")
    ]:  # the default, or what it does
        raise ConfigError(
            f"the local spec gathers keys and values: --cp-comm-type is {unknown[0]} and --transformer-impl is local; "
            "use --cp-comm-type allgather"
        )
