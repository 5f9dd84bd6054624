"""What happens to files on their way: bytes lost or changed, files swapped, odd values and names; hypothesis draws."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, [0, 2**63], [2**63, 0], 10**30, 0.0, 0.5, -1.5, 1e38, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        "../../x",
        "/dev/null",
        "a\nb",
        "\x1b[31mred",
        "\ud800",
        "\0",
        "\u202e",
    ),
    *("n" * 3000, [], {}, [[]], [None], {"": {}}, [1, "x", None], list(range(50)), "nan", "release", ".", "\u0663"),
)
ODD_NAMES = (
    *(
        "a\nb",
        "\x1b[31mred",
        "n" * 250,
        " ",
        "-rf",
        "\u202ertl",
        "caf\udce9",
        "not\xa0ascii",
        "rank00001.jsonl",
        "model-00001.safetensors",
    ),
    *("model.safetensors.index.json", "tokenizer.json", "vocab.json", "added_tokens.json", "chat_template.json"),
)
MOVED = "moved"
"""The way of damage that gives all input an odd folder; who runs the command does it."""
HUGE = "9" * 5000  # more digits than Python reads
DEEP = "[" * 100_000


class Damage(NamedTuple):
    """One of ``WAYS``, a file or folder, a place in it as a share of its size in thousandths, and a value."""

    way: str
    name: str
    place: int
    value: Any

    def happen(self, home: Path) -> None:
        """To the file ``name`` below ``home``; nothing happens to what earlier damage has left no place for."""
        path = home / self.name
        if self.way in _ENTRIES:
            with contextlib.suppress(OSError):
                _ENTRIES[self.way](path, self.value)
        elif self.way in _BYTES and path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            path.write_bytes(_BYTES[self.way](data, len(data) * self.place // 1000, self.value))
        elif self.way in _VALUES and path.is_file() and not path.is_symlink():
            _damage_value(path, _VALUES[self.way], self.place, self.value)


# --- bytes ----------------------------------------------------------------------------------------------------------


def _flip(data: bytes, at: int, value: int) -> bytes:
    at = min(at, len(data) - 1)
    return data[:at] + bytes([data[at] ^ value]) + data[at + 1 :] if data else data


_BYTES: dict[str, Callable[[bytes, int, Any], bytes]] = {
    "flip": _flip,
    "flip early": lambda data, at, value: _flip(data, at % 64, value),
    "cut": lambda data, at, _: data[:at],
    "cut begin": lambda data, at, _: data[at:],
    "lose": lambda data, at, value: data[:at] + data[at + value :],
    "insert": lambda data, at, value: data[:at] + bytes([value]) * value + data[at:],
    "zero": lambda data, at, value: data[:at] + bytes(value) + data[at + value :],
    "twice": lambda data, *_: data * 2,
    "empty": lambda *_: b"",
    "not text": lambda data, at, _: data[:at] + b"\xff\xfe" + data[at:],
    "wide": lambda data, *_: data.decode("latin-1").encode("utf-16"),
    "huge number": lambda data, at, _: data[:at] + HUGE.encode() + data[at:],
    "deep": lambda *_: DEEP.encode(),
    "zeros": lambda *_: bytes(1 << 20),
}

# --- entries of a folder --------------------------------------------------------------------------------------------


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _linked(path: Path, target: str) -> None:
    _gone(path)
    path.symlink_to(target)


def _a_folder(path: Path, _: Any) -> None:
    _gone(path)
    path.mkdir()


def _swapped(path: Path, other: str) -> None:
    """Both exchange their contents; a folder takes the other's place."""
    there = path.parent / other
    if there == path or not (os.path.lexists(there) and os.path.lexists(path)):
        return
    between = path.with_name("between")
    path.rename(between)
    there.rename(path)
    between.rename(there)


def _sparse(path: Path, value: int) -> None:
    if path.is_file():
        os.truncate(path, value << 20)


def _renamed(path: Path, name: str) -> None:
    if os.path.lexists(path):
        path.rename(path.with_name(name if "." in name else name + path.suffix))


def _beside(path: Path, name: str) -> None:
    if path.is_file():
        shutil.copyfile(path, path.with_name(name if "." in name else name + path.suffix))


_ENTRIES: dict[str, Callable[[Path, Any], None]] = {
    "remove": lambda path, _: _gone(path),
    "a folder": _a_folder,
    "link": _linked,
    "swap": _swapped,
    "sparse": _sparse,
    "rename": _renamed,
    "odd copy": _beside,
}

# --- values of what has a structure ---------------------------------------------------------------------------------

type Place = tuple[Any, Any]
"""What holds a value, and under which key or attribute."""


def _places(value: Any) -> Iterator[Place]:
    """All of them, the outer ones first."""
    is_record = isinstance(value, Namespace) or (dataclasses.is_dataclass(value) and not isinstance(value, type))
    holder = value if isinstance(value, dict | list) else vars(value) if is_record else {}
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        yield holder, key
        yield from _places(holder[key])


def _replace(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


def _nearly(holder: Any, key: Any, value: Any) -> None:
    """A value of the same kind."""
    old = holder[key]
    if isinstance(old, tuple) and old:
        holder[key] = type(old)((*old[:-1], 2**40))
    elif isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = (old + 1, old - 1, -old, old * 2, old * 1000)[len(str(value)) % 5]
    elif isinstance(old, str):
        holder[key] = old + str(value)
    elif isinstance(old, list):
        holder[key] = old[:-1] if value else [*old, *old[-1:]]


def _drop(holder: Any, key: Any, _: Any) -> None:
    del holder[key]


def _rename_key(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict):
        holder[str(value)] = holder.pop(key)


_VALUES: dict[str, Callable[[Any, Any, Any], None]] = {
    "value": _replace,
    "nearly": _nearly,
    "drop": _drop,
    "key": _rename_key,
}


def _damage_value(path: Path, change: Callable[[Any, Any, Any], None], place: int, value: Any) -> None:
    with contextlib.suppress(Exception):  # of what was damaged before, or cannot be written with that value
        document, write = _parsed(path)
        boxed = [document]
        places = list(_places(boxed))
        change(*places[len(places) * place // 1000], value)
        path.write_bytes(write(*boxed))


def _parsed(path: Path) -> tuple[Any, Callable[[Any], bytes]]:
    """What a file says, and how that is written."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")

        def write(header: Any) -> bytes:
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            return len(text).to_bytes(8, "little") + text + data[end:]

        return json.loads(data[8:end]), write
    if path.name == ".metadata":
        return pickle.loads(data), pickle.dumps
    if path.suffix == ".pt":
        return torch.load(io.BytesIO(data), weights_only=False), _saved
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        return lines, lambda value: b"".join(json.dumps(line).encode() + b"\n" for line in value)
    return json.loads(data), lambda value: json.dumps(value).encode()


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- drawn ----------------------------------------------------------------------------------------------------------

_STRUCTURED = (".json", ".jsonl", ".safetensors", ".metadata", ".pt")


def damages(names: Sequence[str]) -> st.SearchStrategy[list[Damage]]:
    """One or a few, of the files ``names``."""
    place, byte = st.integers(0, 999), st.integers(1, 255)
    siblings = st.sampled_from([name.rpartition("/")[2] for name in names])
    targets = st.one_of(siblings, st.sampled_from([".", "loop", "/dev/null", "/proc/self/mem", "gone"]))
    every, structured = (
        st.sampled_from(names),
        st.sampled_from([one for one in names if one.endswith(_STRUCTURED)] or names),
    )
    values = st.builds(Damage, st.sampled_from(sorted(_VALUES)), structured, place, st.sampled_from(ODD_VALUES))
    drawn = st.one_of(
        values,
        values,
        st.builds(Damage, st.sampled_from(sorted(_BYTES)), every, place, byte),
        st.builds(Damage, st.sampled_from(["remove", "a folder"]), every, st.just(0), st.none()),
        st.builds(Damage, st.sampled_from(["rename", "odd copy"]), every, st.just(0), st.sampled_from(ODD_NAMES)),
        st.builds(Damage, st.just("link"), every, st.just(0), targets),
        st.builds(Damage, st.just(MOVED), st.just(""), st.just(0), st.sampled_from(ODD_NAMES[:7])),
        st.builds(Damage, st.just("swap"), every, st.just(0), siblings),
        st.builds(Damage, st.just("sparse"), every, st.just(0), st.sampled_from([1, 2])),
    )
    return st.lists(drawn, min_size=1, max_size=3)
