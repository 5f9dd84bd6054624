"""No two streams access a tensor without an order between them, by torch's own CUDA sanitizer.

The models of `late_wire.py`, with a prompt wire: the sanitizer looks at the order of kernels, not at when they run, so
it finds what luck hides. It sees ATen's kernels, events and streams; not Triton's kernels, and not memory that is given
free too early, for which late_wire.py has a mutant.

Mutants: no wait in forward, none in backward, a transfer that does not wait for what it sends.
"""

from __future__ import annotations

import checks
import models
import torch
import wire
from models import Case

CASES = {
    "scmoe": Case(),
    "dgmoe": Case(shortcut="dgmoe"),
    "two chunks": Case(chunks=2),
    "a late landing": Case(span=2, landing=1),
    "bf16 in chunks": Case(dtype=torch.bfloat16, chunks=2),
    "lsh": Case(codec="lsh"),
    "full recompute": Case(recompute="full"),
}


MUTANTS = {
    "no wait in forward": {"drops_wait": "forward"},
    "no wait in backward": {"drops_wait": "backward"},
    "a transfer that does not wait for what it sends": {"keeps_order": False},
}


def step_on_gpu(case: Case, prompt: wire.Wire) -> None:
    """One step under the sanitizer, which raises at the first access that nothing orders."""
    from torch.cuda._sanitizer import cuda_sanitizer

    torch.cuda.synchronize()
    cuda_sanitizer.enable()
    try:
        torch.cuda.synchronize()  # told of: what came before is over
        with wire.in_place_of_torch(prompt):
            models.losses_and_gradients(case)
        assert prompt.launched, "nothing was exchanged"
    finally:
        cuda_sanitizer.disable()


def part_on_gpu(found: checks.Checks) -> None:
    """The cases, then the mutants."""
    from torch.cuda._sanitizer import CUDASanitizerErrors

    for name, case in CASES.items():
        found.holds(name, lambda case=case: step_on_gpu(case, wire.Wire(0)))
    for name, change in MUTANTS.items():
        found.must_fail(name, lambda change=change: step_on_gpu(Case(), wire.Wire(0, **change)), by=CUDASanitizerErrors)
