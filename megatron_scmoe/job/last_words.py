"""What a rank that ends leaves in the job's store for the others, which would wait for it in vain.

Only under torchrun, whose store is there before the ranks and after them. A killed process leaves nothing: until the
watch begins a witness speaks for it, and from then on its silence is noticed (``beats.py``). Called before the slow
imports, so nothing of Megatron is imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

EXIT_ENDED = 3
PLACE = "megatron_scmoe"
"""Where keys of ours begin in the job's store."""
_SAY_WITHIN = timedelta(seconds=5)
_LEFT = f"{PLACE}/left"
_OVER = "over"
_DISMISSED = b"\n"


class _Witness:
    """A small process that says a word for this one where a signal ends it, as the kernel does when memory is short.

    It reads the attempt that its parent takes part in from a pipe, which the kernel closes with the parent.
    """

    def __init__(self) -> None:
        ends, self._to_witness = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._to_witness)
            _attest(ends)
        os.close(ends)

    def takes_part(self, attempt: str) -> None:
        os.write(self._to_witness, attempt.encode())

    def dismiss(self) -> None:
        os.write(self._to_witness, _DISMISSED)
        os.close(self._to_witness)
        os.waitpid(self._pid, 0)


@dataclass
class _Voice:
    """Of this process.

    Attributes:
        is_expected: whether its end is one to be told of.
        attempt: with what the keys begin of the attempt that it takes part in; None before there is one.
        witness: of its end by a signal, until others watch it.
    """

    is_expected: bool = False
    attempt: str | None = None
    witness: _Witness | None = None


_OWN = _Voice()


@dataclass(frozen=True)
class LastWords:
    """Why a rank has ended.

    Attributes:
        rank: which.
        words: in one line.
        is_refusal: whether it would end so again.
        comes_back: whether its torchrun starts it again.
    """

    rank: int
    words: str
    is_refusal: bool = False
    comes_back: bool = False

    def in_words(self) -> str:
        """Who, and why."""
        return f"rank {self.rank} {'refuses' if self.is_refusal else 'has ended'}: {self.words}"


def begin() -> None:
    """From now on this process does not end without a word, be it in an import, or by a signal."""
    _OWN.is_expected = True
    if _is_under_torchrun():
        _OWN.witness = _Witness()
    atexit.register(_at_exit)


def takes_part(attempt: str) -> None:
    """The ranks have met: what is said from now on is for those of this ``attempt``, whose keys begin so."""
    _OWN.attempt = attempt
    if _OWN.witness is not None:
        _OWN.witness.takes_part(attempt)


def dismiss_witness() -> None:
    """Others watch this process now, or nobody will."""
    if _OWN.witness is not None:
        _OWN.witness.dismiss()
        _OWN.witness = None


def all_is_said() -> None:
    """This process ends without a word."""
    _OWN.is_expected = False
    dismiss_witness()


def leave(words: str, *, is_refusal: bool = False) -> None:
    """Say why this rank ends, once; not where no store can be reached within seconds.

    Args:
        words: why; the first line counts.
        is_refusal: whether a restart would end so again.
    """
    if not _OWN.is_expected or not _is_under_torchrun():
        return
    all_is_said()
    line = (words.splitlines() or ["without words"])[0]
    said = LastWords(int(os.environ["RANK"]), line, is_refusal, not is_refusal and _has_restarts())
    with contextlib.suppress(dist.DistError, ValueError):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=_SAY_WITHIN, wait_for_workers=False)
        store.set(f"{_LEFT}/{said.rank}", json.dumps(asdict(said)))
        if _OWN.attempt is not None:
            end(dist.PrefixStore(_OWN.attempt, store), said)


def _attest(ends: int) -> NoReturn:
    """The witness: wait for the end of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for ranks; it comes to all of a terminal
    with os.fdopen(ends, "rb") as pipe:
        heard_of = pipe.read()
    if not heard_of.endswith(_DISMISSED):
        _OWN.attempt = heard_of.decode() or None
        leave("a signal has ended it: see what its torchrun printed; -9 may be the kernel, short of memory")
    os._exit(0)


def _is_under_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _has_restarts() -> bool:
    done, allowed = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < allowed


def _at_exit() -> None:
    error = getattr(sys, "last_exc", None)
    leave(describe(error) if error is not None else "see what it printed")


def describe(error: BaseException) -> str:
    """Its class and message, in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ").removesuffix(": ")


def say_once(line: str) -> None:
    """Let one rank of each machine print why it ends, before any of them does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"pretrain_gpt_scmoe.py: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # torchrun ends all processes as soon as one has: let the one that prints be the first


def stop(line: str) -> NoReturn:
    """End this process because others have ended; one rank of each machine says why."""
    say_once(f"ended: {line}")
    leave(line)
    sys.exit(EXIT_ENDED)


def end(attempt: dist.Store, said: LastWords) -> None:
    """Let an attempt be over for all who take part; the first to say so counts."""
    attempt.compare_set(_OVER, "", json.dumps(asdict(said)))


def heard(attempt: dist.Store) -> LastWords | None:
    """Why an attempt is over; None while it is not."""
    return _read(attempt, _OVER)


def of_rank(store: dist.Store, rank: int) -> LastWords | None:
    """What the process of a rank said that ended last; None where it has come back, or said nothing."""
    return _read(store, f"{_LEFT}/{rank}")


def forget(store: dist.Store, rank: int) -> None:
    """It has come back."""
    store.delete_key(f"{_LEFT}/{rank}")


def _read(store: dist.Store, key: str) -> LastWords | None:
    return LastWords(**json.loads(store.get(key))) if store.check([key]) else None
