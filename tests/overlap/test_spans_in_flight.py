"""Several calls of a span under way at once: bit-equal results, and the order that the plan says."""

from __future__ import annotations

import models
import pytest
import ranks
import torch
import training
from cases import cases
from models import Case
from test_overlap import EP, assert_bit_equal, assert_close, run
from test_report import read
from training import SCMOE as FLAGS
from training import with_flags

from megatron_scmoe.contracts import Plan
from megatron_scmoe.overlap.plan import CORE_ATTENTION, OF_A_CALL, Step, backward_order, forward_order

SCMOE = Case(span=2, landing=1)
LATE = Case(position=("pos3",), span=2, landing=3)
DGMOE = SCMOE.replace(shortcut="dgmoe")
FARSKIP = Case(position=("farskip",), moe_every=1, num_groups=4, span=2, landing=1)

SLOTS = {
    # one value for each group: the first group's window is longer by the landing
    "scmoe": (SCMOE, ("1", "1")),
    "scmoe, as late as can be": (SCMOE, ("6", "4")),
    "scmoe, beside the other call": (LATE, ("7", "2")),
    "scmoe, behind the other call": (LATE, ("9", "1")),
    "dgmoe": (DGMOE, ("2", "3")),
    "dgmoe, as late as can be": (DGMOE, ("5", "3")),
    "farskip": (FARSKIP, ("1", "2", "4", "1")),
    "scmoe, chunks": (SCMOE.replace(chunks=2), ("1,6", "2,4")),
    "scmoe, chunks beside the other call": (LATE.replace(chunks=2), ("5,8", "1,4")),
    "dgmoe, chunks": (DGMOE.replace(chunks=2), ("2,3", "1,3")),
    "farskip, chunks": (FARSKIP.replace(chunks=2), ("2,4", "1,2", "1,3", "2,2")),
}
QUICK = ("scmoe, as late as can be", "scmoe, behind the other call", "dgmoe", "farskip")
QUICK += ("scmoe, chunks beside the other call", "dgmoe, chunks", "farskip, chunks")


def case_of(name: str) -> Case:
    case, slots = SLOTS[name]
    return case.replace(expert_slot=slots)


@pytest.mark.parametrize("name", cases(SLOTS, QUICK))
def test_slots_of_a_span_equal_off(name):
    """Chunks change rounding, and their slots nothing."""
    case = case_of(name)
    off = case.replace(overlap="off", expert_slot=(), chunks=1)
    if case.chunks == 1:
        assert_bit_equal(run(case, 2), run(off, 2))
    else:
        assert_bit_equal(run(case, 2), run(case.replace(expert_slot=(",".join("1" * case.chunks),)), 2))
        assert_close(run(case, 2), run(off, 2))


def test_experts_of_two_gates_that_run_in_another_order_change_rounding_only():
    """Outputs are the same bit for bit; what chunks add to the gradients of an MoE's weights comes in another order."""
    in_order, crossed = (DGMOE.replace(chunks=2, expert_slot=(slots, "1,3")) for slots in ("2,3", "3,5"))
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(run(in_order, 2), run(crossed, 2), strict=True))
    assert_close(run(in_order, 2), run(crossed, 2))


@pytest.mark.parametrize("name", cases(["scmoe", "dgmoe", "farskip"], ["dgmoe"]))
def test_a_span_on_four_ranks_equals_off(name):
    case = case_of(name)
    assert_bit_equal(run(case, 4), run(case.replace(overlap="off", expert_slot=()), 4))


@pytest.mark.parametrize("case", [LATE.replace(expert_slot=("8", "2")), DGMOE], ids=["scmoe", "dgmoe"])
def test_spans_of_several_micro_batches_equal_off(case):
    off = case.replace(overlap="off", expert_slot=())
    assert_bit_equal(run(case, 2, num_micro_batches=2), run(off, 2, num_micro_batches=2))


@pytest.mark.parametrize("case", [SCMOE, FARSKIP], ids=["scmoe", "farskip"])
def test_a_span_in_bf16_equals_off(case):
    case = case.replace(dtype=torch.bfloat16)
    assert_bit_equal(run(case, 2), run(case.replace(overlap="off"), 2))


@pytest.mark.parametrize("case", cases([SCMOE, DGMOE, FARSKIP], [DGMOE]))
def test_centroids_in_a_span_equal_off(case):
    case = case.replace(codec="lsh")
    assert_bit_equal(run(case, 2), run(case.replace(overlap="off"), 2))


# --- the recorded order ------------------------------------------------------------------------------------------


def recorded(case: Case) -> tuple[list[Step], list[Step], list[str], object, Plan]:
    """What a step marks of its first span, forward and backward, and what its plan is made of."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    span = model.decoder.layers[case.span * case.moe_every - 1].span
    ((tokens, labels, positions),) = models.my_batch()
    with observe.recording() as marks:
        model(tokens, positions, None, labels=labels).sum().backward()
    of_span = [mark for mark in marks.marks if mark.group == span.group_index]
    names = {*OF_A_CALL, *span.op_names, CORE_ATTENTION}
    forward, backward = (
        [Step(mark.name, mark.index, mark.call) for mark in of_span if mark.name in names and mark.backward is way]
        for way in (False, True)
    )
    return forward, backward, span.op_names, span.shape, span.plan


@pytest.mark.parametrize("name", cases(SLOTS, ("scmoe", "scmoe, behind the other call", "dgmoe", "farskip, chunks")))
def test_recorded_order_of_a_span_is_the_plans(name):
    case = case_of(name)
    for forward, backward, names, shape, plan in ranks.run(recorded, 2, case, layout=EP[2]):
        assert {step.call for step in forward} == {None, *range(len(shape.calls))}
        assert forward == forward_order(names, shape, plan)
        assert backward == backward_order(names, shape, plan)
        another = Plan(tuple((1,) * plan.chunks for _ in plan.slots))
        assert (forward == forward_order(names, shape, another)) == (plan == another)  # negative control


# --- found by measuring ------------------------------------------------------------------------------------------


def test_adaptive_finds_a_plan_for_a_span_and_reports_it(tmp_path):
    """The numbers are those of off, bit for bit; the report has a row for each span."""
    flags = with_flags(FLAGS, "--shortcut-span 2", "--shortcut-landing 1", "--num-layers 8", "--train-iters 16")
    flags = with_flags(flags, "--expert-model-parallel-size 2")
    printed = {}
    for overlap in ("off", "adaptive"):
        more = (
            f"--overlap {overlap}",
            f"--overlap-report {tmp_path}/{overlap}",
            f"--tensorboard-dir {tmp_path}/log-{overlap}",
        )
        printed[overlap] = ranks.run(training.train, 2, with_flags(flags, *more), timeout_s=240)
        assert "exit code" not in printed[overlap][0], printed[overlap][0][-3000:]
    off, found = (training.scalars(tmp_path / f"log-{name}", "lm loss", "grad-norm") for name in printed)
    assert found == off and len(off["lm loss"]) == 16

    (said,) = [line for line in printed["adaptive"][0].splitlines() if line.startswith(" > overlap from iteration 7")]
    assert "predicted" in said and "group" in said
    first, second = read(tmp_path / "adaptive")
    assert [line["groups"][0]["slots"] for line in first] == [line["groups"][0]["slots"] for line in second]
    for line in first + second:
        assert [row["group"] for row in line["groups"]] == [0, 2]
        for row in line["groups"]:
            (late,), (last,) = row["slots"]
            assert 1 <= late <= 6 and 1 <= last <= 4
            assert 0 <= row["exposed_ms"] <= row["communication_ms"] and row["communication_ms"] > 0
            assert len(row["tokens_per_expert"]) == 2 * 4  # of both groups
