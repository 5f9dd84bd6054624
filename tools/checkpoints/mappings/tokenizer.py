"""The tokenizer of a checkpoint, and other small files that go where it goes: from and to Hugging Face folders.

Beside a Megatron checkpoint they lie in its folder ``FOLDER``, where --tokenizer-model finds them. On the way back they
come from there, or from where the saved arguments of a trained checkpoint say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.disk.companions import FOLDER, SENTENCEPIECE, TOKENIZER_CONFIG, companions
from checkpoints.disk.files import is_plain
from checkpoints.disk.torch_dist import TRACKER, MegatronCheckpoint
from checkpoints.tensors import Checkpoint

CODE = Path(__file__).with_name("hf_scmoe")
CODE_FILE = "tokenization_scmoe.py"

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
_OUR_CLASS = "tokenization_scmoe.ScMoETokenizer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """What a converted checkpoint has of its tokenizer.

    Attributes:
        files: by plain file name.
        ids: of special tokens, for config.json.
        notes: where the tokenizer is, or why there is none; what was left behind.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# --- into Megatron checkpoints --------------------------------------------------------------------------------------


def carried(source: Checkpoint) -> Tokenizer:
    """What goes into the folder ``FOLDER`` of a Megatron checkpoint that is made of ``source``."""
    if isinstance(source, MegatronCheckpoint):
        folder = _folder_beside(source)
        return Tokenizer(files=companions(folder) if folder else {})
    files = companions(source.folder)
    left = {path.name for path in source.folder.iterdir()} - {*files, *(path.name for path in source.files)}
    shown = ", ".join(name if is_plain(name) else ascii(name) for name in sorted(left))
    return Tokenizer(files=files, notes=(_flags(files), *([f"left behind: {shown}"] if left else [])))


def _flags(files: Mapping[str, bytes]) -> str:
    """What to train on with."""
    if SENTENCEPIECE in files and (_is_our_class(files) or TOKENIZER_CONFIG not in files):
        kind, model = "SentencePieceTokenizer", f"{FOLDER}/{SENTENCEPIECE}"
    elif TOKENIZER_CONFIG in files:
        kind, model = "HuggingFaceTokenizer", FOLDER
    else:
        return f"the source has no {TOKENIZER_CONFIG}: train with the tokenizer that its model was trained with"
    return f"the tokenizer came along: train with --tokenizer-type {kind} --tokenizer-model SAVED/{model}"


def _folder_beside(source: MegatronCheckpoint) -> Path | None:
    """Where ``carried`` put the files, if it did."""
    folder = source.folder.parent / FOLDER
    return folder if folder.is_dir() and (folder.parent / TRACKER).is_file() else None


# --- out of them ----------------------------------------------------------------------------------------------------


def tokenizer_of(source: MegatronCheckpoint) -> Tokenizer:
    """The tokenizer of a checkpoint, as files of a Hugging Face folder.

    It is the one that the saved arguments name, where it can be found on this machine; where they name none, what came
    with the checkpoint when it was converted.
    """
    args = source.args
    kind, path = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if path is None and (beside := _folder_beside(source)):
        return _hugging_face(beside)
    if kind in _SENTENCEPIECE_TYPES:
        return _sentencepiece(Path(str(path)))
    if kind == "HuggingFaceTokenizer":
        return _hugging_face(Path(str(path)))
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
        "auto_map": {"AutoTokenizer": [_OUR_CLASS, None]},
        "unk_token": model.id_to_piece(model.unk_id()),
        "clean_up_tokenization_spaces": False,
        **{name.removesuffix("_id"): model.id_to_piece(index) for name, index in ids.items()},
    }
    files = {
        SENTENCEPIECE: path.read_bytes(),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        CODE_FILE: (CODE / CODE_FILE).read_bytes(),
    }
    return Tokenizer(files=files, ids=ids)


def _hugging_face(folder: Path) -> Tokenizer:
    files = companions(folder)
    if _is_our_class(files):
        made = _sentencepiece(folder / SENTENCEPIECE)
        return Tokenizer(files={**made.files, **files}, ids=made.ids, notes=made.notes)
    if TOKENIZER_CONFIG in files:
        return Tokenizer(files=files)
    gone = _none(f"{str(folder)!r} is no folder with one here; use AutoTokenizer.from_pretrained({str(folder)!r})")
    return Tokenizer(files=files, notes=gone.notes)


def _is_our_class(files: Mapping[str, bytes]) -> bool:
    """Whether these are what ``_sentencepiece`` makes, perhaps changed since."""
    return SENTENCEPIECE in files and _OUR_CLASS.encode() in files.get(TOKENIZER_CONFIG, b"")
