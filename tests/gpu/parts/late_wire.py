"""No wait is missing: with an all-to-all that arrives late, every number is that of a prompt one, bit for bit.

Small models of ours (tests/support/models.py) run one step, forward and backward, in a world of two ranks of which one
exists. Each all-to-all arrives 20 ms late, by when the host has enqueued whatever reads too early; and nothing but the
exchange keeps alive what was sent. On the CPU it arrives where it is waited for. Compared with a prompt wire: without
overlap, in chunks (which change rounding) with the same chunks.

Mutants: no wait in forward, none in backward, what was sent given free at launch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator

import checks
import device
import models
import torch
import wire
from models import Case

from megatron_scmoe.contracts import Launch
from megatron_scmoe.dispatch import exchange

DELAY_S = 0.02
EP = 2

CASES = {
    **{f"scmoe, slot {slot}": Case(expert_slot=(slot,)) for slot in (1, 2, 3, 4)},
    **{f"dgmoe, slot {slot}": Case(shortcut="dgmoe", expert_slot=(slot,)) for slot in (1, 2, 3)},
    "pos1": Case(position=("pos1",)),
    "pos3": Case(position=("pos3",)),
    "a late landing": Case(span=2, landing=1),
    "two chunks": Case(chunks=2),
    "four chunks": Case(chunks=4),
    "dgmoe in chunks": Case(shortcut="dgmoe", chunks=2),
    "top-2": Case(topk=2),
    "bf16": Case(dtype=torch.bfloat16),
    "latents": Case(latent=8),
    "unique": Case(topk=2, unique="rank", chunks=2),
    "unique, ids": Case(topk=2, unique="rank", experts=16),
    "unique, ids apart": Case(topk=2, unique="rank", experts=16, weights_apart_above=0.0),
    "fp8": Case(topk=2, codec="fp8", chunks=2),
    "lsh": Case(codec="lsh"),
    "lsh in chunks": Case(codec="lsh", chunks=2),
    "lloyd": Case(codec="lsh", refinement="lloyd"),
    "zero experts": Case(router="longcat", combine="add", topk=2, zero_experts=2),
    "full recompute": Case(recompute="full"),
    "dgmoe, full recompute": Case(shortcut="dgmoe", recompute="full"),
}
POS1 = Case(position=("pos1",))
ASIDE = {
    "launched behind": (Case(), Launch.BEHIND),
    "launched behind in chunks": (Case(chunks=2, expert_slot=("2,3",)), Launch.BEHIND),
    "launched behind, a late landing": (Case(span=2, landing=1), Launch.BEHIND),
    "launched behind, full recompute": (Case(recompute="full"), Launch.BEHIND),
    "launched within attention": (POS1, Launch.WITHIN),
    "launched within attention that is recomputed": (POS1.replace(recompute="core_attn"), Launch.WITHIN),
}
"""Dispatches that the side stream launches, when the host has enqueued the op at the tap, or its projections."""


class Differs(AssertionError):
    """A late wire changed something: what mutants have to raise, and nothing else."""


def step(case: Case, late: wire.Wire, num_micro_batches: int = 1, launch: Launch = Launch.BEFORE) -> list[torch.Tensor]:
    """Losses and gradients of one step with the all-to-alls of ``late``."""
    with wire.in_place_of_torch(late):
        losses, gradients = models.losses_and_gradients(case, num_micro_batches=num_micro_batches, launch=launch)
        found = [losses.cpu(), *(gradient.cpu() for gradient in gradients.values())]
    assert late.launched, "nothing was exchanged"
    assert late.waited == late.launched, f"{late.launched} launched, {late.waited} waited for"
    return found


@functools.cache
def prompt_step(case: Case, num_micro_batches: int) -> list[torch.Tensor]:
    """With a wire that is not late; several cases are compared with the same one."""
    found = step(case, wire.Wire(0), num_micro_batches)
    assert all(tensor.isfinite().all() for tensor in found)
    assert sum(bool(tensor.any()) for tensor in found) > 0.7 * len(found), "too many are zero: of experts without rows"
    return found


def without_overlap(case: Case) -> Case:
    """The same numbers with every wait where its transfer starts."""
    return case if case.chunks > 1 else case.replace(overlap="off", expert_slot=())


def compare(case: Case, late: wire.Wire, num_micro_batches: int = 1, launch: Launch = Launch.BEFORE) -> None:
    """Raise Differs where a late wire changes a bit."""
    prompt = prompt_step(without_overlap(case), num_micro_batches)
    found = step(case, late, num_micro_batches, launch)
    for number, (one, other) in enumerate(zip(found, prompt, strict=True)):
        if not torch.equal(one, other):
            raise Differs(f"tensor {number} of {len(prompt)} differs")


@contextlib.contextmanager
def sent_is_freed_at_launch() -> Iterator[None]:
    """Mutant of the exchange: it lets go of what it sent as soon as the transfer is launched."""
    launch = exchange._Leg.launch

    def launch_and_free(leg: exchange._Leg, *args: object) -> None:
        launch(leg, *args)
        assert hasattr(leg, "_sent")
        leg._sent = ()

    exchange._Leg.launch = launch_and_free
    try:
        yield
    finally:
        exchange._Leg.launch = launch


def part(found: checks.Checks) -> None:
    """All cases, then the mutants."""
    device.prepare()
    with device.fake_ranks(EP):
        for name, case in CASES.items():
            if case.latent and device.HAS_CUDA and not importlib.util.find_spec("transformer_engine"):
                found.not_run(name, "Core builds the projections from Transformer Engine's linear")
                continue
            found.holds(name, lambda case=case: compare(case, wire.Wire(DELAY_S)))
        for name, (case, launch) in ASIDE.items():
            late = wire.Wire(DELAY_S)
            found.holds(name, functools.partial(compare, case, late, launch=launch))
        found.holds("two micro-batches in flight", lambda: compare(Case(), wire.Wire(DELAY_S), 2))
        for where in ("forward", "backward"):
            late = wire.Wire(DELAY_S, drops_wait=where)
            found.must_fail(f"no wait in {where}", lambda late=late: compare(Case(), late), by=Differs)
        with sent_is_freed_at_launch():
            found.must_fail("what was sent is freed at launch", lambda: compare(Case(), wire.Wire(DELAY_S)), by=Differs)
    found.figure("delay of each transfer, ms", DELAY_S * 1e3)


if __name__ == "__main__":
    checks.run_part(part)
