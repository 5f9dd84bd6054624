"""The planner's judge of the ablation: a result of the tool itself has what it takes to predict every arm again."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import ablate_overlap as tool
from ablation.analysis import KINDS
from ablation.arms import STOCK, all_arms
from ablation.ops import SpanOps
from planning import slow_links
from planning.judging import Goal

GOAL = Goal(name="", each=0.10)
ARMS = ("top-2", "top-2 4 chunks", "shared-expert", "pos2 adaptive chunks", "dgmoe off", "pos2 adaptive (real routing)")
TINY = ["--hidden", "64", "--tokens", "64", "--layers", "2", "--experts", "4", "--repetitions", "2"]


def measure(folder: Path) -> int:
    """What each rank of torchrun does."""
    import torch.distributed as dist
    from ablation.rank import run_rank

    args = tool.make_parser().parse_args(["--output", str(folder), "--arms", ",".join(ARMS), *TINY])
    arms = [arm for arm in all_arms() if arm.name in ARMS]
    dist.init_process_group = lambda *_args, **_kwargs: None  # the pool has made it
    return run_rank(args, arms)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation") / "recorded"
    assert ranks.run(measure, 2, folder) == [0, 0]
    return folder


def arms_of(folder: Path) -> list[dict]:
    (point,) = json.loads((folder / "result.json").read_text())["points"]
    return point["arms"]


def rewritten(measured: Path, folder: Path, change) -> Path:
    """A copy of the result with other arms."""
    result = json.loads((measured / "result.json").read_text())
    for arm in result["points"][0]["arms"]:
        change(arm)
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def as_predicted(arm: dict) -> None:
    """Steps that take what is predicted: this machine is busy, and two tiny steps say nothing."""
    arm["seconds"] = {kind: [slow_links.predicted(arm, kind)] * 3 for kind in KINDS}


def test_every_arm_is_judged_by_costs_at_its_own_chunks(measured):
    figures = slow_links.judged(measured)
    assert {arm["arm"]["name"] for arm in arms_of(measured)} == set(ARMS)
    assert len(figures) == len(ARMS) * len(KINDS)
    assert all(one.predicted > 0 and one.measured > 0 for one in figures)
    for arm in arms_of(measured):
        (told,) = arm["costs"].values()
        its = SpanOps.read(told).costs
        counts = {"top-2 4 chunks": {4}, "pos2 adaptive chunks": {1, 2, 4}}.get(arm["arm"]["name"], {1})
        assert set(its["training"]) == set(its["forward"]) == counts
        stock = arm["arm"]["model"] in STOCK
        assert (arm["costs_of"] == arm["arm"]["model"]) is not stock
        for kind in () if stock else KINDS:
            assert slow_links.predicted(arm, kind) == pytest.approx(arm["predicted_s"][kind], rel=1e-9)
    four, whole = (next(arm for arm in arms_of(measured) if arm["arm"]["name"] == name) for name in ARMS[1::-1])
    assert four["costs_of"] == whole["costs_of"] and four["costs"] != whole["costs"]
    assert not any("not judged" in line for line in slow_links.causes(measured))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_plan_is_priced_by_costs_at_its_number_of_chunks(measured, chunks):
    arm = next(arm for arm in arms_of(measured) if arm["arm"]["name"] == "pos2 adaptive chunks")
    (told,) = arm["costs"].values()
    for number, its in told["training"].items():  # so that only one number gives what is right
        for call in its["forward"]["calls"] + its["backward"]["calls"]:
            call["experts"] = 10.0 ** int(number)
    for plan in arm["plans"].values():
        plan |= {"training": [[1] * chunks], "launches": dict.fromkeys(KINDS, "before")}
    assert slow_links.predicted(arm, "training") == pytest.approx(2 * chunks * 10.0**chunks, rel=0.1)


def test_megatrons_own_layer_is_the_sequence_of_its_ops(measured):
    arm = next(arm for arm in arms_of(measured) if arm["arm"]["name"] == "top-2")
    (told,) = arm["costs"].values()
    forward = told["forward"]["1"]
    summed = sum(forward["ops"]) + sum(
        seconds for call in forward["calls"] for op, seconds in call.items() if not op.startswith("enqueue")
    )
    assert slow_links.predicted(arm, "forward") == pytest.approx(arm["rest_s"]["forward"] + summed)


def test_a_cost_twice_as_high_is_judged_a_miss(measured, tmp_path):
    """Negative control: with every step as predicted the goal is met; then one arm's experts cost twice as much."""

    def doubled(arm: dict) -> None:
        as_predicted(arm)
        if arm["arm"]["name"] == "dgmoe off":
            for its in (passes for span in arm["costs"].values() for passes in span["training"].values()):
                for call in its["forward"]["calls"] + its["backward"]["calls"]:
                    call["experts"] *= 2
                    call["dispatch"] *= 2

    right = slow_links.judged(rewritten(measured, tmp_path / "right", as_predicted))
    assert GOAL.met(right) and max(abs(one.error) for one in right) < 1e-9
    wrong = slow_links.judged(rewritten(measured, tmp_path / "wrong", doubled))
    assert not GOAL.met(wrong)
    assert [one.what.split(",")[:2] for one in wrong if abs(one.error) > GOAL.each] == [["dgmoe off", " training"]]


def test_steps_whose_costs_are_not_kept_are_counted(measured, tmp_path):
    def without_four(arm: dict) -> None:
        if arm["arm"]["name"] == "top-2 4 chunks":
            for span in arm["costs"].values():
                span["training"] = {}

    fewer = rewritten(measured, tmp_path / "fewer", without_four)
    assert len(slow_links.judged(fewer)) == len(ARMS) * len(KINDS) - 1
    assert any("1 steps are not judged" in line for line in slow_links.causes(fewer))


def test_a_result_of_another_format_is_refused(measured, tmp_path):
    result = json.loads((measured / "result.json").read_text())
    older = copy.deepcopy(result)
    del older["format"]
    (tmp_path / "result.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="format 1, and this version reads format 2: measure anew"):
        slow_links.judged(tmp_path)
