"""What the command lines of studies have in common: lists of names, and showing what an earlier call has found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import atomic
from command_line import Parser
from rich.console import Console

from studies.report import REPORT


class Section(NamedTuple):
    """What a flag has written into a document.

    Attributes:
        flag: that names the document.
        path: of it; None where the flag was not given.
        marks: between which the section stands there.
        made: the section, from the result.
    """

    flag: str
    path: Path | None
    marks: tuple[str, str]
    made: Callable[[Any], str]


class StudyParser(Parser):
    """A parser with the options that every study has."""

    def add_shared(self, *, section: str) -> None:
        """Add ``--from``, ``--write-results`` and ``--list-arms``.

        Args:
            section: what ``--write-results`` writes, in words.
        """
        again = "measure nothing; print the tables of this folder of an earlier call and write its report.html anew"
        self.add_argument("--from", type=Path, dest="source", metavar="DIR", help=again)
        words = f"with --from: write {section} between the marks in this Markdown file"
        self.add_argument("--write-results", type=Path, metavar="FILE", help=words)
        self.add_argument("--list-arms", action="store_true", help="print the names of all arms and end")

    def check_measuring(self, args: argparse.Namespace, packages: Sequence[str], *, example: str) -> None:
        """Refuse what only ``--from`` has a use for, a missing ``--output``, and a machine without ``packages``."""
        for flag in ("write_results", "write_advice", "step_times"):
            if getattr(args, flag, None):
                self.error(f"--{flag.replace('_', '-')} needs --from DIR, the folder of an earlier run")
        if args.output is None:
            self.error(f"--output is missing; name {example}")
        for package in packages:
            if find_spec(package) is None:
                self.error(f"the Python package {package} is missing; pip install {package}")

    def read[T](self, what: str, read: Callable[[], T], fix: str = "", *, words: int = 200) -> T:
        """What ``read`` finds; refuses ``what`` with the first ``words`` characters of its error, and the fix."""
        try:
            return read()
        except Exception as error:  # a file that is not this tool's can hold anything
            known = isinstance(error, OSError | ValueError)
            reason = f"{error}" if known else f"it is not as this tool writes it ({type(error).__name__}: {error})"
            self.error(f"{what} cannot be read: {reason[:words]}{fix and f'; {fix}'}")

    def write_again(
        self,
        args: argparse.Namespace,
        *,
        read: Callable[[Path], Any],
        sections: Sequence[Section],
        html: Callable[[Any], str],
        table: Callable[[Any, Console], object],
    ) -> None:
        """Do what ``--from DIR`` and flags that write into documents ask of an earlier run, and print its tables.

        Nothing is written where anything is refused. Raises OSError where writing fails all the same.

        Args:
            args: with ``source``.
            read: the result in a folder; raises OSError, ValueError or KeyError where there is none.
            sections: to write; those of one document by one flag.
            html: the report, from the result.
            table: prints the result.
        """
        what, fix = f"--from {str(args.source)!a}", "name a folder of this tool's"
        result = self.read(what, lambda: read(args.source), fix)
        console = Console(highlight=False)
        self._check_files({"--from": args.source / REPORT, **{one.flag: one.path for one in sections}})
        wanted = [(one.path, one) for one in sections if one.path is not None]
        for (path, one), (another, other) in combinations(wanted, 2):
            if path.resolve() == another.resolve():
                self.error(f"{str(path)!a}: {one.flag} and {other.flag} both write into it; name two files")
        documents = [(path, one, *self._document(path, one)) for path, one in wanted]
        try:
            page = html(result)
            texts = {
                path: f"{before}{one.marks[0]}\n\n{one.made(result)}\n\n{one.marks[1]}{behind}"
                for path, one, before, behind in documents
            }
            with console.capture() as printed:
                table(result, console)
        except Exception as error:  # a file that is not this tool's can hold anything, of which drawing makes anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.error(f"{what} holds a result of which no report can be made ({reason!a}); {fix}")
        for path, text in texts.items():
            atomic.write_text(path, text)
        atomic.write_text(args.source / REPORT, page)
        print(printed.get(), end="")

    def _document(self, path: Path, section: Section) -> tuple[str, str]:
        """What of a document stays: before the first mark, and behind the second one."""
        flag, marks = f"{section.flag} {str(path)!a}", section.marks
        text = self.read(flag, lambda: path.read_text(encoding="utf-8"))
        begin, end = (text.find(mark) for mark in marks)
        if any(text.count(mark) != 1 for mark in marks) or begin > end:
            self.error(f"{flag}: it lacks the two marks between which the tool writes: {marks[0]} and {marks[1]}")
        return text[:begin], text[end + len(marks[1]) :]

    def _check_files(self, files: Mapping[str, Path | None]) -> None:
        """Refuse files that cannot be written, by the flag that asks for them."""
        for flag, path in files.items():
            if path is not None and (reason := atomic.obstacle_of_file(path)):
                self.error(f"{flag}: {str(path)!a} cannot be written: {reason}; name another")
