"""What is scored: token ids as they are, or texts and the tokenizer that turns them into ids."""
# ruff: noqa: PLC0415 - transformers takes seconds to import and is not always needed

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from checkpoints.disk import companions
from checkpoints.mappings.tokenizer import OUR_CLASS
from numpy.typing import NDArray
from preprocessing.encoding import load_tokenizer
from preprocessing.sources import (
    JSON_LINES,
    Reading,
    Source,
    UserError,
    describe_lines,
    iter_documents,
    list_sources,
    shown,
)
from progress import Advance, progress

_TOKENIZERS = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "HuggingFaceTokenizer")
SUFFIXES = (".txt", *JSON_LINES, ".npy")


class Tokenizer(NamedTuple):
    """Text to ids.

    Attributes:
        separator: the id that stands between documents in training; None: there is none.
        encode: the ids of a text, nothing added.
    """

    path: str
    vocab_size: int
    separator: int | None
    encode: Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The token ids of one file.

    Attributes:
        ids: of all documents, one behind the other.
        offsets: where each document begins; one more says where the last one ends.
        num_bytes: of the text that is scored, as UTF-8; None: unknown.
    """

    name: str
    sha256: str
    ids: NDArray[numpy.int32]
    offsets: NDArray[numpy.int64]
    num_bytes: int | None

    @property
    def num_scored(self) -> int:
        """All but the first token of each document."""
        return len(self.ids) - (len(self.offsets) - 1)


def read(
    words: Sequence[str], *, json_key: str, tokenizer: Callable[[], Tokenizer], vocab_size: int, shows: bool
) -> tuple[list[Tokens], Tokenizer | None]:
    """Every file that ``words``, files and folders, name, and the tokenizer, which is called for if there is text.

    ``shows`` on stderr how far that is. Raises UserError for anything that cannot be scored, such as ids beyond
    ``vocab_size``.
    """
    sources = list_sources(list(words), SUFFIXES)
    for source in sources:
        if source.problem:
            raise UserError(f"{shown(source.name)}: {source.problem}")
        if not source.name.lower().endswith(SUFFIXES):
            raise UserError(f"{shown(source.name)} is no {', '.join(SUFFIXES)} file; rename it")
    has_ids = [source.name.lower().endswith(".npy") for source in sources]
    ready = None if all(has_ids) else tokenizer()
    files = []
    bar = progress("read", sum(source.num_bytes for source in sources)) if shows else nullcontext(lambda _: None)
    with bar as advance:
        for source, is_ids in zip(sources, has_ids, strict=True):
            if is_ids or ready is None:
                tokens = _read_ids(source)
                advance(source.num_bytes)
            else:
                tokens = _read_text(source, json_key, ready, advance)
            _check_ids(tokens, vocab_size)
            files.append(tokens)
    return files, ready


def _read_ids(source: Source) -> Tokens:
    """A row is a document; one dimension is one document."""
    try:
        ids = numpy.load(source.path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{shown(source.name)}: no array of numpy.save ({reason}); write it with numpy.save") from error
    if not isinstance(ids, numpy.ndarray) or ids.ndim not in (1, 2) or ids.dtype.kind not in "iu":
        what = f"{ids.dtype} {ids.shape}" if isinstance(ids, numpy.ndarray) else "an archive"
        raise UserError(
            f"{shown(source.name)}: token ids are whole numbers, [tokens] or [rows, tokens]; this is {what}"
        )
    rows, length = ids.shape if ids.ndim == 2 else (1, ids.shape[0])
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**31):
        raise UserError(
            f"{shown(source.name)}: token ids are 0 or more and below 2**31; it has {ids.min()} to {ids.max()}"
        )
    return Tokens(
        name=source.name,
        sha256=hashlib.sha256(numpy.ascontiguousarray(ids).tobytes()).hexdigest(),
        ids=numpy.asarray(ids, dtype=numpy.int32).reshape(-1),
        offsets=numpy.arange(rows + 1, dtype=numpy.int64) * length,
        num_bytes=None,
    )


def _read_text(source: Source, json_key: str, tokenizer: Tokenizer, advance: Advance) -> Tokens:
    """A document begins behind the separator, as in training, so that its first token is scored too."""
    digest, bad_lines = hashlib.sha256(), []  # type: ignore[var-annotated]
    parts: list[list[int]] = []
    num_bytes = 0
    before = [] if tokenizer.separator is None else [tokenizer.separator]
    for text in iter_documents(source, Reading(json_key, 0), digest, bad_lines):
        parts.append([*before, *tokenizer.encode(text)])
        num_bytes += (length := len(text.encode()))
        advance(length)
    if bad_lines:
        raise UserError(f"{shown(source.name)}: {describe_lines(bad_lines)}")
    return Tokens(
        name=source.name,
        sha256=digest.hexdigest(),
        ids=numpy.array([token for part in parts for token in part], dtype=numpy.int32),
        offsets=numpy.cumsum([0, *map(len, parts)], dtype=numpy.int64),
        num_bytes=num_bytes if before else None,
    )


def _check_ids(tokens: Tokens, vocab_size: int) -> None:
    if tokens.num_scored < 1:
        raise UserError(f"{shown(tokens.name)}: nothing to score; a document needs two tokens at least")
    beyond = numpy.flatnonzero(tokens.ids >= vocab_size)
    if len(beyond):
        raise UserError(
            f"{shown(tokens.name)}: token {beyond[0]} has id {tokens.ids[beyond[0]]}, and the model's vocabulary ends "
            f"at {vocab_size - 1}; use the tokenizer that it was trained with"
        )


# --- tokenizers --------------------------------------------------------------------------------------------------


def find_tokenizer(named: str | None, folder: Path, saved: Namespace | None) -> Tokenizer:
    """The tokenizer of a checkpoint; UserError where there is none that can be used.

    Args:
        named: by the user: a SentencePiece model, or a folder with one of Hugging Face; None: the checkpoint's own.
        folder: of the checkpoint.
        saved: arguments of a Megatron checkpoint; None for a Hugging Face folder.
    """
    kind, path = getattr(saved, "tokenizer_type", None), getattr(saved, "tokenizer_model", None)
    if named is not None:
        return _open_tokenizer(Path(named), by_megatron=path is not None)
    if saved is None:
        return _open_tokenizer(folder)
    if path is None and (folder / companions.FOLDER).is_dir():  # of a checkpoint that was converted
        return _open_tokenizer(folder / companions.FOLDER)
    if kind not in _TOKENIZERS or not path:
        raise UserError(
            f"text needs a tokenizer, and the checkpoint was trained with {kind} {path or ''}; add --tokenizer "
            "tokenizer.model (SentencePiece) or a folder of Hugging Face, or give token ids as .npy"
        )
    if not Path(path).exists():
        raise UserError(
            f"text needs a tokenizer, and that of training is gone: {shown(path)}; name it with --tokenizer"
        )
    return _open_tokenizer(Path(path), by_megatron=True)


def _open_tokenizer(path: Path, *, by_megatron: bool = False) -> Tokenizer:
    if path.is_dir() and _is_more_than_sentencepiece(path):
        return _hugging_face(path, by_megatron=by_megatron)
    model = path / companions.SENTENCEPIECE if path.is_dir() else path
    try:
        processor = load_tokenizer(model)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{shown(path)} is no tokenizer: neither a SentencePiece model nor a folder with tokenizer.model or "
            "tokenizer.json; name one with --tokenizer"
        ) from error
    separator = processor.eos_id() if processor.eos_id() >= 0 else None
    return Tokenizer(str(model), processor.get_piece_size(), separator, processor.encode)


def _is_more_than_sentencepiece(folder: Path) -> bool:
    """Whether files of Hugging Face say what ids a text has; ours say that they are SentencePiece's own."""
    if any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "added_tokens.json")):
        return True
    config = folder / companions.TOKENIZER_CONFIG
    return config.is_file() and OUR_CLASS.encode() not in config.read_bytes()


def _unusable(path: Path, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return UserError(f"{shown(path)}: transformers cannot load its tokenizer ({shown(reason)}); name another")


def _hugging_face(path: Path, *, by_megatron: bool) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError("tokenizers of Hugging Face need transformers; pip install transformers") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything
        raise _unusable(path, error) from error
    first, second = tokenizer.bos_token_id, tokenizer.eos_token_id
    if by_megatron:  # which ends documents with EOS, and knows no BOS
        first, second = second, first

    def encode(text: str) -> list[int]:
        try:
            encoded: Mapping[str, Any] = tokenizer(text, add_special_tokens=False)
        except Exception as error:  # of what the file lacks, when a text first needs it
            raise _unusable(path, error) from error
        return list(encoded["input_ids"])

    return Tokenizer(str(path), len(tokenizer), second if first is None else first, encode)
