"""Runs whose rows travel in fp8: what the log, the report and the solver get of it, in both containers."""

from __future__ import annotations

import json
import re
import time

import models
import pytest
import ranks
import training
from cases import cases
from models import Case
from test_codec import TRAINED, train
from test_overlap import EP
from test_report import read
from training import with_flags

from megatron_scmoe.contracts import TransferName

RUNS = {
    "stock, padded": [],
    "scmoe, adaptive": [],
    "pipeline": ["--fp8-transfers combine-forward dispatch-backward"],
    "tensor and expert parallel": ["--fp8-transfers", *(name.value for name in TransferName)],
}


@pytest.mark.parametrize("name", cases(RUNS, ["scmoe, adaptive"]))
def test_it_trains_and_says_bytes_by_transfer(name, tmp_path):
    flags = with_flags(
        TRAINED[name],
        *("--a2a-codec fp8", *[" ".join(RUNS[name])] * bool(RUNS[name])),
        *(f"--overlap-report {tmp_path / 'report'}", f"--tensorboard-dir {tmp_path}"),
    )
    printed = ranks.run(train, 4 if "tensor" in name else 2, flags)[0]
    assert "exit code" not in printed, printed[-3000:]
    losses = list(training.scalars(tmp_path, "lm loss")["lm loss"].values())
    assert losses[-1] < losses[0]
    rounded = (
        set(RUNS[name][0].split()[1:] or RUNS[name][1:]) if RUNS[name] else {"dispatch-forward", "combine-backward"}
    )
    groups = [group for of_rank in read(tmp_path / "report") for line in of_rank for group in line["groups"]]
    travelled = [group for group in groups if group["sent_bytes"]]
    assert bool(travelled) == ("pipeline" not in name)  # there each stage has one expert-parallel rank
    for group in travelled:
        assert sum(group["sent_by"].values()) == group["sent_bytes"]
        assert list(group["sent_by"]) == [one.value for one in TransferName]
        for transfer, sent in group["sent_by"].items():
            share = sent / group["plain_by"][transfer]
            assert (0.3 < share < 0.6) if transfer in rounded else share == 1
    said = re.findall(r"MiB sent, .* dropped((?:, \w+-\w+ [\d.e-]+ MiB(?: \(([\d.]+)% of what it was\))?){4})", printed)
    assert bool(said) == bool(travelled)
    tags = training.scalar_names(tmp_path)
    assert {tag for tag in tags if "sent_mib/" in tag} == (
        {f"overlap/sent_mib/{one}" for one in TransferName} if travelled else set()
    )
    assert not any(tag.startswith("codec/") or "residual" in tag for tag in tags)


def costs(case: Case, slow_s: float) -> dict[str, tuple[float, float]]:
    """What a call costs in a sequence, forward and backward, where each encoding and decoding takes so much longer."""
    from megatron_scmoe.codec.rounding import Fp8
    from megatron_scmoe.overlap import observe
    from megatron_scmoe.overlap.costs import costs_of, passes_of
    from megatron_scmoe.overlap.plan import sequential_plan

    def slowed(function):
        return lambda *args: time.sleep(slow_s) or function(*args)

    Fp8.encode, Fp8.decode = slowed(Fp8.encode), slowed(Fp8.decode)
    model = models.build(case)
    (span,) = [layer.span for layer in model.decoder.layers if getattr(layer, "span", None) is not None]
    span.plan = sequential_plan(span.shape)
    with observe.recording() as recorded:
        ((tokens, labels, positions),) = models.my_batch()
        model(tokens, positions, None, labels=labels).sum().backward()
    found = costs_of(passes_of(recorded), span.shape, chunks=1)
    (forward,), (backward,) = found.forward.calls, found.backward.calls
    return {part: (getattr(forward, part), getattr(backward, part)) for part in ("encode", "experts", "decode")}


def test_the_solver_pays_for_rounding():
    """Where it is done: as tokens are packed and outputs unpacked, and around the experts; in backward the same."""
    slow_s = 0.5
    every = tuple(one.value for one in TransferName)
    for found in ranks.run(costs, 2, Case(num_groups=1, codec="fp8", transfers=every), slow_s, layout=EP[2]):
        for part, times in (("encode", 1), ("experts", 2), ("decode", 1)):
            for seconds in found[part]:
                assert times * slow_s <= seconds < (times + 0.9) * slow_s, (part, found)
    (found, _) = ranks.run(costs, 2, Case(num_groups=1, codec="fp8", transfers=every[:1]), slow_s, layout=EP[2])
    assert found["encode"][0] >= slow_s > max(found["encode"][1], found["experts"][1], *found["decode"])


def test_plans_are_kept_for_the_same_transfers_alone():
    from megatron_scmoe.config import CODEC_FIELDS

    assert {"a2a_codec", "fp8_transfers"} <= set(CODEC_FIELDS)
    assert json.loads(json.dumps([*TransferName])) == [one.value for one in TransferName]  # as a checkpoint has them
