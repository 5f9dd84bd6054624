"""What the command lines of studies have in common: lists of names, and showing what an earlier call has found."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import atomic
from command_line import Parser
from rich.console import Console

from studies.report import REPORT


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
        for flag in ("write_results", "step_times"):
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
        section: Callable[[Any], str],
        marks: tuple[str, str],
        html: Callable[[Any], str],
        table: Callable[[Any, Console], object],
    ) -> None:
        """Do what ``--from DIR`` and ``--write-results FILE`` ask of an earlier run, and print its tables.

        Nothing is written where anything is refused. Raises OSError where writing fails all the same.

        Args:
            args: with ``source`` and ``write_results``.
            read: the result in a folder; raises OSError, ValueError or KeyError where there is none.
            section: of a document, from the result.
            marks: between which it stands there.
            html: the report, from the result.
            table: prints the result.
        """
        what, fix = f"--from {str(args.source)!a}", "name a folder of this tool's"
        result = self.read(what, lambda: read(args.source), fix)
        console = Console(highlight=False)
        self._check_files({"--from": args.source / REPORT, "--write-results": args.write_results})
        document = self._document(args.write_results, marks) if args.write_results else None
        try:
            page = html(result)
            between = f"{marks[0]}\n\n{section(result)}\n\n{marks[1]}" if document else ""
            with console.capture() as printed:
                table(result, console)
        except Exception as error:  # a file that is not this tool's can hold anything, of which drawing makes anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.error(f"{what} holds a result of which no report can be made ({reason!a}); {fix}")
        if document:
            atomic.write_text(args.write_results, document[0] + between + document[1])
        atomic.write_text(args.source / REPORT, page)
        print(printed.get(), end="")

    def _document(self, path: Path, marks: tuple[str, str]) -> tuple[str, str]:
        """What of a document stays: before the first mark, and behind the second one."""
        flag = f"--write-results {str(path)!a}"
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
