"""Latent projections (--moe-latent-size): they equal the reference, are priced as encode and decode, and save bytes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import cases
from models import Case
from test_layer import EP, largest_difference, run, run_reference
from test_slow_link import slow_links  # noqa: F401 - a fixture
from training import ROOT

from megatron_scmoe.contracts import Plan

LATENT = Case(latent=8, topk=2)
CASES = {
    "pos2": LATENT,
    "pos1, every block, top-1": LATENT.replace(position=("pos1",), moe_every=1, topk=1),
    "dgmoe": Case(latent=8, shortcut="dgmoe"),
    "chunks": LATENT.replace(chunks=2),
    "dgmoe in chunks": Case(latent=8, shortcut="dgmoe", chunks=2),
    "zero experts": Case(latent=8, router="longcat", zero_experts=3, topk=3, combine="add", chunks=2),
    "wider than the hidden state": LATENT.replace(latent=24),
}


@pytest.mark.parametrize("name", cases(CASES, {"chunks", "dgmoe in chunks", "zero experts"}))
def test_it_equals_the_reference(name):
    """Losses and every gradient; router, shared expert and zero experts read the full width."""
    case = CASES[name]
    assert largest_difference(run(case, 2), run_reference(case.reference_config())) < 1e-5


def test_ranks_agree_with_one():
    assert largest_difference(run(LATENT, 4), run(LATENT)) < 1e-5


@pytest.mark.parametrize("wrong", ["fc1_latent_proj", "fc2_latent_proj"])
def test_other_projections_are_noticed(wrong):
    """Negative control: the reference with other weights is another model."""
    config = LATENT.reference_config()
    parameters = models.reference_parameters(config)
    changed = {name: -value if wrong in name else value for name, value in parameters.items()}
    loss, _ = models.reference.loss_and_gradients(changed, *models.batch(), config)
    assert (run(LATENT)[0] - loss).abs().max() > 1e-3


@pytest.mark.parametrize("chunks", [1, 2])
def test_another_slot_changes_no_bit(chunks):
    early, late = {1: ((1,), (3,)), 2: ((1, 1), (2, 3))}[chunks]
    loss, gradients = run(LATENT.replace(chunks=chunks, expert_slot=early), 2)
    other_loss, others = run(LATENT.replace(chunks=chunks, expert_slot=late), 2)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


# ---- what they cost ---------------------------------------------------------------------------------------------

SECONDS = {("fc1_latent_proj", False): 0.2, ("fc1_latent_proj", True): 0.4}
SECONDS |= {("fc2_latent_proj", False): 0.3, ("fc2_latent_proj", True): 0.5}
CHEAP_S = 0.1  # on a busy machine


def costs(case: Case, slow: bool) -> list[dict[str, float]]:
    """What the routed call of a group costs, forward and backward, where its projections take ``SECONDS`` a chunk."""
    from megatron_scmoe.overlap import observe
    from megatron_scmoe.overlap.costs import costs_of, passes_of

    model = models.build(case)
    block = model.decoder.layers[-1]
    block.span.plan = Plan((((1,) * case.chunks),), blocking=True)
    ((tokens, labels, positions),) = models.my_batch()
    model(tokens, positions, None, labels=labels).sum().backward()  # the first one is slow
    for name in ("fc1_latent_proj", "fc2_latent_proj") if slow else ():
        module = getattr(block.mlp, name)
        module.register_forward_pre_hook(lambda *_, name=name: time.sleep(SECONDS[name, False]))
        module.register_full_backward_pre_hook(lambda *_, name=name: time.sleep(SECONDS[name, True]))
    passes = []
    for _ in range(3):
        dist.barrier()
        with observe.recording() as recorded:
            model(tokens, positions, None, labels=labels).sum().backward()
        passes += passes_of(recorded)
    found = costs_of(passes, block.span.shape, case.chunks)
    return [dataclasses.asdict(one.calls[0]) for one in (found.forward, found.backward)]


@pytest.mark.alone
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("codec", ["none", pytest.param("lsh", marks=pytest.mark.full)])
def test_projections_are_priced_as_encode_and_decode(codec, chunks):
    """And as nothing else: they are slept in, forward and backward, and what is computed beside them stays cheap.

    A codec projects all tokens at once, so that a chunk has its part of it.
    """
    case = LATENT.replace(num_groups=1, chunks=chunks, codec=codec)
    parts = chunks if codec == "lsh" else 1
    for one in ranks.run(costs, 2, case, True, layout=EP[2]):
        for backward, of_pass in enumerate(one):
            for step, name in (("encode", "fc1_latent_proj"), ("decode", "fc2_latent_proj")):
                least = SECONDS[name, bool(backward)] / parts
                assert 0.97 * least < of_pass.pop(step) < 1.2 * least + CHEAP_S, (step, one)
            assert max(of_pass["route"], of_pass["experts"]) < CHEAP_S, one  # transfers wait for the slower rank


def test_without_sleep_they_are_cheap():
    """Negative control: what is measured above is what was slept."""
    for one in ranks.run(costs, 2, LATENT.replace(num_groups=1), False, layout=EP[2]):
        assert max(of_pass[step] for of_pass in one for step in ("encode", "decode")) < CHEAP_S


# ---- what they save ---------------------------------------------------------------------------------------------


def sent_bytes(case: Case) -> int:
    """Of one step, by what every transfer says."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as recorded:
        model(tokens, positions, None, labels=labels).sum().backward()
    return sum(transfer.sent_bytes for transfer in recorded.transfers)


def test_transfers_have_the_width_of_latents():
    """Rows of the two dispatches have the gate weight beside them, in 16 bytes; the same experts are chosen."""
    one_group = Case(num_groups=1, topk=2)
    rows = {}
    for latent in (None, 8, 4):
        of_ranks = ranks.run(sent_bytes, 2, one_group.replace(latent=latent), layout=EP[2])
        width = 4 * (latent or 16)
        rows[latent] = [num_bytes / (4 * width + 2 * 16) for num_bytes in of_ranks]
    assert rows[None] == rows[8] == rows[4] and min(rows[None]) > 0


@pytest.mark.full
@pytest.mark.usefixtures("slow_links")
def test_bytes_by_interface_counters_fall_as_the_widths(tmp_path: Path):
    """The counters of each rank's network interface, not ours: they agree with ours, with latents and without."""
    counted = {}
    for latent in (0, 64, 32):
        path = tmp_path / f"{latent}.json"
        words = [sys.executable, ROOT / "tools" / "slow_link.py", "--rate", "unlimited", "--"]
        words += [sys.executable, ROOT / "tests" / "support" / "latent_bytes.py", path, latent]
        subprocess.run([str(word) for word in words], check=True, timeout=300)
        counted[latent] = json.loads(path.read_text())
    for one in counted.values():
        for on_the_wire, by_transfers in zip(one["interface"], one["transfers"], strict=True):
            assert by_transfers > 1e6
            assert by_transfers < on_the_wire < 1.04 * by_transfers, counted
    for latent in (64, 32):
        # Rows of the two dispatches, with the gate weight's 16 bytes, and of the two combines.
        ratio = (4 * latent + 8) / (4 * 256 + 8)
        for rank in range(2):
            found = counted[latent]["interface"][rank] / counted[0]["interface"][rank]
            assert found == pytest.approx(ratio, rel=0.04), counted
