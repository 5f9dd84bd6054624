"""What the command lines of these tools have in common."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import atomic


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str) -> NoReturn:
        """Say it in one line: argparse would print the whole usage first."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def positive(text: str) -> int:
    """A whole number from 1, as the type of an option."""
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 10**6):
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is not a whole number from 1")
    return int(text)


_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal that asks to end raises KeyboardInterrupt with its number, and others change nothing.

    What is left to do then is short, and a second one would cut it off.
    """

    def stop(number: int, _frame: Any) -> None:
        for other in _STOPPING:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    handlers = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stopped_by(interrupt: KeyboardInterrupt) -> signal.Signals:
    """The signal that ended what was ``stoppable``."""
    return signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)


def write_again(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *,
    read: Callable[[Path], Any],
    section: Callable[[Any], str],
    marks: tuple[str, str],
    html: Callable[[Any], str],
) -> Any:
    """Do what ``--from DIR`` and ``--write-results FILE`` ask of an earlier run; returns its result.

    Nothing is written where anything is refused.

    Args:
        parser: refuses.
        args: with ``source`` and ``write_results``.
        read: the result in a folder; raises OSError, ValueError or KeyError where there is none.
        section: of a document, from the result.
        marks: between which it stands there.
        html: the report, from the result.
    """
    try:
        result = read(args.source)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--from {str(args.source)!a} cannot be read: {str(error)[:200]}; name a folder of this tool's")
    document = None
    if args.write_results:
        try:
            document = args.write_results.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            parser.error(f"--write-results {str(args.write_results)!a} cannot be read: {str(error)[:200]}")
    if document is not None:
        text = section(result)
        try:
            document = _with_section(document, text, *marks)
        except ValueError as error:
            parser.error(f"--write-results {str(args.write_results)!a}: {error}: {marks[0]} and {marks[1]}")
        atomic.write_text(args.write_results, document)
    atomic.write_text(args.source / "report.html", html(result))
    return result


def _with_section(document: str, text: str, begin: str, end: str) -> str:
    """``document`` with ``text`` between its marks.

    Raises:
        ValueError: where it has not one mark of each kind, in this order.
    """
    between = re.compile(rf"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if document.count(begin) != 1 or document.count(end) != 1 or not between.search(document):
        raise ValueError("it lacks the two marks between which the tool writes")
    return between.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document)
