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
from planning import layers, scmoe, slow_links
from planning.check import ARMS, PAGE
from planning.fit import Fit, fitted, predicted_s
from planning.hardware import CONSTANTS_FILE, HARDWARE, NEAREST, Constants, Machine, machine
from planning.judging import Goal, Judged
from planning.page import Section, page
from planning.published import steps

FEW = [step for step in steps() if step.gpu == "GB300" and step.release in ("26.04.01", "26.06")]
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


def _no_constants() -> dict[str, dict[str, dict[str, float]]]:
    return {"H100": {"1.0": {"gemm": 0.5}}}


def test_the_schedule_on_measured_ops_is_what_was_predicted_then():
    """The time is computed anew from the kept costs, of one chunk; the result has it, too."""
    checked = 0
    for result in ARMS:
        for point in json.loads(result.read_text())["points"]:
            for arm in (arm for arm in point["arms"] if arm["costs"]):
                for kind in slow_links.KINDS:
                    if all(len(call) == 1 for plan in arm["plans"].values() for call in plan[kind]):
                        checked += 1
                        assert slow_links.predicted(arm, kind) == pytest.approx(arm["predicted_s"][kind], rel=1e-6)
    assert checked == sum(len(slow_links.judged(result)) for result in ARMS) > 10
    wrong = json.loads(ARMS[0].read_text())["points"][0]["arms"][1]
    wrong["plans"]["0"]["training"] = [[1]]  # experts that wait for their tokens
    assert slow_links.predicted(wrong, "training") > 1.01 * wrong["predicted_s"]["training"]


def test_the_page_has_the_figures_of_this_code():
    written = {name: float(value) for name, _, value in ROW.findall(PAGE.read_text())}
    shared = Machine.from_json(machine("A30-PCIe").as_json()).constants
    alone = Machine(hardware=HARDWARE["H100"], constants=Constants())
    figures = [*layers.judged(alone), *scmoe.judged(shared), *(one for arms in ARMS for one in slow_links.judged(arms))]
    assert len(written) >= len(figures) > 60
    assert len({one.what for one in figures}) == len(figures)
    assert [one.what for one in figures if written.get(one.what) != pytest.approx(one.predicted, rel=2e-3)] == []


def test_kept_constants_are_of_all_published_steps():
    told = json.loads(CONSTANTS_FILE.read_text())
    assert {(gpu, release) for gpu, its in told.items() for release in its if gpu not in NEAREST} == {
        (step.gpu, step.release) for step in steps()
    }
    (of_nearest,) = told["H200"].items()
    assert of_nearest == ("26.04.01 of H100", told["H100"]["26.04.01"])
    assert set(told) == set(HARDWARE) and (ROOT / "tools" / "planning" / "constants.json") == CONSTANTS_FILE
    assert machine("GB300", release="26.06").constants.memory == told["GB300"]["26.06"]["memory"]
