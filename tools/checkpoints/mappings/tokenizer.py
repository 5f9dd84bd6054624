"""The tokenizer of a checkpoint, and other small files that go where it goes: from and to Hugging Face folders.

Beside a Megatron checkpoint they lie in its folder ``FOLDER``, where --tokenizer-model finds them. On the way back they
come from there, or from where the saved arguments of a trained checkpoint say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from checkpoints.disk.companions import FOLDER, GENERATION_CONFIG, SENTENCEPIECE, TOKENIZER_CONFIG, companions
from checkpoints.disk.files import is_plain, read_json
from checkpoints.disk.hf_folder import CONFIG
from checkpoints.disk.torch_dist import TRACKER, MegatronCheckpoint
from checkpoints.tensors import Checkpoint

CODE = Path(__file__).with_name("hf_scmoe")
CODE_FILE = "tokenization_scmoe.py"

_SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
OUR_CLASS = "tokenization_scmoe.ScMoETokenizer"
"""What tokenizer_config.json calls the tokenizer of our own folders: SentencePiece, and nothing beside it."""

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    ids = {name: source.settings[name] for name in _IDS if source.settings.get(name) is not None}
    if ids and GENERATION_CONFIG not in files:  # older folders have them in config.json, which stays behind
        files[GENERATION_CONFIG] = (json.dumps(ids, indent=2) + "\n").encode()
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
        gone = _none(f"{str(path)!r} is gone; put the SentencePiece model there as {SENTENCEPIECE}")
        return replace(gone, files=_our_files({}))
    try:
        import sentencepiece  # noqa: PLC0415 (needed here alone)

        data = path.read_bytes()
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
    except ImportError:
        return _none(f"{str(path)!r} is read by sentencepiece, which is missing; pip install sentencepiece")
    except (OSError, RuntimeError):  # untrusted arguments may name any file, which must not be copied
        return _none(f"{str(path)!r} is no SentencePiece model")
    ids = {f"{name}_token_id": getattr(model, f"{name}_id")() for name in ("bos", "eos", "pad")}
    ids = {name: index for name, index in ids.items() if index >= 0}
    special = {name.removesuffix("_id"): model.id_to_piece(index) for name, index in ids.items()}
    files = _our_files({"unk_token": model.id_to_piece(model.unk_id()), **special})
    return Tokenizer(files={SENTENCEPIECE: data, **files}, ids=ids)


def _our_files(special: Mapping[str, str]) -> dict[str, bytes]:
    """What makes a SentencePiece model a tokenizer of transformers: without it other ids come, and no white space."""
    config: dict[str, Any] = {
        "tokenizer_class": "ScMoETokenizer",
        "auto_map": {"AutoTokenizer": [OUR_CLASS, None]},
        "clean_up_tokenization_spaces": False,
        **special,
    }
    code = (CODE / CODE_FILE).read_bytes()
    return {TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(), CODE_FILE: code}


def _hugging_face(folder: Path) -> Tokenizer:
    files = companions(folder)
    if _is_our_class(files):
        made = _sentencepiece(folder / SENTENCEPIECE)
        return Tokenizer(files={**made.files, **files}, ids=made.ids, notes=made.notes)
    if TOKENIZER_CONFIG in files:
        return Tokenizer(files=files, ids=_ids_beside(folder))
    gone = _none(f"{str(folder)!r} is no folder with one here; use AutoTokenizer.from_pretrained({str(folder)!r})")
    return Tokenizer(files=files, notes=gone.notes)


def _ids_beside(folder: Path) -> dict[str, int]:
    """Ids of special tokens by what lies beside a tokenizer of Hugging Face; of several ends of a text the first."""
    found: dict[str, int] = {}
    for name in (CONFIG, GENERATION_CONFIG):
        if (folder / name).is_file():
            ids = {key: value for key, value in read_json(folder / name).items() if key in _IDS and value is not None}
            found |= {key: value[0] if isinstance(value, list) else value for key, value in ids.items()}
    return found


def _is_our_class(files: Mapping[str, bytes]) -> bool:
    """Whether these are what ``_sentencepiece`` makes, perhaps changed since."""
    return SENTENCEPIECE in files and OUR_CLASS.encode() in files.get(TOKENIZER_CONFIG, b"")
