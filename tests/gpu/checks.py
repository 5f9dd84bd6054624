"""What a part of `make test-gpu` found, written down check by check: one that is killed has told something."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

PASSED = "passed"


class Checks:
    """Results of one part.

    Args:
        path: of the file that the runner reads.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.found: dict = {"checks": {}, "figures": {}, "not_run": {}, "ended": False}

    def holds(self, name: str, check: Callable[[], object]) -> None:
        """``check`` raises where something is wrong."""
        self._note(name, _outcome(check))

    def must_fail(self, name: str, check: Callable[[], object], by: type[BaseException] = AssertionError) -> None:
        """Negative control: of a mutant, ``check`` has to raise ``by``, not just anything."""
        try:
            check()
        except by as error:
            print(f"mutant {name}: noticed, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            self._note(f"mutant: {name}", PASSED)
        except BaseException:
            traceback.print_exc()
            self._note(f"mutant: {name}", f"broke otherwise: {traceback.format_exc(limit=-1).strip()}")
        else:
            self._note(f"mutant: {name}", "NOT NOTICED")

    def figure(self, name: str, value: object) -> None:
        """Something measured; floats are rounded."""
        self.found["figures"][name] = round(value, 3) if isinstance(value, float) else value
        self._write()

    def not_run(self, name: str, why: str) -> None:
        """A check that this machine has no means for: never a pass."""
        self.found["not_run"][name] = why
        self._write()

    def end(self) -> int:
        """The part came to its end; returns its exit code."""
        self.found["ended"] = True
        self._write()
        return 0

    def _note(self, name: str, outcome: str) -> None:
        print(f"{name}: {outcome}", flush=True)
        self.found["checks"][name] = outcome
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self.found))


def _outcome(check: Callable[[], object]) -> str:
    try:
        check()
    except BaseException as error:  # also SystemExit: Megatron calls sys.exit
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:500]
    return PASSED


def run_part(part: Callable[[Checks], None]) -> None:
    """The main function of a part."""
    checks = Checks(sys.argv[1])
    part(checks)
    sys.exit(checks.end())
