"""Chats of a JSONL file, for --sft: Core's dataset, on files that are read without the package that it asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from megatron.training.datasets.sft_dataset import SFTDataset

ROLES = ("system", "user", "assistant", "tool")


class Chats:
    """The chats of a file, one a line; what Core's class reads by the package ``datasets``.

    Args:
        path: of the file. A line is ``{"messages": [{"role": ..., "content": ...}, ...]}``, with ``ROLES``; empty lines
            count for nothing.

    Raises:
        ValueError: for the first line that is no chat, which it names, and where there is none.
        OSError: where the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        begins, position = [], 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        messages_of(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"line {number} of {path} is no chat ({error})") from error
                    begins.append(position)
                position += len(line)
        if not begins:
            raise ValueError(f"{path} has no chats")
        self._begins = numpy.asarray(begins, dtype=numpy.int64)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._begins)

    def __getitem__(self, index: int) -> list[dict[str, str]]:
        """The messages of one chat."""
        with self._path.open("rb") as file:
            file.seek(int(self._begins[index]))
            return messages_of(file.readline())


def messages_of(line: bytes) -> list[dict[str, str]]:
    """The messages of a line.

    Raises:
        ValueError: where it has none, or one without a role or text.
    """
    chat: Any = json.loads(line)
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message has one of the roles {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError("the content of a message is text")
    return messages


class ChatDataset(SFTDataset):
    """Core's dataset of packed chats, each from its first message, or a system's, to the next system's."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Chats:
        """Open the file."""
        return Chats(dataset_path)

    def __len__(self) -> int:
        """As many as asked for; where nobody asked, as in a blend without weights, each line once."""
        return len(self.indices) if self.num_samples is None else self.num_samples
