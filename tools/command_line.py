"""What the command lines of these tools have in common."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class UserError(Exception):
    """Bad input or request, which who started the tool can mend. The message is one line that says how; exit code 2."""


def one_line(text: object) -> str:
    """``text`` on one line, such that no terminal obeys it: names of files can hold anything."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps its lines, whose options have one name, and whose refusals are one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **{**defaults, **options})

    def error(self, message: str) -> NoReturn:
        """Say it in one line: argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see --help\n")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number from ``low`` to ``high``, else below a million."""
    most = 10**6 - 1 if high is None else high

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a whole number from {low} to {most}")
        return int(text)

    return parse


positive = whole(1)
"""A whole number from 1, as the type of an option."""


def size(text: str) -> int:
    """A number of bytes such as 5GB or 512MiB, as the type of an option."""
    found = re.fullmatch(r"([0-9]{1,12})(|K|M|G|Ki|Mi|Gi)B?", text)
    if not found or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a size like 5GB or 512MiB")
    return int(found[1]) * _UNITS[found[2]]


def number(low: float, high: float) -> Callable[[str], float]:
    """A number from ``low`` to ``high``, as the type of an option."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() else float("nan")
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a number from {low:g} to {high:g}")
        return value

    return parse


def exit_code(prog: str, work: Callable[[], int | None]) -> int:
    """That of ``work``, None being 0, or of what ends it, said in a line: 2 UserError, 1 OSError, 130 / 143 stopped."""
    message: object
    try:
        with stoppable():
            return work() or 0
    except KeyboardInterrupt as interrupt:
        number = stopped_by(interrupt)
        code, message = 128 + number, f"stopped by {number.name}"
    except UserError as error:
        code, message = 2, error
    except OSError as error:
        code, message = 1, error
    print(f"{prog}: error: {one_line(message)}", file=sys.stderr)
    return code


_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable(signals: Sequence[signal.Signals] = _STOPPING, *, once: bool = True) -> Iterator[None]:
    """Inside, a signal that asks to end raises KeyboardInterrupt with its number.

    Args:
        signals: that ask.
        once: the first one alone. What is left to do then is short, and a second one would cut it off.
    """

    def stop(number: int, _frame: Any) -> None:
        for other in signals if once else ():
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    handlers = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stopped_by(interrupt: KeyboardInterrupt) -> signal.Signals:
    """The signal that ended what was ``stoppable``."""
    return signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
