"""The tokenizer that a checkpoint was trained with, as files of a Hugging Face folder."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CODE = Path(__file__).with_name("hf_scmoe")
CODE_FILE = "tokenization_scmoe.py"

_SENTENCEPIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_HF_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """What an exported folder has of its tokenizer.

    Attributes:
        files: by plain file name.
        ids: of special tokens, for config.json.
        notes: why there are no files.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def tokenizer_of(args: Namespace) -> Tokenizer:
    """The tokenizer that the saved arguments of a checkpoint name, where it can be found on this machine."""
    kind, path = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if kind in _SENTENCEPIECE:
        return _sentencepiece(Path(str(path)))
    if kind == "HuggingFaceTokenizer":
        return _hugging_face(str(path))
    return _none(f"it was trained with {kind}" if kind else "the saved arguments name none")


def _none(reason: str) -> Tokenizer:
    return Tokenizer(notes=(f"no tokenizer in the folder: {reason}",))


def _sentencepiece(path: Path) -> Tokenizer:
    if not path.is_file():
        return _none(f"{str(path)!r} is gone; put the SentencePiece model there as tokenizer.model")
    try:
        import sentencepiece  # noqa: PLC0415 (needed here alone)

        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except ImportError:
        return _none(f"{str(path)!r} is read by sentencepiece, which is missing; pip install sentencepiece")
    except (OSError, RuntimeError):  # untrusted arguments may name any file, which must not be copied
        return _none(f"{str(path)!r} is no SentencePiece model")
    ids = {f"{name}_token_id": getattr(model, f"{name}_id")() for name in ("bos", "eos", "pad")}
    ids = {name: index for name, index in ids.items() if index >= 0}
    config: dict[str, Any] = {
        "tokenizer_class": "ScMoETokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_scmoe.ScMoETokenizer", None]},
        "unk_token": model.id_to_piece(model.unk_id()),
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): model.id_to_piece(index) for name, index in ids.items()},
    }
    files = {
        "tokenizer.model": path.read_bytes(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        CODE_FILE: (CODE / CODE_FILE).read_bytes(),
    }
    return Tokenizer(files=files, ids=ids)


def _hugging_face(name: str) -> Tokenizer:
    folder = Path(name)
    files = {file: (folder / file).read_bytes() for file in _HF_FILES if (folder / file).is_file()}
    if "tokenizer_config.json" not in files:
        return _none(f"{name!r} is no folder with one here; use AutoTokenizer.from_pretrained({name!r})")
    return Tokenizer(files=files)
