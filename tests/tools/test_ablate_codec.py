"""tools/ablate_codec.py: arithmetic on hand-made runs, verdicts, refusals, going on, reports, and a tiny real run."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from rich.console import Console
from test_ablation import Page, numbers
from test_pipelined import EP, build
from training import ROOT

TOOL = ROOT / "tools" / "ablate_codec.py"
sys.path.insert(0, str(TOOL.parent))
import ablate_codec as tool  # noqa: E402
import provenance  # noqa: E402
from ablation.analysis import FORMAT  # noqa: E402
from codec_study import (  # noqa: E402
    analysis,
    arms,
    cost,
    encoding,
    folder,
    goals,
    jobs,
    record,
    render,
    wall_time,
    words,
)
from codec_study.arms import (  # noqa: E402
    BF16,
    COMPRESSED_CONTROL,
    CONTROL,
    FP8,
    FP8_ALL,
    HELD,
    HELD_UNCOMPENSATED,
    MODELS,
    NONE,
    NONE_TWO_RANKS,
    PAPER,
    REORDERED,
    SHORTER,
    UNCOMPRESSED,
    UNIQUE,
    UNIQUE_FP8,
    Run,
    Settings,
    all_arms,
    uncompensated,
)
from studies import kept  # noqa: E402
from studies.figures import Figure as Spread  # noqa: E402

from megatron_scmoe.config import Codec, Compensation  # noqa: E402

UNCOMPENSATED = uncompensated(6)
SEEDS = (1, 2, 3)
NOISE = {1: 0.0, 2: 0.1, 3: -0.2}
"""What a seed adds to the loss of every arm alike: pairs do not see it."""
ABOVE_NONE = {CONTROL: -1.0, "lsh q2": 2.0, PAPER: -0.8, "lsh q10": -0.9, UNCOMPENSATED: 0.6}
"""In percent, at the end; arms that are not named are 0.1 above."""
RATES = {"lsh q2": 0.02, "lsh q4": 0.1, PAPER: 0.18, "lsh q8": 0.4, "lsh q10": 0.5}


def make_run(model, arm, seed, above=None):
    percent = ABOVE_NONE.get(arm.name, 0.1) if above is None else above
    steps = [int(step * arm.share) for step in (500, 1000)]
    losses = {step: (4.0 - step / 1000 + NOISE[seed]) * (1 + percent * step / 100_000) for step in steps}
    rate = RATES.get(arm.name, 0.25) if arm.compresses and arm.is_of_lsh else 1.0
    if arm.name in (NONE, *SHORTER.values(), NONE_TWO_RANKS):
        losses = {step: 4.0 - step / 1000 + NOISE[seed] for step in losses}
    return {
        "model": model,
        "arm": arm.name,
        "seed": seed,
        "tokens_per_step": 2048,
        "validation": [[step, loss] for step, loss in losses.items()],
        "train": [[step, loss + 0.01] for step, loss in losses.items()],
        "rate": [[steps[0], rate / 2], [steps[1], rate]],
        "residual": [[steps[0], 0.3], [steps[1], 0.2 if arm.compresses else 0.0]],
        "final_validation": losses[steps[1]],
        "final_validation_of_tokens": losses[steps[1]] + 0.02 * arm.compresses,
        "final_rate": rate + 0.01 * (seed - 2) * (rate < 1),
        "final_residual": 0.2 if arm.compresses else 0.0,
        "final_bytes": (arm.ranks - 1) * (3e6 if "unique" in arm.name else 4e6),
        "seconds_per_step": 0.25 + 0.01 * seed,
        "commit": "0123abc",
        "changed_files": 0,
        "wall_s": 300.0,
    }


def make_result(models=("top-2", "pos2"), wanted=()):
    runs = [
        make_run(model, arm, seed)
        for model in models
        for arm in all_arms()
        if arm.fits(model) and (not wanted or arm.name in wanted)
        for seed in SEEDS
    ]
    meta = {
        "commit": "0123abc",
        "changed_files": 1,
        "versions": {"python": "3.12.1", "torch": "2.13.0", "megatron-core": "0.19.2"},
        "hardware": {"device": "A <CPU> & more", "cores": 2},
        "time": "2026-01-02T03:04:05+00:00",
        "iterations": 1000,
        "eval_every": 500,
        "eval_sequences": 320,
        "tokens_per_expert": 1024,
        "data": {"tokens": 4_000_000, "vocabulary": 1024, "sha256": "0" * 64},
        "sizes": arms.SIZES,
        "seeds": 3,
        "commits_of_runs": ["0123abc"],
    }
    return {"meta": meta, "runs": runs, "encoding": None}


def keep(result, study):
    """Leave a result as a call does that has trained it."""
    for run in result["runs"]:
        place = study / "runs" / Run(run["model"], by_name(run["arm"]), run["seed"]).name
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(run))
    (study / "meta.json").write_text(json.dumps(result["meta"]))


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def page(result):
    return render.html(result)


def changed(result, arm, above):
    """The result with other losses of one arm: so many percent above none, by seed."""
    runs = [
        make_run(run["model"], next(one for one in all_arms() if one.name == arm), run["seed"], above[run["seed"] - 1])
        if run["arm"] == arm
        else run
        for run in result["runs"]
    ]
    return {**result, "runs": runs}


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_spread_is_median_and_range():
    assert analysis.spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert analysis.spread([]) is None


def test_differences_are_paired_by_seed():
    """Losses of 2, 4, 8 and of 2.2, 4, 9.6: medians differ by 0, pairs by 10, 0 and 20 percent."""
    runs = [
        {"model": "m", "arm": arm, "seed": seed, "final_validation": loss}
        for arm, losses in {NONE: (2.0, 4.0, 8.0), PAPER: (2.2, 4.0, 9.6)}.items()
        for seed, loss in enumerate(losses)
    ]
    assert analysis.percent_above(runs, "m", PAPER, NONE) == pytest.approx([10.0, 0.0, 20.0])
    assert analysis.spread(analysis.percent_above(runs, "m", PAPER, NONE)).value == pytest.approx(10.0)
    assert analysis.percent_above(runs[1:], "m", PAPER, NONE) == pytest.approx([0.0, 20.0])
    assert analysis.percent_above(runs, "m", "lsh q2", NONE) == []


def test_rows_by_hand(result):
    rows = {(row.model, row.arm): row for row in analysis.rows(result["runs"])}
    assert list(dict.fromkeys(model for model, _ in rows)) == ["top-2", "pos2"]
    row = rows["top-2", PAPER]
    assert row.seeds == SEEDS
    assert (row.to_none.value, row.to_none.low, row.to_none.high) == pytest.approx((-0.8, -0.8, -0.8))
    assert row.to_control.value == pytest.approx(100 * (0.992 / 0.99 - 1))
    assert (row.loss.value, row.loss.low, row.loss.high) == pytest.approx((3 * 0.992, 2.8 * 0.992, 3.1 * 0.992))
    assert (row.rate.value, row.rate.low, row.rate.high) == pytest.approx((0.18, 0.17, 0.19))
    assert rows["top-2", NONE].with_tokens is rows["top-2", NONE].with_tokens_to_none is None
    shares = [2 / (loss * 0.992) for loss in (3.0, 3.1, 2.8)]  # 0.02 of each seed's loss, in percent
    assert (row.with_tokens.value, row.with_tokens.low, row.with_tokens.high) == pytest.approx(
        (shares[0], shares[1], shares[2])
    )
    assert row.with_tokens_to_none.value == pytest.approx(-0.8 + 2 / 3)  # 0.02 of 3.0, in percent
    assert (row.seconds.value, row.seconds.low, row.seconds.high) == pytest.approx((0.27, 0.26, 0.28))


def test_figures_of_fewer_seeds_say_so(result):
    def of(runs):
        row = next(row for row in analysis.rows(runs) if (row.model, row.arm) == ("top-2", PAPER))
        return dict(zip(words.HEADINGS, words.cells(row), strict=True))

    names = ("evaluated with tokens", "that above none")
    assert not any("seeds" in figure for figure in of(result["runs"]).values())
    first = [{name: run[name] for name in run.keys() - {"final_validation_of_tokens"}} for run in result["runs"]]
    fewer = of([one if one["seed"] == 2 else run for one, run in zip(first, result["runs"], strict=True)])
    assert {name for name, figure in fewer.items() if "seeds" in figure} == set(names)
    assert all(fewer[name].endswith("] (2 of 3 seeds)") for name in names)
    assert {of(first)[name] for name in names} == {"-"}


def test_curves_over_steps(result):
    above = analysis.percent_above_none_over_steps(result["runs"], "top-2", PAPER)
    assert {step: one.value for step, one in above.items()} == pytest.approx({500: -0.4, 1000: -0.8})
    losses = analysis.over_steps(result["runs"], "top-2", NONE, "validation")
    assert losses[500] == Spread(3.5, 3.3, 3.6)
    short = copy.deepcopy(result["runs"])
    short[0]["validation"].pop()  # a step that one seed lacks has no spread
    assert list(analysis.over_steps(short, "top-2", NONE, "validation")) == [500]


# --- verdicts --------------------------------------------------------------------------------------------------------


def judged(result, *its_goals, model="top-2"):
    return [goals.judge(goal, result["runs"], model) for goal in its_goals]


def quality(result):
    return judged(result, *goals.QUALITY)


def median_said(outcome):
    """The words of an outcome without the range, whose ends may be equal or differ in the last bit."""
    return re.sub(r" \[.*?\]", "", outcome.words)


def test_goals_met(result):
    none, control, rate = quality(result)
    assert none.met and median_said(none) == "-0.80%: met"
    assert control.met and median_said(control) == "+0.20%: met"
    of_four, of_six, at_rate = judged(result, *goals.COMPENSATION)
    assert at_rate.met is False and at_rate.arm == HELD_UNCOMPENSATED  # both are 0.1 above none
    assert of_four.met is False and of_four.arm == uncompensated(4) and median_said(of_four).startswith("+0.00%")
    assert of_six.met and of_six.arm == UNCOMPENSATED and median_said(of_six) == "+1.41%: met"
    assert rate.met and rate.arm == "lsh q6" and rate.words == "0.180 [0.170, 0.190]: met"
    assert goals.claim(result["runs"], "top-2").startswith("`top-2`: the claim holds here (lsh q6 against none -0.80%")


def test_a_gain_that_the_control_has_too_is_no_gain(result):
    """The confound: below none, and more than half a percent above the control."""
    confounded = changed(changed(result, CONTROL, (-2.0,) * 3), "lsh q10", (-1.9,) * 3)
    none, control, rate = quality(confounded)
    assert none.met and control.met is False
    assert median_said(control) == "+1.22%: **missed by 0.72%**"
    assert rate.met is False and rate.arm == "lsh q10" and "0.500" in rate.words and "missed by 0.300" in rate.words
    said = goals.claim(confounded["runs"], "top-2")
    assert "does not hold here" in said and "the direct path around the experts explains that" in said
    assert "control +1.22%" in said


def test_a_loss_against_none_is_said_with_its_figures(result):
    worse = changed(result, PAPER, (0.7, 0.9, 0.4))
    none, *_ = quality(worse)
    assert none.met is False
    assert none.words == "+0.70% [+0.40%, +0.90%]: **missed by 0.20%**, but the seeds disagree"
    assert "does not hold here.** (lsh q6 against none +0.70%" in goals.claim(worse["runs"], "top-2")


def test_negative_control_fails_where_compensation_does_nothing(result):
    useless = changed(result, UNCOMPENSATED, (ABOVE_NONE[PAPER],) * 3)
    _, of_six, _ = judged(useless, *goals.COMPENSATION)
    assert of_six.met is False and of_six.words == "+0.00%: **missed by 0.00%**"


def test_refinement_pays_where_it_wins_more_than_its_time_costs(result):
    of_four, of_six = judged(result, *goals.REFINEMENT)  # 0.1% and 0.6% above none unrefined, both 0.1% refined
    assert of_four.met is False and of_six.met and of_six.words.startswith("-0.50%")
    little, _ = judged(changed(result, uncompensated(4, refined=True), (0.05,) * 3), *goals.REFINEMENT)
    assert little.met is False and median_said(little) == "-0.05%: **missed by 0.05%**"
    enough, _ = judged(changed(result, uncompensated(4, refined=True), (-0.1,) * 3), *goals.REFINEMENT)
    assert enough.met is True


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (((0.2, 0.21, 0.185), (0.21, 0.2, 0.2), (0.2, 0.2, 0.2)), "5.00% [0.00%, 7.50%]: met"),
        (
            ((0.2, 0.23, 0.2), (0.17, 0.2, 0.2), (0.2, 0.2, 0.2)),
            "15.00% [0.00%, 15.00%]: **missed by 5.00%**, but the seeds disagree",
        ),
    ],
)
def test_a_target_rate_is_judged_where_it_is_farthest(result, rates, said):
    """Whatever it was in the first fifth of the steps, in which the number of functions still moves."""
    of_seed = {
        seed: [[200, 0.9], *zip((300, 600, 1000), mine, strict=True)] for seed, mine in zip(SEEDS, rates, strict=True)
    }
    runs = [{**run, "rate": of_seed[run["seed"]]} if run["arm"] == HELD else run for run in result["runs"]]
    outcome, other = judged({"runs": runs}, *goals.TARGET)
    assert outcome.arm == HELD and outcome.words == said
    assert other.arm == HELD_UNCOMPENSATED and other.words.startswith("37.50%")  # 0.125 at step 500


@pytest.mark.parametrize(
    ("sign", "low", "high", "disagree"),
    [
        *(("<=", 0.0, 0.5, False), ("<=", 0.5, 0.6, True), ("<=", 0.6, 0.7, False)),
        *((">", 0.0, 0.5, False), (">", 0.5, 0.6, True), (">", 0.6, 0.7, False)),
    ],
)
def test_seeds_disagree_where_some_reach_the_threshold(sign, low, high, disagree):
    goal = goals.Goal(
        text="x", figure=lambda *_: (PAPER, Spread(low, low, high)), sign=sign, threshold=0.5, unit="rate"
    )
    assert ("but the seeds disagree" in goals.judge(goal, [], "top-2").words) == disagree


def test_no_arm_within_the_quality_row(result):
    bad = result
    for arm in all_arms():
        if arm.compresses:
            bad = changed(bad, arm.name, (3.0,) * 3)
    *_, rate = quality(bad)
    assert rate.met is False and rate.arm == "no arm is within 0.5% of both" and rate.words == "**missed**"
    said = goals.claim(bad["runs"], "top-2")
    assert said.endswith(
        "missed by 2.50%**; against the control +4.04%: **missed by 3.54%**; no arm is within 0.5% of both)."
    )


def test_what_was_not_trained_is_not_judged():
    few = make_result(("top-2",), (NONE, "lsh q2"))
    outcomes = judged(few, *goals.GOALS)
    assert {outcome.met for outcome in outcomes} == {None} and len(outcomes) == len(goals.GOALS)
    assert {outcome.words for outcome in outcomes} == {"not measured in this run"}
    assert goals.claim(few["runs"], "top-2") == "`top-2`: not enough was trained to say."


def fine(result, arm, *percents):
    """What is said of an arm that is to be within 0.1% of none, so many percent above it, by seed or at every one."""
    its_goal = goals._loss("x", arm, NONE, **goals._CLOSE)
    (outcome,) = judged(changed(result, arm, percents * 3), its_goal)
    return outcome.met, median_said(outcome)


def test_a_miss_by_less_than_rounding_alone_does_is_within_noise(result):
    """Rounding alone does -0.2% to +0.3%: 0.05% is met, 0.25% may be nothing, 0.35% is missed."""
    noisy = changed(result, REORDERED, (0.3, -0.2, 0.0))
    beside = "rounding alone (none 2 chunks against none) does +0.00%"
    assert fine(noisy, "lsh q4", 0.05) == (True, f"+0.05%: met; {beside}")
    assert fine(noisy, "lsh q4", 0.25) == (None, f"+0.25%: within noise, {beside}")
    assert fine(noisy, "lsh q4", 0.35) == (False, f"+0.35%: **missed by 0.25%**; {beside}")
    quiet = changed(result, REORDERED, (0.02, -0.03, 0.0))
    assert fine(quiet, "lsh q4", 0.25)[0] is False
    unknown = {"runs": [run for run in result["runs"] if run["arm"] != REORDERED]}
    assert fine(unknown, "lsh q4", 0.25) == (
        False,
        "+0.25%: **missed by 0.15%**; what rounding alone does was not measured",
    )


@pytest.mark.parametrize(
    ("noise", "above", "met"),
    [
        ((0.02, -0.30, 0.01), (0.28, 0.29, 0.30), False),  # on the other side of none
        ((0.40, 0.38, 0.10), (0.38, 0.17, 2.32), False),  # at one seed it is far outside
        ((0.40, 0.38, 0.10), (0.38, 0.17, 0.39), None),
        ((0.40, 0.38, 0.10), (0.38, 0.05, 0.39), None),  # between noise and zero
        ((0.40, 0.38, 0.10), (0.38, -0.05, 0.39), False),
    ],
)
def test_what_is_noise_lies_within_it_at_every_seed(result, noise, above, met):
    said = fine(changed(result, REORDERED, noise), "lsh q4", *above)
    assert said[0] is met and ("within noise" in said[1]) == (met is None), said


@pytest.mark.parametrize(("seeds", "met"), [((1,), False), ((1, 2), False), (SEEDS, None)])
def test_few_seeds_of_noise_excuse_no_more(result, seeds, met):
    noisy = changed(result, REORDERED, (0.4, 0.0, 0.4))
    runs = [run for run in noisy["runs"] if run["arm"] != REORDERED or run["seed"] in seeds]
    assert fine({"runs": runs}, "lsh q4", 0.38)[0] is met
    fewer = [run for run in runs if run["arm"] != "lsh q4" or run["seed"] == 1]
    assert fine({"runs": fewer}, "lsh q4", 0.38)[0] is None


def test_fp8_is_judged_by_two_transfers_and_four_are_reported(result):
    two, four, bf16 = judged(result, *goals.ROUNDED)
    assert (two.arm, four.arm, bf16.arm) == (FP8, FP8_ALL, BF16)
    noise = "rounding alone (none 2 chunks against none) does +0.10%"
    assert two.met and median_said(two) == f"+0.10%: met; {noise}"
    assert four.met is None and median_said(four) == f"+0.10%; {noise}"
    far = changed(changed(result, FP8, (0.3,) * 3), FP8_ALL, (0.3,) * 3)
    two, four, _ = judged(far, *goals.ROUNDED)
    assert two.met is False and four.met is None and median_said(four) == f"+0.30%; {noise}"
    assert str(goals.ROUNDED[0]).endswith("fp8 (two transfers) above none: <= 0.10%")
    assert str(goals.ROUNDED[1]).endswith("fp8 four transfers above none: reported")


def test_rows_in_fewer_bits_are_no_rows_less(result):
    """They are within 0.5% of both, and send all rows: that is no rate of LSH-MoE's."""
    bad = result
    for arm in all_arms():
        if arm.compresses and arm.is_of_lsh:
            bad = changed(bad, arm.name, (3.0,) * 3)
    assert quality(changed(bad, FP8, (-0.9,) * 3))[-1].arm == "no arm is within 0.5% of both"
    assert TIMES.step(next(run for run in result["runs"] if run["arm"] == FP8)) is None


def test_unique_is_judged_by_its_first_steps(result):
    same, close = judged(result, *goals.EXACT)
    assert same.met is False and same.arm == UNIQUE  # 0.1% above from the start, which no order of sums does
    equal = changed(result, UNIQUE, (0.0,) * 3)
    same, close = judged(equal, *goals.EXACT)
    assert same.met and close.met and same.words == "0.00000%: met"
    assert {one.words for one in judged(equal, *goals.EXACT, model="pos2")} == {"not measured in this run"}


def test_arms_on_two_ranks_are_compared_with_none_on_two():
    """Where ranks balance experts for themselves the loss is another one, of which seeds on one rank say nothing."""
    runs = make_result(("top-2",), (NONE, CONTROL, NONE_TWO_RANKS, UNIQUE))["runs"]
    runs = [run | {"final_validation": 2 * run["final_validation"]} if "ranks" in run["arm"] else run for run in runs]
    rows = {row.arm: row for row in analysis.rows(runs)}
    assert rows[UNIQUE].to_none.value == pytest.approx(0.1) and rows[UNIQUE].to_control is None
    assert rows[UNIQUE].bytes == Spread(0.75, 0.75, 0.75) and rows[NONE].bytes is None
    unique = next(run for run in runs if run["arm"] == UNIQUE)
    row = render.csv_row({"runs": runs}, unique)
    assert (row["percent_above_none"], row["percent_above_control"]) == (pytest.approx(0.1), None)
    alone = [run for run in runs if run["arm"] != NONE_TWO_RANKS]
    assert next(row for row in analysis.rows(alone) if row.arm == UNIQUE).to_none is None


def test_the_control_never_counts_as_the_best_setting(result):
    """It sends every row; but a rate of none or control must not be taken even where it is the smallest."""
    runs = [{**run, "final_rate": 0.001} if run["arm"] in (NONE, CONTROL) else run for run in result["runs"]]
    assert quality({"runs": runs})[-1].arm == "lsh q6"


def test_the_best_setting_has_all_seeds_and_is_as_good_with_tokens(result):
    """An arm that is best by means in the evaluation, where fewer seeds say so or tokens say otherwise."""

    def taken(keep=lambda run: True, **figures):
        runs = [{**run, **figures} if run["arm"] == "lsh q4" else run for run in result["runs"]]
        return quality({"runs": [run for run in runs if run["arm"] != "lsh q4" or keep(run)]})[-1].arm

    good = {"final_validation": 2.0, "final_validation_of_tokens": 2.0}
    assert taken(**good) == "lsh q4"
    assert taken(lambda run: run["seed"] < 3, **good) == PAPER
    assert taken(**good | {"final_validation_of_tokens": 4.0}) == PAPER


def test_nothing_is_missed_where_no_seed_can_be_compared(result):
    few = [run for run in result["runs"] if run["arm"] in (NONE, CONTROL, PAPER)]
    runs = [run for run in few if (run["arm"] == PAPER) == (run["seed"] == 2)]
    assert {outcome.words for outcome in quality({"runs": runs})} == {"not measured in this run"}


# --- arms and flags --------------------------------------------------------------------------------------------------


def flags_of(model, arm, seed=1, settings=None):
    settings = settings or Settings(1000, 100, 320, 1024)
    return arms.run_flags(Run(model, arm, seed), settings, Path("run"), Path("data"))


def by_name(arm):
    return next(one for one in all_arms() if one.name == arm)


CARGO_OF = {
    **dict.fromkeys((NONE, *SHORTER.values(), REORDERED, NONE_TWO_RANKS), "tokens"),
    **{UNIQUE: "package", UNIQUE_FP8: "package", CONTROL: "tokens-plus-input", COMPRESSED_CONTROL: "codec-plus-input"},
}


@pytest.mark.parametrize("model", MODELS)
def test_arms_differ_in_cargo_and_codec_alone(model):
    cargo, *base = flags_of(model, by_name(NONE))
    assert cargo == "tokens"
    for arm in all_arms():
        mine, *flags = flags_of(model, arm)
        assert mine == CARGO_OF.get(arm.name, "codec")
        if arm.share < 1 or not arm.is_of_lsh:
            continue
        if arm.ranks > 1:
            assert arm.fits(model) == (model == "top-2")  # nothing is compared with it elsewhere
            assert changed_values(flags, base) == {
                "--micro-batch-size": str(int(value_of(base, "--micro-batch-size")) // arm.ranks),
                "--expert-model-parallel-size": str(arm.ranks),
            }
            continue
        more = ("--overlap-chunks",) if arm.name == REORDERED else ("--lsh-",)
        assert flags[: len(base)] == base and all(flag.startswith(more) for flag in flags[len(base) :] if "--" in flag)


def value_of(flags, name):
    return flags[flags.index(name) + 1]


def changed_values(flags, base):
    """Values of ``flags`` that are others in ``base``, which has the same names."""
    return {base[place - 1]: one for place, (one, other) in enumerate(zip(flags, base, strict=True)) if one != other}


TRANSFERS = ("dispatch-forward", "combine-forward", "dispatch-backward", "combine-backward")


@pytest.mark.parametrize(
    ("arm", "more"),
    [
        (BF16, ["--a2a-codec", "bf16"]),
        (FP8, ["--a2a-codec", "fp8"]),
        (FP8_ALL, ["--a2a-codec", "fp8", "--fp8-transfers", *TRANSFERS]),
    ],
)
def test_rounding_arms_have_no_flag_of_another_codec(arm, more):
    _, *base = flags_of("pos2", by_name(NONE))
    _, *flags = flags_of("pos2", by_name(arm))
    assert flags == [*base[: base.index("--a2a-codec")], *more]


def test_unique_differs_from_none_on_as_many_ranks_in_its_flag_alone():
    """And has none of a codec's, which would make our layers carry something else."""
    _, *base = flags_of("top-2", by_name(NONE_TWO_RANKS))
    _, *flags = flags_of("top-2", by_name(UNIQUE))
    codec = base.index("--a2a-codec")
    assert base[codec:] == ["--a2a-codec", "lsh", "--lsh-evaluation", "centroids", "--lsh-seed", "1"]
    assert flags == [*base[:codec], "--a2a-unique", "rank"]
    assert flags_of("top-2", by_name(UNIQUE_FP8))[1:] == [*flags, "--a2a-codec", "fp8"]
    assert [model for model in MODELS if by_name(UNIQUE).fits(model)] == ["top-2"]


def test_shorter_trainings_have_a_whole_schedule_and_the_same_evaluations():
    whole = [*flags_of("top-2", by_name(NONE)), "--"]
    for share, name in SHORTER.items():
        flags = [*flags_of("top-2", by_name(name)), "--"]
        changed = {}
        for place, (one, other) in enumerate(zip(whole, flags, strict=True)):
            if one != other and "cache" not in one and "/" not in one:
                changed[whole[place - 1]] = (int(one), int(other))
        assert changed.keys() == {"--train-iters", "--eval-interval", "--lr-warmup-iters"}
        assert all(mine == its * share for its, mine in changed.values())
    assert {arm.name for arm in all_arms() if not arm.compresses} == set(UNCOMPRESSED)


def test_about_1024_tokens_reach_every_expert():
    for model, batch in {"top-2": "8", "shared-expert": "16", "pos2": "16"}.items():
        flags = flags_of(model, by_name(NONE))
        assert flags[flags.index("--micro-batch-size") + 1] == flags[flags.index("--global-batch-size") + 1] == batch
        topk = int(flags[flags.index("--moe-router-topk") + 1])
        assert int(batch) * 256 * topk / 4 == 1024


def test_seed_is_that_of_everything():
    one, other = flags_of("top-2", by_name(PAPER)), flags_of("top-2", by_name(PAPER), seed=2)
    differing = {
        one[place - 1] for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b and "run" not in a
    }
    assert differing == {"--seed", "--lsh-seed"}


def test_names_of_runs_are_those_of_folders_and_unique():
    names = [Run(model, arm, 1).name for model in MODELS for arm in all_arms()]
    assert len(set(names)) == len(names) and not any(re.search(r"[^\w.-]", name) for name in names)


def test_arms_say_which_compensation_they_have():
    """The package's default may change; what was trained under a name may not."""
    for arm in all_arms():
        if not arm.is_of_lsh:
            continue
        words = "none" if "no compensation" in arm.name or arm.name == COMPRESSED_CONTROL else "paper"
        words = "lowrank" if "lowrank" in arm.name else words
        assert not arm.compresses or arm.flags[arm.flags.index("--lsh-compensation") + 1] == words


CODEC_AND_CARGO = {"none": "tokens", "lsh": "codec"}


def controls_and_input(kind):
    """What one MoE layer gives for every cargo, by its name, with gradients; and each token times its gate weights."""
    from codec_study.train import CARGOES

    from megatron_scmoe.codec.maker import CargoMaker
    from megatron_scmoe.layers.pipelined import PipelinedMoELayer

    found, package = {}, CargoMaker.cargo
    for codec, named in CODEC_AND_CARGO.items():
        settings = {"a2a_codec": Codec(codec), "lsh_compensation": Compensation.NONE, "lsh_hashes": 2}
        layer = next(one for one in build(kind, 1, **settings).modules() if isinstance(one, PipelinedMoELayer))
        for cargo in (f"package {codec}", named, f"{named}-plus-input"):
            CargoMaker.cargo = CARGOES.get(cargo, package)
            hidden = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            output, _ = layer(hidden)
            output.square().sum().backward()
            found[cargo] = (output.detach(), hidden.grad)
    with torch.no_grad():
        probs, routing_map = layer.route(hidden)
        own = (probs * routing_map).sum(dim=-1).view(6, 4, 1) * hidden
    return found, own


@pytest.mark.parametrize("kind", ["top-2", "shared expert, gated", "dropped"])
def test_controls_add_the_token_times_its_gate_weights(kind):
    found, own = ranks.run(controls_and_input, 1, kind, layout=EP[1])[0]
    for codec, named in CODEC_AND_CARGO.items():
        package, plain, control = (found[name] for name in (f"package {codec}", named, f"{named}-plus-input"))
        assert all(torch.equal(*pair) for pair in zip(package, plain, strict=True))
        torch.testing.assert_close(control[0], plain[0] + own)
        assert own.abs().max() > 0.1 and not torch.allclose(control[1], plain[1])
    assert not torch.allclose(found["tokens"][0], found["codec"][0])


# --- requests --------------------------------------------------------------------------------------------------------

REFUSED = {
    "arm": (["--arms", "none,lsh q7"], "--arms has 'lsh q7', which is unknown; --list-arms prints them"),
    "model": (["--models", "top-3"], "'top-3', which is unknown; give some of top-2"),
    "zero": (["--seeds", "0"], "not a whole number from 1"),
    "word": (["--iterations", "many"], "not a whole number from 1"),
    "abbreviation": (["--iter", "3"], "unrecognized arguments"),
    "shorter": (
        ["--eval-every", "10"],
        "--eval-every 10 is no multiple of 4, of which the arm 'none 0.25x steps' trains a part; use 8",
    ),
    "evaluations": (["--iterations", "150"], "--iterations 150 is no multiple of --eval-every 100"),
    "tokens": (
        ["--tokens-per-expert", "1000"],
        "no multiple of 128, what one sequence gives an expert of top-2",
    ),
    "sequences": (["--eval-sequences", "30"], "--eval-sequences 30 is no multiple of 8, the batch of top-2; use 24"),
    "odd tokens": (
        ["--tokens-per-expert", "384", "--eval-sequences", "3"],
        "no multiple of 256, what a sequence on each rank gives an expert of top-2",
    ),
    "arm of another model": (
        ["--arms", "none,unique 2 ranks", "--models", "pos2"],
        "the arm 'unique 2 ranks' is one of models whose tokens have 2 experts; add --models top-2",
    ),
    "data": (["--data", "/nowhere"], "has no manifest.json; make it with tools/preprocess_data.py"),
    "jobs": (["--jobs", "999999"], "--jobs 999999 needs more than a machine has"),
    "more tokens": (["--tokens-per-expert", "999424"], "--tokens-per-expert 999424 needs more than a machine has"),
    "more sequences": (["--eval-sequences", "999936"], "--eval-sequences 999936 needs more than a machine has"),
    "goals of nothing": (["--write-results", "x.md"], "needs --from"),
    "from and output": (["--from", "x"], "leave --output out"),
}


def check_refusal(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.count("\n") == 1 and said in printed.err and "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(("words_given", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_one_line_and_exit_2(words_given, said, tmp_path, capsys):
    check_refusal(["--output", str(tmp_path / "new"), *words_given], said, capsys)
    assert not (tmp_path / "new").exists()


def test_output_is_needed_and_must_be_a_folder(tmp_path, capsys):
    check_refusal([], "--output is missing", capsys)
    (tmp_path / "file").write_text("")
    check_refusal(["--output", str(tmp_path / "file")], "it is a file; name another folder", capsys)


def test_a_refusal_imports_neither_torch_nor_matplotlib():
    program = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r})\n"
    program += "import ablate_codec\ntry: ablate_codec.main(['--seeds', '0'])\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'matplotlib', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_list_arms(capsys):
    assert tool.main(["--list-arms"]) == 0
    assert capsys.readouterr().out.splitlines() == [arm.name for arm in all_arms()]


# --- many trainings --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    manifest = {
        "totals": {"tokens": 4_000_000},
        "vocabulary": {"size": 1024},
        "outputs": {"text_document.bin": {"sha256": "0" * 64}},
    }
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made


@pytest.fixture
def fake(monkeypatch):
    """Trainings that only note that they ran; which of them fail can be set."""
    fake = type("Fake", (), {"failing": set(), "started": []})()

    def command(run, folder):
        fake.started.append(run.name)
        program = "import os, sys; print('core', *os.sched_getaffinity(0)); print('some words')\n"
        program += f"sys.exit({3 if run.name in fake.failing else 0})"
        return [sys.executable, "-c", program]

    def read_run(run, settings, folder):
        made = make_run(run.model, run.arm, run.seed)
        return {name: value for name, value in made.items() if name not in ("commit", "changed_files", "wall_s")}

    fake.command = command
    monkeypatch.setattr(jobs, "read_run", read_run)
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    return fake


def call(fake, output_folder, data, *more):
    parser = tool.make_parser()
    arguments = ["--output", str(output_folder), "--data", str(data), "--models", "top-2", *more]
    return tool.study(parser, parser.parse_args(arguments), fake.command)


FEW = ("--arms", "none,control,lsh q6", "--seeds", "2")


def test_second_call_trains_only_what_is_missing(fake, tmp_path, data, capsys):
    study = tmp_path / "study"
    assert call(fake, study, data, *FEW) == 0
    # All arms of a seed before the next seed.
    assert fake.started == [f"top-2-{arm}-{seed}" for seed in (1, 2) for arm in ("none", "control", "lsh_q6")]
    first = folder.read(study)
    assert {run["processor"] for run in first["runs"]} == {provenance.processor()} != {""}
    assert len(first["runs"]) == 6 and first["meta"]["seeds"] == 2 and len(first["meta"]["commit"]) >= 7
    fake.started.clear()
    assert call(fake, study, data, *FEW) == 0
    assert fake.started == []
    assert "6 of 6 runs were done before" in capsys.readouterr().out
    assert folder.read(study)["runs"] == first["runs"]
    assert call(fake, study, data, "--arms", "none", "--seeds", "3") == 0
    assert fake.started == ["top-2-none-3"]
    assert len(folder.read(study)["runs"]) == 7


def test_a_run_that_was_killed_begins_anew(fake, tmp_path, data):
    left = tmp_path / "study" / "runs" / "top-2-none-1"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    assert call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "1") == 0
    assert not (left / "half").exists()
    assert sorted(path.name for path in left.iterdir()) == ["log.txt", "result.json"]


def test_every_run_has_one_core(fake, tmp_path, data):
    call(fake, tmp_path / "study", data, *FEW)
    logs = [path.read_text() for path in (tmp_path / "study" / "runs").glob("*/log.txt")]
    assert len(logs) == 6 and all(re.match(r"core \d+\n", log) for log in logs)


def test_a_run_of_two_ranks_has_two_cores_and_waits_for_them(fake, tmp_path, data, monkeypatch):
    together = []
    start = jobs.Jobs._start

    def noted(pool, run, cores):
        start(pool, run, cores)
        together.append(sorted(child.run.name for child in pool._children))

    monkeypatch.setattr(jobs.Jobs, "_start", noted)
    names = f"{NONE},{UNIQUE}"
    assert call(fake, tmp_path / "study", data, "--arms", names, "--seeds", "2", "--jobs", "2") == 0
    assert [unique for unique in together if any("unique" in name for name in unique)] == [
        [f"top-2-unique_2_ranks-{seed}"] for seed in (1, 2)
    ]
    logs = [path.read_text() for path in (tmp_path / "study" / "runs").glob("*unique*/log.txt")]
    cores = min(2, len(os.sched_getaffinity(0)))
    assert len(logs) == 2 and all(len(log.splitlines()[0].split()) == 1 + cores for log in logs)


def test_two_ranks_are_started_by_torchrun_and_share_a_step(tmp_path):
    command = jobs.training_command(Settings(1000, 100, 320, 1024), tmp_path)
    python, _, *alone = command(Run("top-2", by_name(NONE), 1), tmp_path)
    assert (python, alone[0]) == (sys.executable, "codec_study.train")
    words_given = list(command(Run("top-2", by_name(UNIQUE), 1), tmp_path))
    ranks_at = words_given.index("--nproc-per-node")
    assert words_given[1:3] == ["-m", "codec_study.ranks"] and words_given[ranks_at + 1] == "2"
    assert words_given[ranks_at + 2 : ranks_at + 4] == ["-m", "codec_study.train"]
    assert [value_of(words_given, f"--{name}-batch-size") for name in ("micro", "global")] == ["4", "8"]


def test_a_failed_run_is_shown_and_the_others_go_on(fake, tmp_path, data, capsys):
    fake.failing = {"top-2-control-1"}
    assert call(fake, tmp_path / "study", data, *FEW) == 1
    said = capsys.readouterr().out
    assert "top-2-control-1 failed (exit code 3)" in said and "  | some words" in said
    assert "1 of 6 trainings failed: top-2-control-1" in said
    assert len(folder.read(tmp_path / "study")["runs"]) == 5
    fake.failing, fake.started = set(), []
    assert call(fake, tmp_path / "study", data, *FEW) == 0
    assert fake.started == ["top-2-control-1"]


def test_unreadable_records_are_a_failure(fake, tmp_path, data, monkeypatch, capsys):
    def torn(*_):
        raise ValueError("no validation loss")

    monkeypatch.setattr(jobs, "read_run", torn)
    assert call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "1") == 1
    assert "what it recorded cannot be read: ValueError('no validation loss')" in capsys.readouterr().out
    assert not (tmp_path / "study" / "meta.json").exists()


@pytest.mark.parametrize(
    ("words_given", "said"),
    [
        (["--iterations", "2000"], "runs of another --iterations (1000, now 2000)"),
        (["--tokens-per-expert", "512"], "runs of another --tokens-per-expert (1024, now 512)"),
    ],
)
def test_other_settings_are_refused(fake, tmp_path, data, words_given, said, capsys):
    assert call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "1") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(fake, tmp_path / "study", data, *words_given)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and said in printed and printed.count("\n") == 1
    assert len(fake.started) == 1


@pytest.mark.parametrize(
    ("place", "text"),
    [
        *(
            ("runs/top-2-none-1/result.json", text)
            for text in ("{", "[]", '{"model": "top-2", "arm": "none", "seed": 1}')
        ),
        *(("settings.json", text) for text in ("{", "[]")),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_starts(fake, tmp_path, data, place, text, capsys):
    assert call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "1") == 0
    (tmp_path / "study" / place).write_text(text)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "2")
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and place in printed and "restore that file" in printed and printed.count("\n") == 1
    assert len(fake.started) == 1 and (tmp_path / "study" / place).read_text() == text


def test_other_data_are_refused(fake, tmp_path, data, capsys):
    assert call(fake, tmp_path / "study", data, "--arms", "none", "--seeds", "1") == 0
    text = (data / "manifest.json").read_text()
    (data / "manifest.json").write_text(text.replace("4000000", "5000000"))
    with pytest.raises(SystemExit):
        call(fake, tmp_path / "study", data)
    assert "runs of another --data" in capsys.readouterr().err


def test_ctrl_c_ends_the_children(tmp_path, monkeypatch):
    class Interrupted(Exception):
        """Stands for KeyboardInterrupt, which pytest takes for its own."""

    children = []

    def command(run, _folder):
        children.append(run)
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    started = []
    real = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(real(*args, **kwargs))
        return started[-1]

    def interrupt(_seconds):
        raise Interrupted

    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    monkeypatch.setattr(jobs.time, "sleep", interrupt)
    pool = jobs.Jobs(tmp_path, Settings(10, 10, 8, 1024), command, origin={}, say=lambda _: None)
    with pytest.raises(Interrupted):
        pool.train([Run("top-2", by_name(NONE), seed) for seed in SEEDS], 2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_progress_says_how_long_it_takes(tmp_path, monkeypatch):
    said = []
    pool = jobs.Jobs(tmp_path, Settings(100, 100, 16, 1024), lambda *_: [], origin={}, say=said.append)
    now = pool._began_s + 60
    monkeypatch.setattr(jobs.time, "monotonic", lambda: now)
    child = jobs._Child(Run("top-2", by_name(NONE), 1), tmp_path, 0, None, 0.0)
    (tmp_path / "log.txt").write_text(" iteration        5/     100 | x\n iteration       50/     100 | x\n")
    pool._children.append(child)
    # Half of a run of batch 8 took a minute: its other half, and all of one of batch 16, take five.
    pool._say_progress(0, 2, [Run("pos2", by_name(NONE), 1)])
    assert said == ["0 of 2 runs done, 1 running (top-2-none-1 at step 50), about 0:05:00 left"]


# --- what a run records ----------------------------------------------------------------------------------------------


def test_a_run_is_read_from_its_scalars_and_its_report(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "tensorboard"))
    for step in range(1, 21):
        writer.add_scalar("lm loss", 5.0 - step / 10, step)
    for step, loss in ((10, 4.5), (20, 3.5), (20, 3.75)):  # Megatron evaluates twice at the end
        writer.add_scalar("lm loss validation", loss, step)
    writer.add_scalar(record.TOKENS_LOSS, 3.875, 20)
    for step, seconds in ((10, 0.5), (20, 0.25)):
        writer.add_scalar("iteration-time", seconds, step)
    writer.close()
    (tmp_path / "report").mkdir()
    rows = [
        {
            "iteration": step,
            "groups": [
                {"sent_rate": 0.1, "residual": 0.2, "sent_bytes": 100},
                {"sent_rate": 0.3, "residual": step / 10, "sent_bytes": 10 * step},
            ],
        }
        for step in range(2, 21)
    ]
    (tmp_path / "report" / "rank00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(20, 10, 8, 1024)
    found = record.read_run(Run("top-2", by_name(PAPER), 1), settings, tmp_path)
    assert found["validation"] == [(10, 4.5), (20, 3.625)] and found["final_validation"] == 3.625
    assert found["final_validation_of_tokens"] == 3.875
    assert [step for step, _ in found["train"]] == [10, 20]
    assert found["train"][0][1] == pytest.approx(4.45)  # the mean of ten steps
    assert found["final_rate"] == pytest.approx(0.2)
    assert found["final_residual"] == pytest.approx((0.2 + 1.95) / 2)  # of steps 19 and 20, a tenth
    assert found["final_bytes"] == pytest.approx(100 + 195)
    assert found["seconds_per_step"] == 0.375 and found["tokens_per_step"] == 2048
    half = record.read_run(Run("top-2", by_name(SHORTER[0.5]), 1), Settings(40, 20, 8, 1024), tmp_path)
    assert half["validation"] == found["validation"] and half["final_rate"] == found["final_rate"]
    assert half["final_validation_of_tokens"] == 3.625  # it sends tokens anyway
    with pytest.raises(ValueError, match="no validation loss at step 30"):
        record.read_run(Run("top-2", by_name(PAPER), 1), Settings(30, 10, 8, 1024), tmp_path)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_tables_of_the_report_equal_the_file(result, page):
    tables = Page(page).tables
    runs = [cells for cells in tables["runs"] if cells]
    assert len(runs) == len(result["runs"])
    for cells, run in zip(runs, result["runs"], strict=True):
        assert cells[:3] == [run["model"], run["arm"], str(run["seed"])]
        figures = [run[name] for name in ("final_validation", "final_rate", "final_residual", "seconds_per_step")]
        assert [float(cell) for cell in cells[3:]] == pytest.approx(figures, abs=5e-4)
    shown = {(cells[0], cells[1]): cells for cells in tables["arms"] if cells}
    for model in ("top-2", "pos2"):
        for arm in all_arms():
            if not arm.fits(model):
                assert (model, arm.name) not in shown
                continue
            losses, none, control = (
                [run["final_validation"] for run in result["runs"] if (run["model"], run["arm"]) == (model, name)]
                for name in (arm.name, NONE if arm.ranks == 1 else NONE_TWO_RANKS, CONTROL)
            )
            cells = shown[model, arm.name]
            assert numbers(cells[3]) == pytest.approx([sorted(losses)[1], min(losses), max(losses)], abs=1e-4)
            assert cells[7] == {UNIQUE: "0.750", UNIQUE_FP8: "0.750", NONE_TWO_RANKS: "1.000"}.get(arm.name, "-")
            pairs = [(cells[4], none), (cells[5], control)]
            if arm.ranks > 1:
                assert pairs.pop()[0] == "-"
            for cell, base in pairs:
                paired = sorted(100 * (a / b - 1) for a, b in zip(losses, base, strict=True))
                assert float(re.match(r"[+-][\d.]+", cell)[0]) == pytest.approx(paired[1], abs=0.006)


def test_another_file_gives_another_table(result):
    """Negative control of the test above."""
    few = make_result(("top-2",), (NONE, CONTROL, PAPER))
    before = Page(render.html(few)).tables["arms"]
    after = Page(render.html(changed(few, PAPER, (0.5, 0.6, 0.7)))).tables["arms"]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, True, True, False]


def test_report_loads_nothing_and_has_no_id_twice(page):
    parsed = Page(page)
    assert all(reference.startswith("#") for reference in parsed.references)
    assert "http" not in page and "@import" not in page and "<script" not in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(names)) == len(names)
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {f"#{name}" for name in names}


def test_report_says_what_it_is(result, page):
    parsed = Page(page)
    assert parsed.drawings == 5
    for said in (
        "0123abc, with 1 changed files",
        "A &lt;CPU&gt; &amp; more",
        "Why there is a control",
        "the claim holds",
    ):
        assert said in page
    assert "What it does not prove" in page and "they do not say what compression saves" in page
    drawn = "".join(parsed.words)
    for said in (
        "million tokens",
        "validation loss above none at the end",
        "rows sent over rows routed",
        "residual of a token",
    ):
        assert said in drawn
    few = make_result(("pos2",), (NONE, PAPER))
    assert render.html(few) == render.html(few)


def test_a_single_run_has_a_report():
    few = make_result(("top-2",), (NONE,))
    few["runs"] = few["runs"][:1]
    page = render.html(few)
    assert "not enough was trained to say" in page
    assert [cells[3] for cells in Page(page).tables["arms"] if cells] == ["3.0000"]


@pytest.mark.parametrize("width", [60, 84, 90, 100, 122, 140, 163, 200])
def test_table_fits_the_terminal(result, width):
    console = Console(file=io.StringIO(), width=width)
    render.print_table(result, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for row in analysis.rows(result["runs"]):
        for loss in (row.loss.value, row.loss.low, row.loss.high):
            assert words.WRITE["loss"](loss) in text
        assert words.WRITE["percent"](row.to_none.value) in text
    assert "top-2: the claim holds here" in text


def test_csv_has_a_row_for_each_run(result, tmp_path):
    few = make_result(("top-2",), (NONE, CONTROL, PAPER))
    render.write_results(tmp_path, few)
    with (tmp_path / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert float(rows[-1]["percent_above_none"]) == pytest.approx(-0.8) and rows[0]["percent_above_none"] == "0.0"
    assert rows[0]["tokens"] == "2048000" and rows[-1]["arm"] == PAPER
    assert float(rows[-1]["final_validation_of_tokens"]) == few["runs"][-1]["final_validation_of_tokens"]
    assert json.loads((tmp_path / "meta.json").read_text()) == few["meta"]
    assert render.csv_row(make_result(("top-2",), (PAPER,)), few["runs"][-1])["percent_above_control"] is None


# --- wall time -------------------------------------------------------------------------------------------------------

TIMES = wall_time.StepTimes(
    0.42, "128 Mbit/s", {"top-2": 1.0, "top-2 lsh off": 0.5}, {"top-2": 1.0, "top-2 lsh off": 0.2}
)


@pytest.mark.parametrize(("arm", "rate", "step"), [(NONE, 1.0, 1.0), (PAPER, 0.2, 0.5), (PAPER, 0.6, 0.75)])
def test_steps_between_two_timed_rates_lie_on_a_line(arm, rate, step):
    assert TIMES.step({"model": "top-2", "arm": arm, "rate": [[10, rate - 0.1], [20, rate + 0.1]]}) == pytest.approx(
        step
    )
    assert TIMES.step({"model": "shared-expert", "arm": arm, "rate": [[10, rate - 0.1], [20, rate + 0.1]]}) is None


def test_loss_after_the_same_time_by_hand():
    def run(arm, rate, *validation):
        return {
            **{"model": "top-2", "arm": arm, "seed": 1, "rate": [[10, rate]]},
            **{"validation": [list(one) for one in validation], "final_validation": validation[-1][1]},
        }

    none = run(NONE, 1.0, (100, 4.0), (200, 3.0))
    shorter = [
        run(SHORTER[share], 1.0, (100 * share, 4.0), (200 * share, loss)) for share, loss in ((0.5, 3.6), (0.75, 3.2))
    ]
    mine = run(PAPER, 0.5, (100, 4.1), (200, 3.4))

    def above(*runs):
        return wall_time.percent_above_none(runs, TIMES, "top-2", PAPER)

    # 200 steps of 0.6875 of the time: in it none makes 137.5 of its own, and ends between 3.6 and 3.2.
    loss = 3.6 * 1.375 ** (math.log(3.2 / 3.6) / math.log(1.5))
    assert 3.2 < loss < 3.3 and above(none, *shorter, mine).value == pytest.approx(100 * (3.4 / loss - 1))
    assert list(wall_time.curve([none, mine], TIMES, "top-2", PAPER)) == pytest.approx([68.75, 137.5])
    # In the middle of the longer training it was 3.6: that is no end of a training.
    assert above(none, mine) is None
    assert above(none, shorter[1], mine) is None  # none was not trained for as few steps
    assert above(none, *shorter, run(PAPER, 1.1, (200, 3.3))) is None  # the arm is the slower one
    with_tokens = wall_time.percent_above_none
    runs = [none, *shorter, mine | {"final_validation_of_tokens": 3.7}]
    assert with_tokens(runs, TIMES, "top-2", PAPER, analysis.TOKENS_LOSS).value == pytest.approx(100 * (3.7 / loss - 1))
    assert with_tokens([none, *shorter, mine], TIMES, "top-2", PAPER, analysis.TOKENS_LOSS) is None
    other_seed = [{**one, "seed": 2} for one in (none, *shorter)]
    assert above(*other_seed, mine) is None


def ablation_of(folder, share=0.42):
    point = {
        "step_share": share,
        "rate": "128072kbit",
        "arms": [
            {"arm": {"name": name}, "plans": {}, "timeline": {}, "sent_rate": rate, "seconds": {"training": seconds}}
            for name, rate, seconds in (
                ("top-2", 1.0, [1.0, 2.0, 4.0]),
                ("top-2 lsh off", 0.2, [0.6, 1.4, 2.4]),
            )
        ],
    }
    folder.mkdir()
    others = [{**point, "step_share": 0.7, "arms": []}, {**point, "step_share": None}]
    (folder / "result.json").write_text(json.dumps({"format": FORMAT, "points": [*others, point]}))
    return folder


def test_the_link_nearest_to_the_wanted_share_is_taken(tmp_path):
    times = wall_time.read(ablation_of(tmp_path / "ablation"))
    assert times.step_share == 0.42 and times.steps == {"top-2": 1.0, "top-2 lsh off": 0.6}


@pytest.mark.full
def test_wall_time_is_in_report_and_document(result, tmp_path, capsys):
    keep(result, tmp_path)
    document = tmp_path / "results.md"
    document.write_text(f"{goals.BEGIN}\n{goals.END}\n")
    request = ["--from", str(tmp_path), "--write-results", str(document)]
    assert tool.main(request) == 0
    assert "wall time" not in document.read_text() + (tmp_path / "report.html").read_text()
    assert tool.main([*request, "--step-times", str(ablation_of(tmp_path / "ablation"))]) == 0
    page, printed = (tmp_path / "report.html").read_text(), " ".join(capsys.readouterr().out.split())
    for said in (
        "top-2, final loss, evaluated as trained, against that of none",
        "top-2, final loss, evaluated with tokens (the seeds that were), against that of none",
        *("negative where the arm is better: lsh q2 -", "; lsh q6 -"),
    ):
        assert said in document.read_text() and said in printed and said in page
    assert "Validation loss against wall time" in page
    assert "step_times" not in (tmp_path / "meta.json").read_text()


def test_step_times_are_refused_in_one_line(result, tmp_path, capsys):
    keep(result, tmp_path)
    check_refusal(["--output", "x", "--step-times", "y"], "--step-times needs --from DIR", capsys)
    check_refusal(["--from", str(tmp_path), "--step-times", str(tmp_path / "none")], "cannot be read", capsys)
    (tmp_path / "result.json").write_text(json.dumps({"format": FORMAT, "points": []}))
    check_refusal(["--from", str(tmp_path), "--step-times", str(tmp_path)], "no link whose share", capsys)
    for points in ([1], [{"step_share": "x"}], [{"step_share": 0.4, "arms": [{"arm": []}]}]):
        (tmp_path / "result.json").write_text(json.dumps({"format": FORMAT, "points": points}))
        check_refusal(["--from", str(tmp_path), "--step-times", str(tmp_path)], "not as this tool writes it", capsys)


@pytest.mark.parametrize("name", tool.OF_TRAININGS)
def test_what_is_shown_cannot_be_chosen(name, tmp_path, capsys):
    flag = f"--{name.replace('_', '-')}"
    check_refusal(["--from", str(tmp_path), flag, "77"], f"shows all that there is; leave {flag} out", capsys)


def test_a_folder_that_is_no_study_is_refused(result, tmp_path, capsys):
    fix = "name a folder of this tool's"
    check_refusal(["--from", str(tmp_path)], fix, capsys)
    keep({**result, "runs": []}, tmp_path)
    check_refusal(["--from", str(tmp_path)], f"there is no runs/*/result.json; {fix}", capsys)
    for text in ("{", "{}", "[]"):
        (tmp_path / "meta.json").write_text(text)
        check_refusal(["--from", str(tmp_path)], fix, capsys)
    keep(result, tmp_path)
    check_refusal(["--from", str(tmp_path), "--write-results", str(tmp_path / "none.md")], "cannot be read", capsys)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("changes", [{"validation": None}, {"final_rate": "x"}, {"seed": [1]}, {"rate": [[1]]}])
def test_a_run_that_cannot_be_shown_is_refused_and_nothing_is_written(changes, tmp_path, capsys):
    few = make_result(("top-2",), (NONE, PAPER))
    keep(few, tmp_path)
    path = next((tmp_path / "runs").glob("*/result.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (tmp_path / "results.md").write_text(text := f"{goals.BEGIN} old {goals.END}")
    words = ["--from", str(tmp_path), "--write-results", str(tmp_path / "results.md")]
    check_refusal(words, "name a folder of this tool's", capsys)
    assert (tmp_path / "results.md").read_text() == text and not (tmp_path / "report.html").exists()


# --- Markdown --------------------------------------------------------------------------------------------------------


def test_earlier_run_is_written_into_a_document(result, tmp_path, capsys):
    few = make_result(("top-2",), (NONE, CONTROL, PAPER, UNCOMPENSATED))
    keep(few, tmp_path)
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n\n{goals.BEGIN}\nold\n{goals.END}\n\nCauses, by hand.\n")
    for _ in range(2):
        assert tool.main(["--from", str(tmp_path), "--write-results", str(document)]) == 0
        text = document.read_text()
        assert text.startswith(f"# Results\n\n{goals.BEGIN}\n\nWritten by") and "\nold\n" not in text
        assert text.endswith(f"{goals.END}\n\nCauses, by hand.\n")
    assert re.search(r"\| top-2 \| lsh q6 \| -0\.80%[^|]*: met \| model quality is maintained \|", text)
    assert "| top-2 | lsh q6 no compensation | 3 | 3.0180 [2.8168, 3.1186] | +0.60%" in text
    assert "The goals are for at least" not in text
    assert (tmp_path / "report.html").read_text() == render.html(few)
    assert "lsh q6" in capsys.readouterr().out


def test_a_short_run_says_that_it_is_one(result):
    short = {**result, "meta": {**result["meta"], "seeds": 1, "iterations": 30}}
    said = "The goals are for at least 3 seeds and 1000 iterations; the least of an arm here: seeds 1, iterations 30."
    assert said in render.markdown(short) and said not in render.markdown(result)
    assert said in render.html({**short, "runs": short["runs"][:3]})


def test_processors_of_the_runs_are_named(result):
    runs = [run | {"processor": "X, model 7"} for run in result["runs"][:2]] + result["runs"][2:3]
    said = "X, model 7 (2 runs); not noted (1 runs)"
    assert words.processors(runs) == said and f"processors: {said}" in render.markdown({**result, "runs": runs})


def test_runs_of_another_commit_are_named(result):
    mixed = {**result["meta"], "commits_of_runs": ["0123abc", "fedcba9"]}
    assert words.machine(mixed)["commit"] == "0123abc, with 1 changed files; the runs are of 0123abc, fedcba9"


@pytest.mark.parametrize("text", ["", f"{goals.END} {goals.BEGIN}"])
def test_document_without_its_marks_is_refused_and_kept(result, text, tmp_path, capsys):
    keep(result, tmp_path)
    (tmp_path / "results.md").write_text(text)
    arguments = ["--from", str(tmp_path), "--write-results", str(tmp_path / "results.md")]
    check_refusal(arguments, "it lacks the two marks", capsys)
    assert (tmp_path / "results.md").read_text() == text


def test_the_study_of_this_repository_can_be_shown():
    kept = folder.read(ROOT / "docs" / "results" / "codec-study")
    assert kept["meta"]["seeds"] == min(len(row.seeds) for row in analysis.rows(kept["runs"]))


def test_the_document_of_this_repository_has_the_marks(result):
    text = (ROOT / "docs" / "results" / "codec.md").read_text()
    assert text.count(goals.BEGIN) == text.count(goals.END) == 1


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "data"
    modules = sorted(Path(sysconfig.get_paths()["stdlib"], "asyncio").glob("*.py"))
    made = [sys.executable, "tools/preprocess_data.py", "--input", *modules, "--output", path]
    subprocess.run([*made, "--vocab-size", "512", "--document-kib", "4"], cwd=ROOT, check=True, capture_output=True)
    return path


def studied(arms: str, data: Path, output: Path) -> dict[str, Any]:
    """Four steps of each arm, by the command line."""
    command = [sys.executable, TOOL, "--output", output, "--data", data, "--models", "top-2", "--arms", arms]
    command += ["--seeds", "1", "--iterations", "4", "--eval-every", "4", "--eval-sequences", "8"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert folder.settings_difference(output, {"iterations": 4}) == ""
    made = folder.read(output)
    assert (output / "report.html").read_text() == render.html({**made, "encoding": None})
    return made


def test_tiny_study(tiny_data, tmp_path):
    """The codec sends less, and not the same."""
    (lsh,) = studied("lsh q2", tiny_data, tmp_path / "study")["runs"]
    assert 0 < lsh["final_rate"] < 1 and lsh["final_residual"] > 0


@pytest.mark.full
def test_tiny_study_of_three_arms(tiny_data, tmp_path):
    """The control and the codec change the loss, and the codec sends less."""
    made = studied("none,control,lsh q2", tiny_data, tmp_path / "study")
    none, control, lsh = made["runs"]
    assert [run["arm"] for run in made["runs"]] == [NONE, CONTROL, "lsh q2"]
    # The same parameters to begin with: what travels makes the difference.
    assert len({run["final_validation"] for run in made["runs"]}) == 3
    assert none["final_rate"] == control["final_rate"] == 1.0 and 0 < lsh["final_rate"] < 1
    assert none["final_residual"] == 0.0 < lsh["final_residual"]


@pytest.mark.full
def test_evaluation_with_tokens_is_that_of_the_same_model_without_a_codec(tiny_data, tmp_path):
    """Nothing is learned, so that arms have the same parameters and differ in what travels alone."""
    settings = Settings(2, 2, 8, 1024)
    train = jobs.training_command(settings, tiny_data)
    frozen = ("--lr", "0", "--min-lr", "0", "--init-method-std", "0.2")  # large, so that experts change the loss
    runs = [Run("top-2", by_name(name), 1) for name in (NONE, CONTROL, "lsh q2", COMPRESSED_CONTROL)]
    made = jobs.Jobs(tmp_path, settings, lambda *run: [*train(*run), *frozen], origin={}, say=print)
    assert made.train(runs, 2) == []
    none, control, lsh, compressed_control = (made.result(run) for run in runs)
    assert lsh["final_validation_of_tokens"] == pytest.approx(none["final_validation"], abs=2e-6)
    assert compressed_control["final_validation_of_tokens"] == pytest.approx(control["final_validation"], abs=2e-6)
    for run in (lsh, compressed_control):
        assert abs(run["final_validation_of_tokens"] - run["final_validation"]) > 1e-4


COST = {
    **{"rows": 8192, "hidden": 1024, "rate": 0.2},
    **{"time": "2026-01-02T03:04:05+00:00", "commit": "0123abc", "hardware": {"device": "a CPU"}},
    "seconds": {
        **{"mlp": [1.0, 2.0, 4.0], "encode": [0.01, 0.02, 0.03], "restore": [0.02, 0.02, 0.01]},
        **{"refine": [0.01, 0.03, 0.02], "compensate": [0.03, 0.06, 0.13]},
        "fp8": [0.03, 0.05, 0.04],
    },
}


def test_cost_of_encoding(monkeypatch):
    for name, value in {"ROWS": 512, "HIDDEN": 64, "CENTRES": 10}.items():
        monkeypatch.setattr(encoding, name, value)
    measured = encoding.cost_of_encoding(repetitions=2)
    assert measured["seconds"].keys() == {*COST["seconds"], "fp8"} and COST.keys() <= measured.keys()
    assert all(len(values) == 2 and min(values) > 0 for values in measured["seconds"].values())
    assert 8 * 10 / 512 <= measured["rate"] < 0.5
    assert cost.described(COST) == (
        "8192 x 1024 rows in fp32, one thread, 20.0% of them sent: encode 20 ms, restore 20 ms, with the paper's "
        "compensation 60 ms, expert MLP on all of them 2000 ms: 2.0% (1.0% to 3.0%) of it, 4.0% (4.0% to 4.0%) with "
        "compensation, and 1.0% (0.5% to 1.5%) more for --lsh-refinement lloyd; one transfer in fp8, to codes and "
        "back, of all of them 40 ms: 2.5% (1.0% to 3.0%); without gradients. Measured "
        "2026-01-02T03:04:05+00:00 with 0123abc on a CPU"
    )
    mlp = COST["seconds"]["mlp"]
    with_fp8 = {**COST, "seconds": {**COST["seconds"], "fp8": [0.02 * seconds for seconds in mlp]}}
    assert "lloyd; one transfer in fp8, to codes and back, of all of them " in cost.described(with_fp8)
    assert " ms: 2.0% (2.0% to 2.0%); without gradients" in cost.described(with_fp8)


@pytest.fixture
def study(result, tmp_path, monkeypatch):
    """A folder of an earlier call, in which what encoding costs can be kept; measuring it takes no time."""
    monkeypatch.setattr(encoding, "cost_of_encoding", lambda repetitions: COST)
    made = tmp_path / "study"
    made.mkdir()
    keep(result, made)
    (tmp_path / "results.md").write_text(f"{goals.BEGIN}\n{goals.END}\n")
    return made


def shown(study):
    """What the document and the report say of a folder."""
    document = study.parent / "results.md"
    assert tool.main(["--from", str(study), "--write-results", str(document)]) == 0
    return document.read_text(), (study / "report.html").read_text()


@pytest.mark.full
def test_cost_of_encoding_is_kept_and_judged(study, tmp_path, capsys):
    assert tool.main(["--encoding-cost"]) == 0
    assert tool.main(["--encoding-cost", "--output", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"{cost.described(COST)}\n" * 2
    assert cost.read(tmp_path / "new") == COST and cost.read(study) is None
    for compensate, said in (
        ([0.01, 0.03, 0.03], "2.50% [1.50%, 2.00%]: met |"),
        (COST["seconds"]["compensate"], "4.00% [4.00%, 4.00%]: **missed by 1.00%** |"),
        ([0.01, 0.04, 0.13], "3.00% [2.00%, 4.00%]: met, but repetitions disagree |"),
    ):
        kept.write(study / cost.FILE, {**COST, "seconds": {**COST["seconds"], "compensate": compensate}})
        document, report = shown(study)
        (line,) = (line for line in document.splitlines() if line.startswith("| encode, residual"))
        assert re.search(r"\| encode and decode of fp8, .* \| 2\.50% \[1\.00%, 3\.00%\]: met \|", document)
        assert line.split(" | ")[-2].split(": ")[-1] in said and said.split(" [")[0] in line
        assert "What encoding costs: 8192 x 1024" in document and "What encoding costs: 8192 x 1024" in report
    older = {name: times for name, times in COST["seconds"].items() if name not in cost.FP8}
    kept.write(study / cost.FILE, {**COST, "seconds": older})
    document, _ = shown(study)  # measured before there was fp8
    assert re.search(r"\| encode and decode of fp8, [^|]* \| - \| +\| not measured in this run \|", document)
    assert "one transfer in fp8" not in document
    (study / "encoding.json").unlink()
    document, report = shown(study)
    assert "| not measured in this run | not given |" in document and "What encoding costs" not in document + report


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_cost_that_cannot_be_read_is_refused_before_anything_starts(study, data, text, capsys):
    (study / "encoding.json").write_text(text)
    for words_given in (["--from", str(study)], ["--output", str(study), "--data", str(data)]):
        check_refusal(words_given, "remove it, or measure anew with --encoding-cost", capsys)
    assert {path.name for path in study.iterdir()} == {"meta.json", "runs", "encoding.json"}


@pytest.mark.parametrize("words_given", [["--from", "x"], ["--write-results", "x.md"], ["--step-times", "x"]])
def test_encoding_is_measured_alone(words_given, capsys):
    check_refusal(["--encoding-cost", *words_given], f"and {words_given[0]} shows; leave one of them out", capsys)


def test_an_output_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for more in ([], ["--encoding-cost"]):
        check_refusal([*more, "--output", str(tmp_path / "file")], "it is a file; name another folder", capsys)
        check_refusal([*more, "--output", str(tmp_path / "file" / "x")], "is no folder; name another folder", capsys)
        check_refusal([*more, "--output", "/proc/x"], "/proc is not writable; name another folder", capsys)


def test_rows_of_the_csv_have_the_steps_that_were_trained(result):
    for run in result["runs"]:
        share = next((share for share, name in SHORTER.items() if name == run["arm"]), 1.0)
        row = render.csv_row(result, run)
        assert (row["steps"], row["tokens"]) == (1000 * share, 1000 * share * 2048)
