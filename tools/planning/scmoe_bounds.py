"""Why predicted speed-ups of the ScMoE paper are too small: what published ones ask of a step, beside the prediction.

A shared-expert model and ScMoE run the same ops and send the same rows, so that what the shortcut saves is at most the
all-to-all of the shared-expert model. The top-2 model sends twice these rows, and the paper says what part of its MoE
layers' time that takes: so published speed-ups alone bound the MoE layers' part of the top-2 step from below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planning.hardware import HARDWARE, Constants
from planning.scmoe import (
    FIGURE_8,
    GPUS,
    HIDDEN,
    SHARED,
    SHARES,
    TABLES,
    TOP2,
    Method,
    machine_of,
    pair,
    steps,
    swin_s,
)

_MOE = ("router", "permute", "experts", "exposed EP")
"""Parts of a prediction that are the MoE layers'."""


def causes(constants: Constants) -> Iterator[str]:
    """Each table and figure of which published figures bound the all-to-all, and the links, in words."""
    for table, place, nets, methods in TABLES:
        speedups = {name: published for name, _, published in methods}
        if "shared-expert" not in speedups:
            continue
        where = machine_of(place, nets, constants)
        for number, kind in enumerate(("training", "inference")):
            best = max(one[number] for one in speedups.values())
            asked = 2 * saved(speedups["shared-expert"][number], best)
            found = steps(nets, TOP2, where, GPUS[place], training=not number)
            whole = sum(step.step_s for step in found)
            a2a = sum(step.a2a_s for step in found) / whole
            moe = sum(step.parts.get(part, 0.0) for step in found for part in _MOE) / whole
            yield (
                f"{table}, {kind}: the published gain over shared-expert asks for an all-to-all of at least {asked:.0%}"
                f" of the top-2 step, and so, at {SHARES[place]:.0%} of their time, for {asked / SHARES[place]:.0%} of"
                f" it in MoE layers; predicted {a2a:.0%} and {moe:.0%}"
            )
    yield _of_links(constants)
    for place, experts, relations in FIGURE_8:
        yield from _of_pair(place, experts, {name: (method, less) for name, method, less in relations}, constants)


def _of_links(constants: Constants) -> str:
    """Rates that give vision's stated shares; the paper says in section 4.1 how far apart the links are."""
    words, rates = [], []
    for place in ("A30-PCIe", "A800-NVLink"):
        rates.append(machine_of(place, swin_s(8), constants).hardware.link * constants.link)
        words.append(f"{rates[-1] / 1e9:.0f} GB/s ({place}, whose peak is {HARDWARE[place].link / 1e9:.0f})")
    return (
        f"SwinV2-MoE-S: beside computing as priced the stated shares ask for links of {' and '.join(words)}, "
        f"{rates[1] / rates[0]:.0f} times apart, where the paper says about 6: what it timed of an MoE layer beside "
        "the all-to-all takes nearly as long on both GPUs, and so is not bound by what their products take"
    )


def saved(slower: float, faster: float) -> float:
    """Part of the step to which both speed-ups are relative by which one step is shorter than the other."""
    return 1 / slower - 1 / faster


def _of_pair(
    place: str, experts: int, relations: dict[str, tuple[Method, float]], constants: Constants
) -> Iterator[str]:
    nets = swin_s(experts)
    (net,) = (replace(net, pairs=1) for net in nets if net.shortcut)
    where = machine_of(place, nets, constants)
    shared = pair(net, where, GPUS[place], SHARED)
    less = relations["shared-expert"][1]
    yield (
        f"figure 8, {place}: {HIDDEN[place]:.0%} hidden and {less:.0%} less time than shared-expert ask for an "
        f"all-to-all of {less / HIDDEN[place]:.0%} of the shared-expert pair; predicted {shared.a2a_share:.0%}"
    )
    pipelined, its_less = relations["top-2 pipelined"]
    yield (
        f"figure 8, {place}: the pipelined top-2 pair takes {(1 - less) / (1 - its_less):.2f} of the shared-expert "
        f"pair; predicted {pair(net, where, GPUS[place], pipelined).step_s / shared.step_s:.2f}"
    )
