"""A small process beside a rank that says a word for it where a signal ends it, as when memory is short.

It reads from a pipe, which the kernel closes with the rank, until others watch the rank (``hangs.py``). Only standard
library: called before the slow imports, in which memory runs out, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import NoReturn

_DISMISSED = b"\n"


class _Witness:
    def __init__(self) -> None:
        end, self._pipe = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._pipe)
            _attest(end)
        os.close(end)

    def takes_part(self, attempt: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended before its rank, which runs on without
            os.write(self._pipe, attempt.encode())

    def dismiss(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, _DISMISSED)
        os.close(self._pipe)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


_OWN: list[_Witness] = []
"""Of this process: one or none."""


def begin() -> None:
    """From now on no signal ends this process without a word. Only under torchrun: elsewhere nobody would hear."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _OWN.append(_Witness())


def takes_part(attempt: str) -> None:
    """The ranks have met in this ``attempt``, whose keys begin so."""
    for witness in _OWN:
        witness.takes_part(attempt)


def dismiss() -> None:
    """Others watch this process now, or it has said itself why it ends."""
    while _OWN:
        _OWN.pop().dismiss()


def _attest(end: int) -> NoReturn:
    """The witness: wait for the end of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C comes to all of a terminal; the rank says of it what there is
    try:
        with os.fdopen(end, "rb") as pipe:
            heard = pipe.read()
        if not heard.endswith(_DISMISSED):
            _say(heard.decode() or None)
    finally:
        os._exit(0)  # without a traceback, which would look like its rank's


def _say(attempt: str | None) -> None:
    from megatron_scmoe.job import last_words  # noqa: PLC0415 - with torch, which most witnesses never need

    words = "a signal has ended it: see what its torchrun printed; -9 is what ends it where memory is short"
    last_words.say(words, attempt=attempt)
