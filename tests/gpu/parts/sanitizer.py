"""No two streams access a tensor without an order between them, by torch's own CUDA sanitizer.

Models as in `late_wire.py`, with a prompt wire: the sanitizer looks at the order of kernels, not at when they run, so
it finds what luck hides. It sees ATen's kernels, events and streams; not Triton's kernels, and not memory that is given
free too early, for which late_wire.py has a mutant. Without CUDA, the same steps and the same wire run on stand-ins of
streams and events (tests/support/stream_stand_ins.py), which tell the sanitizer's own rules of them.

Mutants: no wait in forward, none in backward, a transfer that does not wait for what it sends, a side stream that
launches without waiting for the packing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import checks
import device
import models
import torch
import wire
from models import Case

from megatron_scmoe.contracts import Launch

CASES = {
    "scmoe": Case(),
    "dgmoe": Case(shortcut="dgmoe"),
    "two chunks": Case(chunks=2),
    "a late landing": Case(span=2, landing=1),
    "bf16 in chunks": Case(dtype=torch.bfloat16, chunks=2),
    "unique": Case(topk=2, unique="rank", chunks=2),
    "lsh": Case(codec="lsh"),
    "full recompute": Case(recompute="full"),
}
POS1 = Case(position=("pos1",))
ASIDE = {
    "launched behind": (Case(), Launch.BEHIND),
    "launched behind, full recompute": (Case(recompute="full"), Launch.BEHIND),
    "launched within attention": (POS1, Launch.WITHIN),
    "launched within attention that is recomputed": (POS1.replace(recompute="core_attn"), Launch.WITHIN),
}
MUTANTS = {
    "no wait in forward": {"drops_wait": "forward"},
    "no wait in backward": {"drops_wait": "backward"},
    "a transfer that does not wait for what it sends": {"keeps_order": False},
}


class Unordered(Exception):
    """Two streams access a tensor, and nothing says which of them comes first."""


@contextlib.contextmanager
def sanitized() -> Iterator[None]:
    """Raise Unordered where something is. On a GPU that ends what runs at its first such access."""
    if not device.HAS_CUDA:
        from stream_stand_ins import checked

        with checked(stash=False) as order:
            yield
        if order.faults:
            raise Unordered(f"{len(order.faults)} faults, the first: {order.faults[0]}")
        return
    from torch.cuda._sanitizer import CUDASanitizerErrors, cuda_sanitizer

    torch.cuda.synchronize()
    cuda_sanitizer.enable()
    try:
        torch.cuda.synchronize()  # now the sanitizer knows that what came before is over
        yield
    except CUDASanitizerErrors as errors:
        raise Unordered(f"{errors}, the first: {errors.errors[0]}") from None
    finally:
        cuda_sanitizer.disable()


def side_streams_wait_for_nothing() -> contextlib.AbstractContextManager[object]:
    """Mutant: what is launched aside does not wait for what was packed. Of all streams here that one has priority."""
    wait = torch.cuda.Stream.wait_event
    return mock.patch.object(
        torch.cuda.Stream, "wait_event", lambda one, event: None if one.priority < 0 else wait(one, event)
    )


def step(case: Case, launch: Launch = Launch.BEFORE, *, aside_waits: bool = True, **mutant: object) -> None:
    """Forward and backward, sanitized; ``aside_waits`` False and ``mutant`` are mutants."""
    with sanitized():
        prompt = wire.Wire(0, by_streams=True, **mutant)
        aside = contextlib.nullcontext() if aside_waits else side_streams_wait_for_nothing()
        with wire.in_place_of_torch(prompt), aside:
            models.losses_and_gradients(case, launch=launch)
    assert prompt.launched, "nothing was exchanged"


def part(found: checks.Checks) -> None:
    """All cases, then the mutants."""
    device.prepare()
    with device.fake_ranks(2):
        for name, case in CASES.items():
            found.holds(name, lambda case=case: step(case))
        for name, (case, launch) in ASIDE.items():
            found.holds(name, functools.partial(step, case, launch))
        for name, mutant in MUTANTS.items():
            found.must_fail(name, lambda mutant=mutant: step(Case(), **mutant), by=Unordered)
        for name in ("launched behind", "launched within attention"):
            mutant = functools.partial(step, *ASIDE[name], aside_waits=False)
            found.must_fail(f"{name} by a side stream that waits for nothing", mutant, by=Unordered)


if __name__ == "__main__":
    checks.run_part(part)
