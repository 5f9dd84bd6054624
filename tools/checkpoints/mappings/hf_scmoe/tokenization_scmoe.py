"""A SentencePiece model as a tokenizer of transformers, with the very ids that SentencePiece gives."""

from __future__ import annotations

import itertools
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend


class ScMoETokenizer(SentencePieceBackend):
    """Encodes and decodes as SentencePiece does, white space included, and adds no special tokens.

    Args:
        vocab_file: the SentencePiece model.
        The other arguments are those of transformers' tokenizers.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 (the name and type are those of transformers)

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        kwargs.setdefault("special_tokens_pattern", "none")
        super().__init__(vocab_file=vocab_file, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of ``tokens``; SentencePiece would leave out special ones."""
        runs = itertools.groupby(tokens, key=set(self.all_special_tokens).__contains__)
        return "".join("".join(run) if special else self.sp_model.decode(list(run)) for special, run in runs)
