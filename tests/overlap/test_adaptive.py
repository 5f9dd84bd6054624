"""The adaptive overlap: the tuner by itself, with simulated passes for a clock, and the entry script on ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import models
import pytest
import ranks
import torch
import training
from models import Case
from test_arguments import DGMOE
from test_costs import simulated
from test_overlap import OPS, order_of
from training import SCMOE, with_flags

from megatron_scmoe.config import ARCHITECTURE_FIELDS, CODEC_FIELDS, Overlap, ScMoEConfig, Shortcut
from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.adaptive import MEASURE_STEPS, WARM_UP_STEPS, Phase, Tuner, chunk_counts
from megatron_scmoe.overlap.costs import GroupPass, mean_costs
from megatron_scmoe.overlap.kept import Plans, described, from_saved_form, saved_form
from megatron_scmoe.overlap.plan import even_plan, forward_order, sequential_plan
from megatron_scmoe.overlap.solver import (
    CallCosts,
    PassCosts,
    SpanCosts,
    predicted_hidden_share,
    predicted_s,
)
from megatron_scmoe.overlap.trial import MOST_TURNS, TURNS
from megatron_scmoe.report.figures import Summary

EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}

# ---- the tuner, with a world of known costs ---------------------------------------------------------------------

SHAPE = SpanShape(num_ops=5, calls=(RoutedCall(tap=1, landing=4),))
FIRST = {0: Plans(Plan(((2,),)), Plan(((2,),)))}

type World = Mapping[int, SpanCosts]
"""What one span costs at each number of chunks."""


def costs(dense, *, dispatch: float, combine: float, backward: float = 2, chunks: int = 1) -> SpanCosts:
    """Equal ops, of which backward takes ``backward`` times as long; each collective costs 1 s more, however small."""
    ops = (*dense, 1)
    call = CallCosts(
        route=1,
        encode=1 / chunks,
        dispatch=dispatch / chunks + 1,
        experts=8 / chunks,
        combine=combine / chunks + 1,
        decode=1 / chunks,
    )
    scaled = CallCosts(**{op: backward * seconds for op, seconds in dataclasses.asdict(call).items()})
    return SpanCosts(
        forward=PassCosts(ops=ops, calls=(call,)),
        backward=PassCosts(ops=tuple(backward * one for one in ops), calls=(scaled,)),
    )


def world(*dense: float, **seconds: float) -> World:
    return {chunks: costs(dense, chunks=chunks, **seconds) for chunks in (1, 2, 4)}


# The window is attention, MLP, shared expert behind the tap at the MLP.
EARLY = world(9, 9, 9, 9, dispatch=3, combine=27)  # a short way there, a long way back: experts run early
LATE = world(9, 9, 9, 9, dispatch=27, combine=3)  # and the other way round
LARGE = world(5, 5, 5, 5, dispatch=40, combine=40)  # more than one chunk can hide
MIXED = {1: SpanCosts(forward=LATE[1].forward, backward=costs((9,) * 4, dispatch=3, combine=27, backward=4).backward)}
CALM = world(90, 90, 90, 90, dispatch=0, combine=1.5)  # next to nothing to hide


def tuner(plans=FIRST, shapes=None, counts=(1,), interval=0, **settings) -> Tuner:
    shapes = shapes or dict.fromkeys(plans, SHAPE)
    settings.setdefault("fixed", {group: even_plan(shape, 1) for group, shape in shapes.items()})
    return Tuner(shapes, plans, counts=counts, interval=interval, **settings)


def run_step(
    one: Tuner, worlds: Mapping[int, World], slower: Callable[[Plan], float] = lambda _plan: 0.0
) -> str | None:
    """A step as ``session.py`` takes it; returns what was decided behind it.

    Args:
        worlds: by group.
        slower: seconds by which a plan is slower than its ops say.
    """
    passes: list[GroupPass] = []
    for group, plans in one.plans.items():
        measured = simulated(one._shapes[group], worlds[group][plans.training.chunks], plans.training, group)
        passes += [dataclasses.replace(p, total_s=p.total_s + slower(plans.training)) for p in measured]
    one.take(passes)
    if not one.advance():
        return None
    decision = one.conclude([one.evidence()])
    one.adopt(decision)
    return decision.text


def run_until_settled(one: Tuner, worlds, **kwargs) -> list[str]:
    texts = []
    for _ in range(100):
        text = run_step(one, worlds, **kwargs)
        if text is not None:
            texts.append(text)
        if one.phase is Phase.SETTLED:
            return texts
    raise AssertionError(f"not settled after 100 steps: {texts}")


def every_plan(chunks: int) -> list[Plan]:
    (call,) = SHAPE.calls
    return [Plan((slots,)) for slots in combinations_with_replacement(range(1, call.num_slots + 1), chunks)]


def best_s(one_world: World, counts) -> float:
    return min(predicted_s(SHAPE, one_world[plan.chunks], plan) for chunks in counts for plan in every_plan(chunks))


@pytest.mark.parametrize("counts", [(1,), (1, 2, 4)])
@pytest.mark.parametrize("one_world", [EARLY, LATE, LARGE], ids=["early", "late", "large"])
def test_it_reaches_the_best_plan(one_world, counts):
    one = tuner(counts=counts)
    run_until_settled(one, {0: one_world})
    plan = one.plans[0].training
    assert predicted_s(SHAPE, one_world[plan.chunks], plan) == best_s(one_world, counts)
    assert plan.chunks in counts


def test_the_worlds_differ():
    """Negative control of the test above: neither the first plan nor one plan for all would have passed it."""
    found = []
    for one_world in (EARLY, LATE, LARGE):
        one = tuner(counts=(1, 2, 4))
        run_until_settled(one, {0: one_world})
        found.append(one.plans[0].training)
        assert predicted_s(SHAPE, one_world[1], FIRST[0].training) > best_s(one_world, (1, 2, 4))
    assert len(set(found)) == 3
    assert found[2].chunks > 1


def test_steps_and_what_they_are_for():
    one = tuner(counts=(1, 2), interval=0)
    seen = []
    while one.phase is not Phase.SETTLED:
        plan = one.plans[0].training
        seen.append((one.phase, plan.chunks, plan.blocking, one.records, one.sequential))
        run_step(one, {0: EARLY})
    assert one.decision is not None
    tried = [candidate.plans[0] for candidate in one._candidates]
    turn = [(Phase.CHECK, plan.chunks, plan.blocking, True, False) for plan in tried]
    assert seen == [
        *[(Phase.WARM_UP, 1, False, False, False)] * WARM_UP_STEPS,
        *[(Phase.MEASURE, 1, True, True, True)] * MEASURE_STEPS,
        *[(Phase.MEASURE, 2, True, True, True)] * MEASURE_STEPS,
        *turn * TURNS,
    ]
    assert {plan.chunks for plan in tried} == {1, 2}
    assert one.plans[0].training != FIRST[0].training
    assert not one.records


def test_nothing_to_try_where_there_is_one_plan():
    """A window of two slots, of which one hides all: all else is far slower, and no step is lost on it."""
    shape = SpanShape(num_ops=2, calls=(RoutedCall(tap=0, landing=1),))
    only = Plan(((2,),))
    call = CallCosts(route=1, encode=1, dispatch=50, experts=1, combine=1, decode=1)
    one_way = PassCosts(ops=(50, 1), calls=(call,))
    there = {0: {1: SpanCosts(forward=one_way, backward=one_way)}}
    one = tuner({0: Plans(only, only)}, {0: shape}, fixed={0: only})
    assert len(run_until_settled(one, there)) == 1
    assert one.plans == {0: Plans(only, only)} and not one._candidates
    slow = tuner({0: Plans(Plan(((1,),)), only)}, {0: shape}, fixed={0: only})  # what runs is tried, however slow
    assert len(run_until_settled(slow, there)) == 2 and slow.plans == one.plans


def test_it_keeps_what_runs_where_all_else_is_slower():
    one = tuner()
    texts = run_until_settled(one, {0: EARLY}, slower=lambda plan: 0.0 if plan in (Plan(((2,),)),) else 50.0)
    assert one.plans[0].training == FIRST[0].training
    found = (
        r"^group 0 slots 2, stays: predicted \S+ ms, measured \S+ ms; group 0 slots \d was not faster by 1%: predicted "
    )
    assert re.search(found, texts[-1]), texts
    # What is hidden is compared with what this plan was predicted to hide, not with the one that lost.
    assert one.decision is not None
    assert one.decision.hidden_share == predicted_hidden_share(SHAPE, EARLY[1], Plan(((2,),)))
    assert one.decision.hidden_share < predicted_hidden_share(SHAPE, EARLY[1], Plan(((1,),)))


def test_fewer_chunks_are_tried_beside_the_solvers_choice():
    """Where chunks cost more than was measured, the best plan of fewer of them is taken: not only what ran before."""
    there = world(9, 9, 9, 9, dispatch=3, combine=60)
    assert best_s(there, (1, 2, 4)) < best_s(there, (1,)) < predicted_s(SHAPE, there[1], FIRST[0].training)
    one = tuner(counts=(1, 2, 4))
    texts = run_until_settled(one, {0: there}, slower=lambda plan: 40.0 * (plan.chunks > 1))
    plan = one.plans[0].training
    assert plan.chunks == one.plans[0].forward.chunks == 1
    assert predicted_s(SHAPE, there[1], plan) == best_s(there, (1,))
    assert re.search(r"^group 0 slots \d, predicted .* before .*; group 0 slots \d,\d.* was not faster", texts[-1]), (
        texts
    )


def test_off_is_taken_where_nothing_is_faster():
    one = tuner()
    run_until_settled(one, {0: CALM}, slower=lambda plan: 20.0 * (not plan.blocking))
    assert one.plans == {0: Plans(sequential_plan(SHAPE), sequential_plan(SHAPE))}
    assert one.decision is not None and one.decision.hidden_share == 0
    assert "slots 1 (each collective waited for at once), predicted" in one.decision.text


def test_a_tie_keeps_what_runs():
    """A plan that is faster by less than a hundredth is no reason to change, nor are more chunks."""
    first = Plan(((1,),))
    one = tuner({0: Plans(first, first)}, counts=(1, 2))
    run_until_settled(one, {0: CALM})
    assert one.plans[0] == Plans(first, first)
    assert best_s(CALM, (1, 2)) < predicted_s(SHAPE, CALM[1], first) < 1.01 * best_s(CALM, (1, 2))


def test_evaluations_plan_is_tried_in_training_steps():
    """Its forward passes are timed, so that a plan which is slower than predicted is not taken for evaluation."""
    run_until_settled(found := tuner(), {0: EARLY})
    forward, training = found.plans[0].forward, found.plans[0].training
    assert forward != FIRST[0].forward
    run_until_settled(one := tuner(), {0: EARLY}, slower=lambda plan: 50.0 * (plan == forward))
    assert one.plans[0].forward not in (forward, training) or forward == training
    assert one.plans[0].forward != forward


def test_the_plan_of_fixed_is_tried_whatever_runs():
    """And is what it is for the layer: of a stock one with a shared expert the last slot, not the middle one."""
    fixed = Plan(((4,),))
    one = tuner({0: Plans(Plan(((3,),)), Plan(((3,),)))}, fixed={0: fixed})
    run_until_settled(one, {0: CALM}, slower=lambda plan: 20.0 * (plan != fixed))
    assert one.plans == {0: Plans(fixed, fixed)}


def test_forward_alone_gets_no_turns_of_its_own():
    """Training pays for turns: where its times are steady it settles, however much those of forward scatter."""
    random = Random(3)
    one = tuner()
    steps = 0
    while one.phase is not Phase.SETTLED:
        plan = one.plans[0].training
        noise = 20 * random.random()
        passes = simulated(SHAPE, EARLY[plan.chunks], plan, 0)
        one.take([dataclasses.replace(p, total_s=p.total_s + (-noise if p.backward else noise)) for p in passes])
        if one.advance():
            one.adopt(one.conclude([one.evidence()]))
        steps += 1
    assert steps == WARM_UP_STEPS + MEASURE_STEPS + TURNS * len(one._candidates)


def test_scattering_times_get_more_turns_and_say_so():
    random = Random(7)
    one = tuner(counts=(1, 2))
    texts = run_until_settled(one, {0: EARLY}, slower=lambda _plan: 30 * random.random())
    assert re.search(r"^times scatter, and ratios are known to \d+\.\d%: \d plans get 3 turns more$", texts[1]), texts
    assert re.search(r"; \d+ turns, as times scatter(: ratios are known to \d+\.\d%)?$", texts[-1]), texts
    assert len(texts) > 3 and texts[-1].count("turns") == 1
    calm = run_until_settled(tuner(counts=(1, 2)), {0: EARLY})
    assert not any("turns" in text for text in calm)


def test_a_faster_plan_says_its_times():
    one = tuner()
    measured, checked = run_until_settled(one, {0: EARLY})
    ((slot,),) = one.plans[0].training.slots
    seconds = predicted_s(SHAPE, EARLY[1], one.plans[0].training)
    before = predicted_s(SHAPE, EARLY[1], FIRST[0].training)
    assert measured == f"group 0 slots {slot}, predicted {seconds * 1e3:.1f} ms"
    assert checked == f"{measured}, measured {seconds * 1e3:.1f} ms, before {before * 1e3:.1f} ms"


def test_it_measures_again_and_follows_the_costs():
    one = tuner(interval=5)
    run_until_settled(one, {0: EARLY})
    early = one.plans[0].training
    for _ in range(5):
        assert (one.phase, one.records) == (Phase.SETTLED, False)
        assert run_step(one, {0: LATE}) is None
    assert one.phase is Phase.MEASURE
    run_until_settled(one, {0: LATE})
    assert one.plans[0].training.slots > early.slots
    assert predicted_s(SHAPE, LATE[1], one.plans[0].training) == best_s(LATE, (1,))


def test_interval_0_measures_once():
    one = tuner(interval=0)
    run_until_settled(one, {0: EARLY})
    for _ in range(50):
        run_step(one, {0: LATE})
        assert one.phase is Phase.SETTLED


def test_chunks_never_change_where_there_is_one_count():
    """Not even while measuring: chunks change rounding."""
    one = tuner(counts=(1,), interval=3)
    for _ in range(60):
        assert {plans.training.chunks for plans in one.plans.values()} == {1}
        assert {plans.forward.chunks for plans in one.plans.values()} == {1}
        run_step(one, {0: LARGE})


@pytest.mark.parametrize(("settled_for", "more"), [(0, 4), (3, 1), (9, 1)])
def test_a_settled_one_keeps_the_plans_of_a_checkpoint(settled_for, more):
    """For the rest of the interval, of which a part may be over."""
    saved = {0: Plans(Plan(((1, 3),)), Plan(((2, 2),)))}
    one = tuner(saved, counts=(1, 2), interval=4, settled_for=settled_for)
    for _ in range(more):
        assert one.plans == saved and not one.records
        assert run_step(one, {0: LARGE}) is None
    assert one.phase is Phase.MEASURE


def test_every_group_has_its_own_plan():
    one = tuner({3: FIRST[0], 4: FIRST[0], 5: FIRST[0]})
    texts = run_until_settled(one, {3: EARLY, 4: EARLY, 5: LATE})
    plans = one.plans
    assert plans[3] == plans[4] != plans[5]
    for group, one_world in ((3, EARLY), (5, LATE)):
        assert predicted_s(SHAPE, one_world[1], plans[group].training) == best_s(one_world, (1,))
    assert texts[-1].startswith(f"groups 3 to 4 slots {plans[3].training.slots[0][0]}; group 5 slots ")


def waiting(enqueue: float) -> World:
    """A host that waits 4 s for the counts, and takes so long to enqueue the op at the tap."""
    whole = costs((9,) * 4, dispatch=3, combine=9)
    (call,) = whole.forward.calls
    call = dataclasses.replace(call, wait=4, enqueue=enqueue)
    return {1: dataclasses.replace(whole, forward=dataclasses.replace(whole.forward, calls=(call,)))}


def test_it_launches_behind_the_op_at_the_tap_where_that_is_faster():
    one = tuner()
    texts = run_until_settled(one, {0: waiting(enqueue=1)})
    plan = one.plans[0].training
    assert plan.launch is one.plans[0].forward.launch is Launch.BEHIND
    assert predicted_s(SHAPE, waiting(1)[1], plan) < best_s(waiting(1), (1,))  # than any that launches before it
    assert all("slots 2 (launched behind the op at the tap), predicted" in text for text in texts)
    # A host that computes the op itself has nothing to run ahead of.
    busy = tuner()
    run_until_settled(busy, {0: waiting(enqueue=9)})
    assert busy.plans[0].training.launch is busy.plans[0].forward.launch is Launch.BEFORE


def test_it_launches_within_attention_where_that_is_faster():
    """The lane is busy with the projections while the host waits, and the dispatch leaves sooner than behind it."""
    shape = dataclasses.replace(SHAPE, attentions=frozenset({1}))
    whole = waiting(enqueue=4)[1]
    (call,) = whole.forward.calls
    call = dataclasses.replace(call, enqueue_core=3, dispatch=12)
    forward = dataclasses.replace(whole.forward, calls=(call,), cores={1: 3})
    one_world = {1: dataclasses.replace(whole, forward=forward)}
    one = tuner(shapes={0: shape})
    texts = run_until_settled(one, {0: one_world})
    plan = one.plans[0].training
    assert plan.launch is one.plans[0].forward.launch is Launch.WITHIN
    same = [dataclasses.replace(plan, launch=launch) for launch in (Launch.BEFORE, Launch.BEHIND)]
    assert predicted_s(shape, one_world[1], plan) < min(predicted_s(shape, one_world[1], other) for other in same)
    assert all(f"slots {plan.slots[0][0]} (launched within the op at the tap), predicted" in text for text in texts)
    # Where the op cannot be cut, there is no such place.
    run_until_settled(uncut := tuner(), {0: one_world})
    assert uncut.plans[0].training.launch is not Launch.WITHIN


def test_it_launches_before_again_where_behind_was_slower():
    one = tuner()
    texts = run_until_settled(one, {0: waiting(enqueue=1)}, slower=lambda plan: 50.0 * (plan.launch is Launch.BEHIND))
    assert one.plans[0].training == FIRST[0].training
    assert re.search(r"slots 2, stays: .*; group 0 slots 2 \(launched behind the op at the tap\) was not", texts[-1]), (
        texts
    )


def test_evaluation_has_a_plan_of_its_own():
    """Backward's long combine wants early experts; forward alone wants them late."""
    one = tuner()
    run_until_settled(one, {0: MIXED})
    plans = one.plans[0]
    for plan in every_plan(1):
        assert predicted_s(SHAPE, MIXED[1], plans.training) <= predicted_s(SHAPE, MIXED[1], plan)
        forward_s = predicted_s(SHAPE, MIXED[1], plans.forward, forward_only=True)
        assert forward_s <= predicted_s(SHAPE, MIXED[1], plan, forward_only=True)
    assert plans.training != plans.forward


def test_a_new_plan_for_evaluation_alone_is_adopted():
    """And where training goes back, evaluation need not."""
    run_until_settled(found := tuner(), {0: EARLY})
    training = found.plans[0].training
    one = tuner({0: Plans(training, Plan(((4,),)))})
    run_until_settled(one, {0: EARLY})
    assert one.plans == found.plans
    run_until_settled(other := tuner(), {0: MIXED})
    back = tuner()
    run_until_settled(back, {0: MIXED}, slower=lambda plan: 50.0 * (plan == other.plans[0].training))
    assert back.plans == {0: Plans(FIRST[0].training, other.plans[0].forward)}


def test_while_measuring_evaluation_keeps_its_plan():
    one = tuner({0: Plans(Plan(((2,),)), Plan(((4,),)))})
    while not one.sequential:
        run_step(one, {0: EARLY})
    assert one.plans[0] == Plans(Plan(((1,),), blocking=True), Plan(((4,),)))


def test_the_mean_over_ranks_decides():
    """One rank alone would go early, the other late: each is put together with the other's evidence."""
    pair = [tuner(), tuner()]
    measured = [EARLY[1], costs((9,) * 4, dispatch=27, combine=3, backward=6)]
    while not all(one.phase is Phase.SETTLED for one in pair):
        evidence = []
        for one, its_costs in zip(pair, measured, strict=True):
            one.take(simulated(SHAPE, its_costs, one.plans[0].training))
            if one.advance():
                evidence.append(one.evidence())
        if evidence:
            decision = pair[0].conclude(evidence)
            for one in pair:
                one.adopt(decision)
    assert pair[0].plans == pair[1].plans
    together = {1: mean_costs(measured)}
    assert predicted_s(SHAPE, together[1], pair[0].plans[0].training) == best_s(together, (1,))
    assert predicted_s(SHAPE, measured[0], pair[0].plans[0].training) > best_s({1: measured[0]}, (1,))


def test_without_a_measured_backward_the_plan_stays_and_says_why():
    one = tuner({0: FIRST[0], 1: FIRST[0]}, interval=7)
    text = None
    for _ in range(WARM_UP_STEPS + MEASURE_STEPS):
        passes = [p for group in (0, 1) for p in simulated(SHAPE, EARLY[1], one.plans[group].training, group)]
        one.take([p for p in passes if not (p.group == 0 and p.backward)])
        if one.advance():
            decision = one.conclude([one.evidence()])
            one.adopt(decision)
            text = decision.text
    assert text is not None
    assert text.startswith("groups 0 to 1 slots 2 stays: no gradient reaches the input of group 0")
    assert "--overlap fixed" in text
    assert (one.phase, one.plans) == (Phase.SETTLED, {0: FIRST[0], 1: FIRST[0]})


def test_plans_are_saved_as_builtin_types_and_come_back():
    plans = {
        0: Plans(Plan(((1, 2), (1, 1))), Plan(((3,), (1,)), launch=Launch.WITHIN)),
        11: Plans(Plan(((2,),), blocking=True), Plan(((1, 1, 4, 4),))),
    }
    saved = saved_form(plans)
    assert saved["0"] == {
        "training": {"slots": [[1, 2], [1, 1]], "blocking": False, "launch": "before"},
        "forward": {"slots": [[3], [1]], "blocking": False, "launch": "within"},
    }
    assert from_saved_form(json.loads(json.dumps(saved))) == plans
    assert saved_form(plans, hidden_share=0.5)["11"] == {**saved["11"], "hidden_share": 0.5}
    assert from_saved_form(saved_form(plans, hidden_share=0.5)) == plans


def continued(monkeypatch, now: dict[str, Any], settled_at: int = 5, older: str = "", **beside: Any) -> Any:
    """A session that continues from a checkpoint with ``beside`` beside its plans, under the conditions ``now``.

    Args:
        older: write the plans as versions did that launched before the op at the tap, or before and behind it, or that
            never chose to wait.
    """
    from megatron_scmoe.mcore import stages
    from megatron_scmoe.training import session

    monkeypatch.setattr(stages, "is_stage_root", lambda: True)
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, overlap=Overlap.ADAPTIVE)
    saved = saved_form(FIRST, iteration=settled_at, **beside)
    for kind in ("training", "forward"):
        slots = saved["0"][kind]["slots"]
        forms = {
            "before": slots,
            "before and behind": {"slots": slots, "behind": False},
            "without off": {"slots": slots, "launch": "before"},
        }
        saved["0"][kind] = forms.get(older, saved["0"][kind])
    one = session.OverlapSession(Namespace(overlap_plans=saved), scmoe)
    one._kept.conditions = now
    three = Plan(((3,),))
    one._planned[0] = SimpleNamespace(group_index=0, shape=SHAPE, plan=three, forward_plan=three, first_plan=three)
    one._tuner = one._kept.tuner(one._planned, iteration=9)
    return one


OTHER_CONDITIONS = (
    *("a2a_weights_apart_above", "a2a_unique", "moe_router_topk", "moe_expert_capacity_factor"),
    "moe_pad_expert_input_to_capacity",
    *("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("context_parallel_size", "micro_batch_size", "seq_length", "transformer_impl", "bf16", "fp16"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("moe_permute_fusion", "moe_router_fusion", "moe_grouped_gemm", "sequence_parallel"),
)
THERE = {"seq_length": 16, "a2a_codec": "none", "device": "cpu"}


@pytest.mark.parametrize(
    ("here", "beside", "why"),
    [
        (THERE, {"conditions": THERE}, None),
        ({**THERE, "seq_length": 32}, {"conditions": THERE}, "seq_length 16, now 32"),
        ({**THERE, "a2a_codec": "lsh"}, {"conditions": THERE}, "a2a_codec none, now lsh"),
        ({**THERE, "device": "NVIDIA H200"}, {"conditions": THERE}, "device cpu, now NVIDIA H200"),
        ({**THERE, "ranks on nodes": [4, 4]}, {"conditions": THERE}, "ranks on nodes unknown, now [4, 4]"),
        (THERE, {}, "seq_length unknown, now 16"),  # a checkpoint of before they were saved
    ],
    ids=["same", "sizes", "codec", "device", "nodes", "older"],
)
def test_plans_of_a_checkpoint_hold_under_its_conditions(monkeypatch, capsys, here, beside, why):
    one = continued(monkeypatch, here, hidden_share=0.9, **beside)
    assert one._tuner.phase is (Phase.WARM_UP if why else Phase.SETTLED)
    assert one._tuner._done == (0 if why else 3)  # of the interval, at the end of step 8
    assert one._kept.of(one._planned[0]) == (None if why else FIRST[0])
    said = f" > overlap: the checkpoint's plans were measured with {why}: measuring anew\n"
    assert capsys.readouterr().out == (said if why else "")


@pytest.mark.parametrize("older", ["", "before", "before and behind", "without off"])
def test_plans_of_an_older_version_are_measured_anew(monkeypatch, capsys, older):
    one = continued(monkeypatch, THERE, older=older, hidden_share=0.9, conditions=THERE)
    assert one._tuner.phase is (Phase.WARM_UP if older else Phase.SETTLED)
    assert one._kept.of(one._planned[0]) == (None if older else FIRST[0])
    said = " > overlap: the checkpoint's plans were saved by an older version: measuring anew\n"
    assert capsys.readouterr().out == (said if older else "")


@pytest.mark.parametrize(
    ("on_gpu", "connections", "counts"), [(True, "1", (1,)), (True, "32", (1, 2, 4)), (False, "1", (1, 2, 4))]
)
def test_in_one_queue_one_chunk_is_tried(monkeypatch, capsys, on_gpu, connections, counts):
    from megatron_scmoe.mcore import stages
    from megatron_scmoe.training.kept_plans import KeptPlans

    monkeypatch.setattr(stages, "is_stage_root", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, overlap=Overlap.ADAPTIVE, overlap_chunks=4)
    four = {0: Plans(Plan(((1, 2, 3, 4),)), Plan(((2,),)))}
    kept = KeptPlans(Namespace(overlap_plans=saved_form(four, iteration=3, hidden_share=0.5)), scmoe)
    three = Plan(((3,),))
    group: Any = SimpleNamespace(group_index=0, shape=SHAPE, plan=three, forward_plan=three, first_plan=three)
    assert kept.tuner({0: group}, iteration=9)._counts == counts
    assert kept.of(group) == (four[0] if len(counts) > 1 else None)
    said = "--overlap-chunks is 4, and 1 is tried" in capsys.readouterr().out
    assert said == (counts == (1,))


@pytest.mark.parametrize(("settled_at", "done"), [(5, 3), (90_000, 0)])
def test_the_interval_goes_on_where_the_last_job_ended(monkeypatch, settled_at, done):
    """Or begins anew where --finetune counts steps from 0 again, once."""
    one = continued(monkeypatch, THERE, settled_at, hidden_share=0.9, conditions=THERE)
    assert one._tuner._done == done
    assert one._args.overlap_plans["0"]["iteration"] == (5 if settled_at == 5 else 8)


def kept_plans(slots: tuple[int, ...]) -> int:
    """Of how many groups plans are left where rank 1 has read a checkpoint with ``slots``."""
    from megatron_scmoe.training.kept_plans import KeptPlans

    plans = {0: Plans(Plan((slots if torch.distributed.get_rank() else (2,),)), Plan(((2,),)))}
    scmoe = ScMoEConfig(shortcut=Shortcut.SCMOE, overlap=Overlap.ADAPTIVE)
    kept = KeptPlans(Namespace(overlap_plans=saved_form(plans)), scmoe)
    kept.keep_what_all_have(torch.distributed.group.WORLD)
    return len(kept._plans)


@pytest.mark.parametrize(("slots", "left"), [((2,), 1), ((3,), 0)])
def test_ranks_that_read_different_checkpoints_measure_anew(slots, left):
    assert ranks.run(kept_plans, 2, slots, layout=EP2) == [left] * 2


def test_conditions_are_what_a_checkpoint_gives_back(monkeypatch):
    from megatron_scmoe.training import kept_plans

    names = (*ARCHITECTURE_FIELDS, *CODEC_FIELDS, *OTHER_CONDITIONS)
    args = Namespace(**dict.fromkeys(names, 1) | {"shortcut_position": ("pos2", "pos1"), "recompute_modules": ["mlp"]})
    monkeypatch.setattr(kept_plans, "gathered", lambda mine, _group: [mine, mine])
    found = kept_plans.conditions(args, None)
    assert (
        found.keys() == {*names, "device", "ranks on nodes"}
        and found["ranks on nodes"] == [2]
        and json.loads(json.dumps(found)) == found
    )


def test_a_recording_ends_where_an_evaluation_begins():
    from megatron_scmoe.overlap import observe
    from megatron_scmoe.training import session

    one = session.OverlapSession(Namespace(), ScMoEConfig(shortcut=Shortcut.SCMOE, overlap=Overlap.ADAPTIVE))
    one._recording = observe.start()
    observe.Marker(0).now("attention")
    one.in_evaluation(torch.nn.Identity())
    observe.Marker(0).now("attention")
    assert observe._listeners == [] and len(one._recording.marks) == 1  # which is still to be reported


def test_a_run_that_continues_warns_by_what_was_predicted_before(monkeypatch, capsys):
    hidden_half = Summary(10.0, 5.0, 0.5, 1.0, 1.0, 0.0)
    for predicted, says in ((0.9, "50% of the communication is hidden, 90% was predicted"), (0.55, "")):
        one = continued(monkeypatch, THERE, hidden_share=predicted, conditions=THERE)
        one._warn(hidden_half)
        out = capsys.readouterr().out
        assert says in out and bool(says) == bool(out)
    one = continued(monkeypatch, {**THERE, "device": "other"}, hidden_share=0.9, conditions=THERE)
    capsys.readouterr()
    one._warn(hidden_half)  # that prediction is not of this run's plans
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (1, 2)), (3, (1, 2)), (4, (1, 2, 4)), (7, (1, 2, 4))])
def test_chunk_counts(most, counts):
    assert chunk_counts(most) == counts


def test_plans_in_few_words():
    one, other = Plans(Plan(((2,),)), Plan(((1,),))), Plans(Plan(((1, 3),)), Plan(((1,),)))
    assert described({0: one, 1: one, 2: one, 3: other}) == "groups 0 to 2 slots 2; group 3 slots 1,3"
    two_calls = Plans(Plan(((1, 3), (1, 1))), Plan(((1,), (1,))))
    assert described({0: two_calls, 2: one}) == "group 0 slots 1,3 | 1,1; group 2 slots 2"
    within, behind = (Plans(Plan(((2,),), launch=launch), one.forward) for launch in (Launch.WITHIN, Launch.BEHIND))
    assert described({0: behind, 1: one}) == "group 0 slots 2 (launched behind the op at the tap); group 1 slots 2"
    assert described({0: within, 1: within}) == "groups 0 to 1 slots 2 (launched within the op at the tap)"


# ---- on ranks, through the entry script -------------------------------------------------------------------------

TRIED = [(2,), (4,), (1,), (1,)]
"""With the solver's plans replaced: what runs and fixed, training's, evaluation's, and off."""
SETTLED_AT = WARM_UP_STEPS + MEASURE_STEPS + TURNS * len(TRIED)
"""Steps until a plan is settled on, with one number of chunks."""
NUM_STEPS = SETTLED_AT + 2
EXPERT_PARALLEL = ["--expert-model-parallel-size 2"]
TENSOR_PARALLEL = ["--tensor-model-parallel-size 2", "--sequence-parallel"]
PIPELINE = ["--pipeline-model-parallel-size 2"]
TRAINING = with_flags(SCMOE, f"--train-iters {NUM_STEPS}", "--expert-tensor-parallel-size 1", "--global-batch-size 4")
LAYOUTS = {
    "EP2": (2, EXPERT_PARALLEL),
    "PP2": (2, PIPELINE),
    "TP2 SP EP2": (4, [*TENSOR_PARALLEL, *EXPERT_PARALLEL]),
    "PP2 EP2": (4, [*PIPELINE, *EXPERT_PARALLEL]),
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one rank did: its output, the slots of each group in each step, and the plans that a checkpoint keeps.

    Each group has one routed call, whose slots these are.
    """

    printed: str
    slots: list[dict[int, tuple[int, ...]]]
    blocking: list[bool]
    forward_slots: dict[int, tuple[int, ...]]
    saved: dict[str, object]


def slots_of(plan: Plan) -> tuple[int, ...]:
    """Those of the only call."""
    (slots,) = plan.slots
    return slots


def train(flags: list[str]) -> str:
    """Run the entry script; what it printed."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it under tensor parallelism
    printed = training.train(flags)
    assert "exit code" not in printed, printed[-3000:]
    return printed


MOST_CANDIDATES = 8
"""At most, of two numbers of chunks: what runs, fixed, what is solved for each number and kind of step, and off."""


def train_and_look(
    flags: list[str], found: tuple[int, ...] = (), other_on_rank: int | None = None, most_turns: int = MOST_TURNS
) -> Seen:
    """Train with the entry script.

    Args:
        flags: of the command line.
        found: slots that the solver finds, whatever was measured; none: what it really finds.
        other_on_rank: a rank that adopts another plan than the one that was agreed on.
        most_turns: of a candidate, however much times scatter.
    """
    import torch.distributed as dist
    from megatron.training import get_args

    from megatron_scmoe.overlap import candidates, trial
    from megatron_scmoe.overlap.solver import Solution
    from megatron_scmoe.training import session

    trial.MOST_TURNS = most_turns
    if found:
        candidates.solve = lambda *_, forward_only, max_steps: Solution(
            Plan(((1,) if forward_only else found,)), 1.0, 0.5, exact=True
        )
        candidates.HOPELESS, trial.MOST_TURNS = math.inf, TURNS  # the same steps, however long they take
    if other_on_rank is not None:
        adopt = Tuner.adopt

        def adopt_another(one: Tuner, decision) -> None:
            if dist.get_rank() == other_on_rank:
                other = {group: Plans(Plan(((3,),)), plans.forward) for group, plans in decision.plans.items()}
                decision = dataclasses.replace(decision, plans=other)
            adopt(one, decision)

        Tuner.adopt = adopt_another
    sessions, slots, blocking = [], [], []
    set_plans = session.OverlapSession._set_plans

    def look(one: session.OverlapSession, its_tuner: Tuner) -> None:
        set_plans(one, its_tuner)
        sessions[:] = [one]
        slots.append({index: slots_of(span.plan) for index, span in one._planned.items()})
        blocking.append(any(span.plan.blocking for span in one._planned.values()))

    session.OverlapSession._set_plans = look
    printed = train(flags)
    return Seen(
        printed=printed,
        slots=slots,
        blocking=blocking,
        forward_slots={index: slots_of(span.forward_plan) for index, span in sessions[0]._planned.items()},
        saved=getattr(get_args(), "overlap_plans", {}),
    )


def losses(directory: Path) -> dict[str, dict[int, float]]:
    return training.scalars(directory, "lm loss", "grad-norm")


def said(seen: list[Seen]) -> list[str]:
    """What all ranks said of their plans."""
    return [line for one in seen for line in one.printed.splitlines() if line.startswith(" > overlap")]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "PP2" else pytest.mark.full) for name in LAYOUTS]
)
def test_every_plan_on_the_way_gives_the_numbers_of_off(tmp_path, layout):
    num_ranks, flags = LAYOUTS[layout]
    flags = with_flags(TRAINING, *flags, "--eval-interval 5")
    logs = {name: tmp_path / name for name in ("off", "adaptive")}
    ranks.run(train, num_ranks, with_flags(flags, "--overlap off", f"--tensorboard-dir {logs['off']}"))
    flags = with_flags(flags, "--overlap adaptive", f"--tensorboard-dir {logs['adaptive']}")
    flags = with_flags(flags, f"--save {tmp_path / 'saved'}", f"--save-interval {NUM_STEPS}")
    seen = ranks.run(train_and_look, num_ranks, flags, (4,))
    assert losses(logs["off"]) == losses(logs["adaptive"])
    assert sorted(losses(logs["off"])["lm loss"]) == list(range(1, NUM_STEPS + 1))

    # Sequential while it measures, old and new in turns, and then one of them; all ranks in the same step.
    for one in seen:
        slots = [next(iter(of_groups.values())) for of_groups in one.slots]
        assert all(
            set(of_groups.values()) == {its_slots} for of_groups, its_slots in zip(one.slots, slots, strict=True)
        )
        measuring = slice(WARM_UP_STEPS - 1, WARM_UP_STEPS + MEASURE_STEPS - 1)
        assert slots[: measuring.start] == [(2,)] * (WARM_UP_STEPS - 1)
        assert slots[measuring] == [(1,)] * MEASURE_STEPS
        off = range(measuring.stop + len(TRIED) - 1, SETTLED_AT - 1, len(TRIED))
        waited = [index for index, waits in enumerate(one.blocking) if waits]
        assert waited[: MEASURE_STEPS + TURNS] == [*range(NUM_STEPS)[measuring], *off]
        assert slots[measuring.stop : SETTLED_AT - 1] == TRIED * TURNS
        assert {*one.forward_slots.values()} <= {*TRIED}
        # What the log says was chosen runs from then on.
        (chosen,) = {line.partition("slots ")[2][0] for line in said([one]) if "measured" in line} or {None}
        assert slots[-1] in TRIED and (chosen is None or slots[-1] == (int(chosen),))

    # Every stage says what it decided, twice; rank 0 knows the plans of all stages.
    num_stages = 2 if "PP2" in layout else 1
    assert len(said(seen)) == 2 * num_stages
    if num_stages > 1:
        assert sum("overlap of stage 1 from iteration" in line for line in said(seen)) == 2
    expected = {
        str(index): {"training": [list(slots)], "forward": [list(one.forward_slots[index])]}
        for one in seen
        for index, slots in sorted(one.slots[-1].items())
    }
    slots_of = {
        index: {kind: one[kind]["slots"] for kind in ("training", "forward")} for index, one in seen[0].saved.items()
    }
    assert slots_of == expected and len(expected) == 2
    for one in seen[0].saved.values():
        assert 0 <= one["hidden_share"] <= 1
        assert one["conditions"].keys() == {
            *(*ARCHITECTURE_FIELDS, *CODEC_FIELDS, *OTHER_CONDITIONS),
            *("device", "ranks on nodes"),
        }
        assert one["iteration"] == SETTLED_AT
        assert (
            one["conditions"].items()
            >= {
                "tensor_model_parallel_size": 2 if "TP2" in layout else 1,
                "expert_model_parallel_size": 2 if "EP2" in layout else 1,
                "expert_tensor_parallel_size": 1,
                "context_parallel_size": 1,
                "micro_batch_size": 2,
                "seq_length": 16,
                "shortcut": "scmoe",
                "a2a_codec": "none",
                "recompute_granularity": None,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            }.items()
        )

    # The checkpoint has them, and a run that continues neither measures again nor says anything.
    flags = with_flags(flags, f"--load {tmp_path / 'saved'}", f"--train-iters {NUM_STEPS + 3}")
    flags = with_flags(flags, "--override-opt-param-scheduler")
    resumed = ranks.run(train_and_look, num_ranks, flags)
    assert said(resumed) == []
    for before, one in zip(seen, resumed, strict=True):
        assert one.slots == [before.slots[-1]] * 2
        assert one.forward_slots == before.forward_slots
        assert one.saved == seen[0].saved

    # Where ops take another time it measures again.
    if layout == "EP2":
        flags = with_flags(flags, f"--train-iters {NUM_STEPS + 5}", "--micro-batch-size 1")
        changed = ranks.run(train_and_look, num_ranks, flags)
        words = "were measured with micro_batch_size 2, now 1: measuring anew"
        assert said(changed) == [f" > overlap: the checkpoint's plans {words}"]
        assert all(set(of_groups.values()) == {(2,)} for one in changed for of_groups in one.slots[:2])


def test_it_measures_solves_and_says_so(tmp_path):
    """Nothing replaced: whatever it finds on this machine, it is legal, and all ranks have it."""
    flags = with_flags(TRAINING, "--expert-model-parallel-size 2", "--overlap adaptive", "--overlap-chunks 2")
    num_steps = WARM_UP_STEPS + 2 * MEASURE_STEPS + TURNS * MOST_CANDIDATES + 2
    seen = ranks.run(train_and_look, 2, with_flags(flags, f"--train-iters {num_steps}"), (), None, TURNS)
    assert seen[0].slots == seen[1].slots
    assert seen[0].forward_slots == seen[1].forward_slots
    for slots in (*seen[0].slots[-1].values(), *seen[0].forward_slots.values()):
        assert len(slots) in (1, 2) and all(1 <= slot <= 4 for slot in slots)
    lines = said(seen)
    assert re.fullmatch(r" > overlap from iteration 10: groups? 0 .*slots \d.*, predicted \d+\.\d ms", lines[0]), lines
    assert len(lines) == 2 and "measured" in lines[1], lines


def test_ranks_with_different_plans_stop(tmp_path):
    """The check of the hashes: one rank adopts another plan, in which its next collective would hang."""
    flags = with_flags(TRAINING, "--expert-model-parallel-size 2", "--overlap adaptive")
    with pytest.raises(ranks.RankError, match=r"ranks \[1\] have other plans than rank 0"):
        ranks.run(train_and_look, 2, flags, (4,), 1)


def both_modes(case: Case) -> list[list[str]]:
    """The recorded order in evaluation, in training, and in evaluation again."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    span = model.decoder.layers[-1].span
    span.plan, span.forward_plan = Plan(((1, 4),)), Plan(((3,),))
    ((tokens, labels, positions),) = models.my_batch()
    orders = []
    for trains in (False, True, False):
        model.train(trains)
        with observe.recording() as recorded:
            model(tokens, positions, None, labels=labels)
        orders.append(order_of(recorded.marks, backward=False))
    return orders


def test_evaluation_runs_its_own_plan():
    for orders in ranks.run(both_modes, 2, Case(num_groups=1), layout=EP2):
        evaluation, training_order = (
            forward_order(OPS["scmoe"], SHAPE, plan) for plan in (Plan(((3,),)), Plan(((1, 4),)))
        )
        assert orders == [evaluation, training_order, evaluation]


# ---- chunks that change while training goes on ------------------------------------------------------------------

OVERLAPPED_REDUCE = ["--overlap-grad-reduce", "--overlap-param-gather", "--use-distributed-optimizer"]
RECOMPUTE = {
    "none": [],
    "full": ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 1"],
    "two": ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 2"],
    "block": ["--recompute-granularity full", "--recompute-method block", "--recompute-num-layers 2"],
    "selective": ["--recompute-granularity selective", "--recompute-modules core_attn mlp shared_experts"],
}
SWITCHED = [
    # architecture, recompute, ranks, layout: what is marked runs with make test-full
    (SCMOE, "full", 2, []),
    pytest.param(SCMOE, "none", 2, [], marks=pytest.mark.full),
    pytest.param(with_flags(DGMOE, "--moe-share-groups 2"), "full", 2, [], marks=pytest.mark.full),
    pytest.param(SCMOE, "two", 2, EXPERT_PARALLEL, marks=pytest.mark.full),
    pytest.param(SCMOE, "block", 2, PIPELINE, marks=pytest.mark.full),
    pytest.param(SCMOE, "selective", 2, EXPERT_PARALLEL, marks=pytest.mark.full),
    pytest.param(SCMOE, "full", 4, EXPERT_PARALLEL, marks=pytest.mark.full),
    pytest.param(DGMOE, "none", 4, EXPERT_PARALLEL, marks=pytest.mark.full),
    pytest.param(with_flags(DGMOE, "--moe-share-groups 2"), "two", 4, EXPERT_PARALLEL, marks=pytest.mark.full),
]


def train_switching(flags: list[str], recompute_experts: bool = False) -> str:
    """Train with another number of chunks in every step: 1, 4, 1, 2, 4, ...

    Args:
        flags: of the command line.
        recompute_experts: recompute the experts of each chunk by themselves, which nothing here does: the number of
            backward passes through an expert would depend on the chunks.
    """
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_scmoe.training import session

    between_steps = session.OverlapSession._between_steps

    def switch(one: session.OverlapSession, iteration: int) -> None:
        between_steps(one, iteration)
        for span in one._planned.values():
            span.plan = even_plan(span.shape, (2, 4, 1)[iteration % 3])

    session.OverlapSession._between_steps = switch
    if recompute_experts:
        forward = SequentialMLP.forward
        SequentialMLP.forward = lambda one, *args: tensor_parallel.checkpoint(partial(forward, one), False, *args)
    return train(flags)


@pytest.mark.parametrize(("architecture", "recompute", "num_ranks", "layout"), SWITCHED)
def test_switching_chunks_changes_rounding_only(tmp_path, architecture, recompute, num_ranks, layout):
    """Where gradients are reduced while backward runs, Megatron counts how often each parameter's gradient comes."""
    flags = with_flags(architecture, *layout, *OVERLAPPED_REDUCE, "--train-iters 7")
    same, switched = tmp_path / "same", tmp_path / "switched"
    ranks.run(train, num_ranks, with_flags(flags, f"--tensorboard-dir {same}"))
    report = f"--overlap-report {tmp_path / 'report'}"
    flags = with_flags(flags, *RECOMPUTE[recompute], report, f"--tensorboard-dir {switched}")
    ranks.run(train_switching, num_ranks, flags)
    one, other = losses(same), losses(switched)
    for name, values in one.items():
        assert sorted(values) == list(range(1, 8))
        assert other[name] == pytest.approx(values, rel=1e-4), name
    lines = (tmp_path / "report" / "rank00000.jsonl").read_text().splitlines()
    assert {len(call) for line in lines for group in json.loads(line)["groups"] for call in group["slots"]} == {1, 2, 4}


@pytest.mark.full
def test_adaptive_chunks_under_full_recompute_change_rounding_only(tmp_path):
    num_steps = NUM_STEPS + MEASURE_STEPS
    flags = with_flags(TRAINING, *EXPERT_PARALLEL, *OVERLAPPED_REDUCE, f"--train-iters {num_steps}")
    ranks.run(train, 2, with_flags(flags, f"--tensorboard-dir {tmp_path / 'plain'}"))
    flags = with_flags(flags, *RECOMPUTE["full"], "--overlap adaptive", "--overlap-chunks 2")
    seen = ranks.run(train_and_look, 2, with_flags(flags, f"--tensorboard-dir {tmp_path / 'adaptive'}"), (1, 3))
    assert {slots for of_groups in seen[0].slots for slots in of_groups.values()} >= {(1,), (2,), (1, 1), (1, 3)}
    for name, values in losses(tmp_path / "plain").items():
        assert losses(tmp_path / "adaptive")[name] == pytest.approx(values, rel=1e-4), name


def test_recomputed_experts_would_be_noticed(tmp_path):
    """Negative control of the test above: with experts that are recomputed chunk by chunk, Megatron's count is off."""
    flags = with_flags(SCMOE, *OVERLAPPED_REDUCE, "--train-iters 7", f"--overlap-report {tmp_path}")
    with pytest.raises(ranks.RankError, match="param_and_grad_buffer"):
        ranks.run(train_switching, 2, flags, recompute_experts=True)
