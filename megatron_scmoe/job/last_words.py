"""What a rank that ends leaves in the job's store for the others, which would wait for it in vain.

Only under torchrun, whose store is there before the ranks and after them. A killed process leaves nothing: its witness
speaks for it (``witness.py``), and once the watch has begun its silence is noticed (``beats.py``). Called before the
slow imports, so nothing of Megatron is imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_scmoe.job import witness

EXIT_ENDED = 3
PLACE = "megatron_scmoe"
"""Where keys of ours begin in the job's store."""
_SAY_WITHIN = timedelta(seconds=5)
_LEFT = f"{PLACE}/left"
_OVER = "over"


@dataclass
class _Voice:
    """Of this process.

    Attributes:
        script: its name, with which lines begin.
        is_expected: whether its end is one to be told of.
        attempt: with what the keys begin of the attempt that it takes part in; None before there is one.
    """

    script: str = "pretrain_gpt_scmoe.py"
    is_expected: bool = False
    attempt: str | None = None


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


def begin(script: str = _OWN.script) -> None:
    """From now on this process does not end without a word, be it in an import; what a signal ends does.

    Args:
        script: name of what runs here.
    """
    _OWN.script = script
    _OWN.is_expected = True
    atexit.register(_at_exit)


def takes_part(attempt: str) -> None:
    """The ranks have met: what is said from now on is for those of this ``attempt``, whose keys begin so."""
    _OWN.attempt = attempt
    witness.takes_part(attempt)


def all_is_said() -> None:
    """This process ends without a word."""
    _OWN.is_expected = False
    witness.dismiss()


def leave(words: str, *, is_refusal: bool = False) -> None:
    """Say why this rank ends, once; not where no store can be reached within seconds.

    Args:
        words: why; the first line counts.
        is_refusal: whether a restart would end so again.
    """
    if not _OWN.is_expected or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    all_is_said()
    say(words, is_refusal=is_refusal, attempt=_OWN.attempt)


def say(words: str, *, is_refusal: bool = False, attempt: str | None) -> None:
    """Write in the job's store why the rank of this process, or of the one that it is a witness of, ends.

    Args:
        words: why; the first line counts.
        is_refusal: whether a restart would end so again.
        attempt: with what the keys begin of the attempt that it took part in, if any.
    """
    line = (words.splitlines() or ["without words"])[0]
    said = LastWords(int(os.environ["RANK"]), line, is_refusal, not is_refusal and _has_restarts())
    with contextlib.suppress(dist.DistError, ValueError):
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=_SAY_WITHIN, wait_for_workers=False)
        store.set(f"{_LEFT}/{said.rank}", json.dumps(asdict(said)))
        if attempt is not None:
            end(dist.PrefixStore(attempt, store), said)


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
    """Let one rank of each machine, the first that can, print why it ends before any of them does."""
    from megatron_scmoe.job import neighbours  # noqa: PLC0415 - psutil, which few need

    if neighbours.is_spokesman():
        print(f"{_OWN.script}: {line}", file=sys.stderr, flush=True)
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
