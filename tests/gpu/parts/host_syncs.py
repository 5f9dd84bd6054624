"""Where the host waits for the GPU: in forward for the counts of rows alone, in backward never.

Small models in a world of two ranks of which one exists, with a prompt wire. torch's own sync debug mode makes an error
of every operation that waits (copies to the host, ``item``); it does not see ``Event.synchronize``, which is counted.

Mutants: an ``item`` in the router, an ``item`` in backward, an event that is waited for in backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import checks
import device
import models
import torch
import wire
from models import Case
from torch import Tensor

PADDED = Case(capacity=2.0, padded=True)
DROPLESS = {
    "one chunk": Case(),
    "two chunks": Case(chunks=2),
    "dgmoe": Case(shortcut="dgmoe"),
    "unique": Case(topk=2, unique="rank"),
}


class HostWaitsError(Exception):
    """The host waited where it must not: what mutants have to raise, and nothing else."""


@contextlib.contextmanager
def no_waits(*, events: bool = True) -> Iterator[list[str]]:
    """Raise HostWaitsError for an operation that waits, and for events; a list of them where they may be waited for."""
    original, waits = torch.cuda.Event.synchronize, []

    def synchronize(event: torch.cuda.Event) -> None:
        waits.append("done" if event.query() else "waited for")
        original(event)

    torch.cuda.Event.synchronize = synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield waits
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise HostWaitsError(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.Event.synchronize = original
    if events and waits:
        raise HostWaitsError(f"the host waited for {len(waits)} events")


def model_and_batch(case: Case) -> tuple[torch.nn.Module, list[Tensor]]:
    """The model, warmed up by one step: what is made once has been made."""
    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    with wire.in_place_of_torch(wire.Wire(0)):
        model(tokens, positions, None, labels=labels).sum().backward()
    torch.cuda.synchronize()
    return model, [tokens, labels, positions]


def loss_of(model: torch.nn.Module, batch: list[Tensor]) -> Tensor:
    tokens, labels, positions = batch
    return model(tokens, positions, None, labels=labels).sum()


def backward_waits_for_nothing(case: Case, *, item: bool = False, event: bool = False) -> None:
    """``item`` and ``event`` are mutants."""
    model, batch = model_and_batch(case)

    def wait(grad: Tensor) -> None:
        if item:
            grad.sum().item()
        if event:
            torch.cuda.current_stream().record_event().synchronize()

    with wire.in_place_of_torch(wire.Wire(0)):
        loss = loss_of(model, batch)
        if item or event:
            model.decoder.layers[0].self_attention.linear_qkv.weight.register_hook(wait)
        torch.cuda.synchronize()
        with no_waits():
            loss.backward()


def forward_waits_for_nothing(case: Case, *, item: bool = False) -> None:
    """With padded capacity, where nobody has to count; ``item`` is a mutant."""
    model, batch = model_and_batch(case)

    def read(_module: torch.nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        outputs[0].sum().item()

    if item:
        model.decoder.layers[1].mlp.router.register_forward_hook(read)
    with wire.in_place_of_torch(wire.Wire(0)), no_waits():
        loss_of(model, batch)


def forward_waits_for_counts_alone(case: Case, name: str, found: checks.Checks) -> None:
    """Nothing but one event for each routing, whatever its chunks."""
    model, batch = model_and_batch(case)
    with wire.in_place_of_torch(wire.Wire(0)) as prompt, no_waits(events=False) as waits:
        torch.cuda._sleep(int(2e-3 * wire.cycles_per_s()))  # so that the host is ahead, as in a training
        loss_of(model, batch)
    routings = prompt.launched // (2 * case.chunks)  # a dispatch and a combine for each chunk
    found.figure(f"{name}: routings, events asked for, waited for", [routings, len(waits), waits.count("waited for")])
    assert len(waits) == routings, f"{len(waits)} events for {routings} routings"


def part(found: checks.Checks) -> None:
    """Backward, forward, and the mutants."""
    device.prepare()
    torch.use_deterministic_algorithms(False)  # as in a training: other kernels may wait
    wire.cycles_per_s()  # waits
    with device.fake_ranks(2):
        for name, case in DROPLESS.items():
            found.holds(f"backward, {name}", lambda case=case: backward_waits_for_nothing(case))
            found.holds(
                f"forward, {name}", lambda case=case, name=name: forward_waits_for_counts_alone(case, name, found)
            )
        found.holds("backward, padded", lambda: backward_waits_for_nothing(PADDED))
        found.holds("forward, padded", lambda: forward_waits_for_nothing(PADDED))
        found.must_fail("an item in the router", lambda: forward_waits_for_nothing(PADDED, item=True), HostWaitsError)
        found.must_fail("an item in backward", lambda: backward_waits_for_nothing(Case(), item=True), HostWaitsError)
        found.must_fail("an event in backward", lambda: backward_waits_for_nothing(Case(), event=True), HostWaitsError)


if __name__ == "__main__":
    checks.run_part(part)
