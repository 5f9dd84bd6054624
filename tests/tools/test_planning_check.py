"""The planner's judges: fits that find what steps were made with, goals that fail where they should, the page."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from training import ROOT

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from planning import layers, scmoe, scmoe_bounds, slow_links
from planning.check import ARMS, PAGE
from planning.fit import Fit, fitted, predicted_s
from planning.hardware import CONSTANTS_FILE, HARDWARE, NEAREST, Constants, Machine, machine
from planning.judging import Goal, Judged
from planning.kernels import Clock
from planning.page import Section, page
from planning.published import steps
from planning.training import Precision

FEW = [step for step in steps() if step.gpu == "GB300" and step.release in ("26.04.01", "26.06")]
ALONE = Machine(hardware=HARDWARE["H100"], constants=Constants())
ROW = re.compile(r"\| (.+) \| ([\d.e+]+) \| ([\d.e+-]+) \| [+-]\d+% \|")


def test_a_fit_finds_what_steps_were_made_with():
    truth = Fit(("memory", "launch_s", "GB300", "26.06"), (-0.2, 0.3, 0.1, 0.08))
    made = [replace(step, step_s=predicted_s(step, truth)) for step in FEW]
    found = fitted(made)
    errors = [abs(math.log(predicted_s(step, found) / step.step_s)) for step in made]
    assert max(errors) < 0.03
    assert abs(math.log(predicted_s(made[0], Fit((), ())) / made[0].step_s)) > 0.03  # no fit, no luck


def test_one_wild_row_does_not_bend_a_fit():
    truth = Fit(("memory",), (-0.2,))
    made = [replace(step, step_s=predicted_s(step, truth)) for step in FEW]
    found = fitted([replace(made[0], step_s=5 * made[0].step_s), *made[1:]])
    errors = [abs(math.log(predicted_s(step, found) / step.step_s)) for step in made[1:]]
    assert sorted(errors)[len(errors) // 2] < 0.1


@pytest.mark.parametrize(
    ("predicted", "met"),
    [((1.05, 0.9, 1.29), True), ((1.05, 0.9, 1.31), False), ((1.2, 0.75, 1.29), False), ((), False)],
)
def test_goals_are_missed_where_one_figure_or_the_middle_is_too_far_off(predicted, met):
    figures = [Judged(what="", measured=1.0, predicted=value) for value in predicted]
    assert Goal(name="", each=0.3, middle=0.15).met(figures) is met
    if figures:
        text = page([Section(Goal(name="published steps", each=0.3, middle=0.15), tuple(figures))], _no_constants())
        assert ("**missed**" not in text) is met
        assert f"\n{len(figures)} steps of 1 families" in text and "{" not in text
        assert "| measured (ratio) | predicted (ratio) |" in text


def _no_constants() -> dict[str, dict[str, dict[str, float]]]:
    return {"H100": {"1.0": {"gemm": 0.5}}}


def test_the_schedule_on_measured_ops_is_what_was_predicted_then():
    """The time is computed anew from the kept costs; the result has it, too."""
    checked = 0
    for folder in ARMS:
        for _, arm, kind in slow_links.arms(folder):
            if arm["predicted_s"] and slow_links.is_kept(arm, kind):
                checked += 1
                assert slow_links.predicted(arm, kind) == pytest.approx(arm["predicted_s"][kind], rel=1e-6)
    assert checked > 10
    late = ROOT / "docs" / "results" / "late-landing"
    wrong = next(arm for _, arm, kind in slow_links.arms(late) if arm["costs"] and slow_links.is_kept(arm, kind))
    wrong["plans"]["0"]["training"] = [[1]]  # experts that wait for their tokens
    assert slow_links.predicted(wrong, "training") > 1.01 * wrong["predicted_s"]["training"]


def test_one_layer_is_what_the_test_builds():
    """Two products of 8192 rows, no gate, shared expert or norm; in 8 bits rows are padded, HybridEP's not."""
    seconds = {one.what: one.predicted for one in layers.judged(ALONE)}
    assert len(seconds) == 24
    h100, elements = HARDWARE["H100"], 8192 * 14336
    products = 2 * 2 * elements * 4096 / h100.bf16
    moved = (2 + 2 + 12) * elements / h100.memory_bandwidth  # GELU; weights in fp32
    sent = 2 * 8192 * 4096 * 2 * 7 / 8 / h100.link
    least = (products + moved + sent) / 0.8  # a gate, or no weights in fp32, is farther off
    assert least < seconds["Mixtral, alltoall, bf16, forward"] < 1.1 * least
    padded, whole = (
        seconds[f"DeepSeek, {name}, fp8-blockwise, forward"] - seconds[f"DeepSeek, {name}, bf16, forward"]
        for name in ("deepep", "hybridep")
    )
    rows = 4096 * 8 * 7168 * 2
    assert padded - whole == pytest.approx(4 * rows / (0.8 * HARDWARE["H100"].memory_bandwidth), rel=0.02)


def test_products_with_scales_of_blocks_have_their_published_rate_on_hopper():
    large = (16384, 16384, 16384)
    rates = {
        of: 1 / Clock(ALONE, of).product(*large) for of in (Precision.BF16, Precision.FP8_BLOCKWISE, Precision.FP8)
    }
    assert rates[Precision.FP8_BLOCKWISE] / rates[Precision.BF16] == pytest.approx(1.75, rel=0.01)
    assert rates[Precision.FP8] / rates[Precision.BF16] == pytest.approx(2.0, rel=0.01)
    none = Machine(hardware=HARDWARE["A30-PCIe"], constants=Constants())  # has no 8 bits: never more than its peak
    assert Clock(none, Precision.FP8_BLOCKWISE).peak == HARDWARE["A30-PCIe"].bf16


def test_causes_say_what_is_missing():
    figures = layers.judged(ALONE)
    lines = list(layers.causes(figures))
    assert len(lines) == 8 and "Mixtral, bf16, forward" in lines[0]
    short_ms = [
        1000 * (one.measured - one.predicted) for one in figures if "Mixtral" in one.what and "bf16, f" in one.what
    ]
    assert f"{sum(short_ms) / 3:.2f} ms too short" in lines[0]
    exact = [replace(one, predicted=one.measured) for one in figures]
    assert all(": 0.00 ms too short" in line for line in layers.causes(exact))


def test_published_speed_ups_bound_the_all_to_all():
    """Shared-expert 1.25 and ScMoE 2.0 of one model: 0.8 and 0.5 of its step, so 0.3 of it was hidden."""
    assert scmoe_bounds.saved(1.25, 2.0) == pytest.approx(0.3)
    told = list(scmoe_bounds.causes(Constants()))
    (line,) = (line for line in told if line.startswith("table 1, inference"))
    asked = 2 * (1 / 1.35 - 1 / 1.82)
    assert f"at least {asked:.0%} of the top-2 step" in line and f"for {asked / 0.6:.0%} of it in MoE" in line
    pair = next(line for line in told if line.startswith("figure 8, A30"))
    assert "39% of the shared-expert pair" in pair  # 0.27 / 0.7
    (links,) = (line for line in told if line.startswith("SwinV2"))
    assert float(re.search(r", (\d+) times apart", links)[1]) > 6


def test_vision_sends_and_computes_whole_buffers():
    """Tutel's capacity: a quarter more than is routed. The language models' is what is routed."""
    net = next(net for net in scmoe.SWIN if net.shortcut)
    assert {one.capacity for one in scmoe.SWIN} == {1.25}
    assert {one.capacity for one in (*scmoe.GPT2_MEDIUM, *scmoe.GPT3_XL, *scmoe.LLAMA2)} == {1.0}
    where = scmoe.machine_of("A30-PCIe", scmoe.SWIN, Constants())
    more, less = (
        scmoe.pair(replace(net, pairs=1, capacity=its), where, 8, scmoe.TOP2).a2a_s for its in (net.capacity, 1.0)
    )
    assert more / less == pytest.approx(1.25, rel=0.02)


def test_the_page_has_the_figures_of_this_code():
    written = {name: float(value) for name, _, value in ROW.findall(PAGE.read_text())}
    shared = Machine.from_json(machine("A30-PCIe").as_json()).constants
    figures = [*layers.judged(ALONE), *scmoe.judged(shared), *(one for arms in ARMS for one in slow_links.judged(arms))]
    assert len(written) >= len(figures) > 60
    assert len({one.what for one in figures}) == len(figures)
    assert [one.what for one in figures if written.get(one.what) != pytest.approx(one.predicted, rel=2e-3)] == []
    headings = re.findall(r"measured \((.*?)\) \| predicted \((.*?)\)", PAGE.read_text())
    assert headings == [("s", "s"), ("s", "s"), ("ratio", "ratio"), ("s", "s")]
    causes = [*layers.causes(layers.judged(ALONE)), *scmoe_bounds.causes(shared)]
    causes += [cause for arms in ARMS for cause in slow_links.causes(arms)]
    assert len(causes) > 15 and [cause for cause in causes if f"* {cause}\n" not in PAGE.read_text()] == []


def test_kept_constants_are_of_all_published_steps():
    told = json.loads(CONSTANTS_FILE.read_text())
    assert {(gpu, release) for gpu, its in told.items() for release in its if gpu not in NEAREST} == {
        (step.gpu, step.release) for step in steps()
    }
    (of_nearest,) = told["H200"].items()
    assert of_nearest == ("26.04.01 of H100", told["H100"]["26.04.01"])
    assert set(told) == set(HARDWARE) and (ROOT / "tools" / "planning" / "constants.json") == CONSTANTS_FILE
    assert machine("GB300", release="26.06").constants.memory == told["GB300"]["26.06"]["memory"]
