"""The tokenizer: training one, loading one, and turning the documents of files into ids."""
# ruff: noqa: PLC0415 - imported late, so that --help takes a tenth of a second

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from preprocessing.sources import Reading, Source, UserError, iter_documents, shown

TRAIN_THREADS = 2  # a constant: it is stored in the model file and decides the order of float sums


def _training_lines(sources: list[Source], reading: Reading, max_chars: int) -> Iterator[str]:
    """Yield lines from the head of every file, in proportion to its size, about `max_chars` in total."""
    total = sum(source.num_bytes for source in sources)
    for source in sources:
        left = max(1, source.num_bytes * max_chars // total)
        for text in iter_documents(source, reading, hashlib.sha256(), []):
            yield from (line for line in text[:left].split("\n") if line.strip())
            left -= len(text)
            if left <= 0:
                break


def train_tokenizer(sources: list[Source], reading: Reading, path: Path, settings: dict[str, Any]) -> None:
    """Train on `sources` and write the model to `path`; the same text gives the same bytes. Raises UserError.

    Identity normalization, byte fallback and kept white space make decode(encode(text)) == text for all UTF-8 text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(sources, reading, settings["train_mib"] << 20),
            model_writer=model,
            vocab_size=settings["vocab_size"],
            model_type=settings["model_type"],
            num_threads=TRAIN_THREADS,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,  # indentation becomes one token
            split_digits=True,
            user_defined_symbols=["\n", "\t"],  # lines are trained one by one, so no piece may span them
            pad_id=3,  # own id: Core masks the loss where a label is the padding id
            max_sentence_length=1 << 24,
            minloglevel=2,
        )
    except RuntimeError as exc:
        reason = str(exc).rpartition("] ")[2] or "no usable line"
        fix = "change it or give more text"
        raise UserError(f"--vocab-size {settings['vocab_size']} does not suit the text ({reason}); {fix}") from exc
    path.write_bytes(_keep_u2581(model.getvalue()))


def _keep_u2581(model: bytes) -> bytes:
    """Return the model with plain spaces in its pieces, so that a literal U+2581 in a text survives.

    SentencePiece writes a space as U+2581 and turns both into a space when it decodes. Without that escape the pieces
    match spaces directly, U+2581 goes through byte fallback, and every other text keeps its ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.escape_whitespaces = False
    for piece in proto.pieces:
        piece.piece = piece.piece.replace("\u2581", " ")
    return proto.SerializeToString(deterministic=True)


def load_tokenizer(path: Path) -> Any:
    """Return the SentencePiece model of a file. Raises OSError or, if it is no model, RuntimeError."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())  # by its name it takes no path that is not UTF-8
    return processor


_load_once = functools.cache(load_tokenizer)  # a worker has one task after the other


def encode_files(
    sources: list[Source], reading: Reading, model: Path, path: Path
) -> tuple[Path, list[int], list[Source]]:
    """Write the ids of `sources` as int32 to the file `path`; each document ends with the EOD id.

    Returns the path, the length of every document in tokens, and the sources with their counts. Files with a problem
    are left out. Raises UserError if a file is not what the scan saw.
    """
    import numpy

    tokenizer = _load_once(model)
    eod = tokenizer.eos_id()
    lengths: list[int] = []
    encoded: list[Source] = []
    with path.open("wb") as file:
        for source in sources:
            if source.problem:
                encoded.append(source)
                continue
            digest, num_inexact, first = hashlib.sha256(), 0, len(lengths)
            for text in iter_documents(source, reading, digest, []):
                ids = tokenizer.encode(text)
                num_inexact += int(eod in ids or tokenizer.decode(ids) != text)
                file.write(numpy.array([*ids, eod], dtype=numpy.int32).tobytes())
                lengths.append(len(ids) + 1)
            if digest.hexdigest() != source.sha256:
                raise UserError(f"{shown(source.name)} changed while it was read; run again when it is complete")
            encoded.append(replace(source, num_tokens=sum(lengths[first:]), num_inexact=num_inexact))
    return path, lengths, encoded
