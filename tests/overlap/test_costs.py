"""What a step's ops cost: hand-made marks with whole seconds, and ranks whose ops take known times."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import Case
from span_cases import CHUNK_OPS

from megatron_scmoe.contracts import Launch, Plan, RoutedCall, SpanShape
from megatron_scmoe.overlap.costs import GroupPass, costs_of, mean_costs, passes_of
from megatron_scmoe.overlap.launch import gained_s
from megatron_scmoe.overlap.observe import BEGIN, END
from megatron_scmoe.overlap.plan import OF_A_CALL, sequential_plan
from megatron_scmoe.overlap.recording import Mark, Transfer
from megatron_scmoe.overlap.solver import CallCosts, PassCosts, SpanCosts, schedule
from megatron_scmoe.overlap.spans import Lane, communication_s, exposed_s

EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}


# ---- by hand ----------------------------------------------------------------------------------------------------


def recording(*parts: str, group: int = 0, at: float = 0.0) -> SimpleNamespace:
    """What was heard: marks such as ``forward 10 MLP 1``, and transfers such as ``forward 17-27 dispatch 0 500``.

    What is of a routed call is of the first one, unless ``call 1`` stands behind it.
    """
    marks, transfers = [], []
    for line in (line.strip() for part in parts for line in part.strip().splitlines()):
        direction, when, *words = line.split()
        backward = {"forward": False, "backward": True}[direction]
        call = 0
        if "call" in words:
            *words, _, number = words
            call = int(number)
        if "-" in when:
            start, end = (at + float(moment) for moment in when.split("-"))
            *name, index, sent_bytes = words
            nbytes = int(sent_bytes), 2 * int(sent_bytes)
            transfers.append(Transfer(" ".join(name), int(index), call, group, backward, start, end, *nbytes))
        else:
            *parts_of_name, index = words if words[-1].isdigit() else [*words, "0"]
            name = " ".join(parts_of_name)
            of_call = call if name in OF_A_CALL else None
            seconds = at + float(when)
            marks.append(Mark(name, int(index), of_call, group, backward, seconds, host_s=seconds))
    return SimpleNamespace(marks=marks, transfers=transfers, idle=None)


def together(*recordings: SimpleNamespace) -> SimpleNamespace:
    """Several recordings as one; each one's times are its own."""
    return SimpleNamespace(
        marks=[mark for one in recordings for mark in one.marks],
        transfers=[transfer for one in recordings for transfer in one.transfers],
        idle=None,
    )


# attention | MLP, shared expert, add behind the tap; 2 before a dispatch, packing 1 before a combine, unpacking 1.
SHAPE = SpanShape(num_ops=4, calls=(RoutedCall(tap=1, landing=3),))
FORWARD_BLOCKING = f"""
    forward  0 {BEGIN}
    forward  0 attention 0
    forward 10 route
    forward 13 encode
    forward 15 wait
    forward 16 start dispatch
    forward 17-27 dispatch 0 500
    forward 27 finish dispatch
    forward 28 experts
    forward 40 start combine
    forward 41-53 combine 0 300
    forward 53 MLP 1
    forward 60 shared expert 2
    forward 66 finish combine
    forward 67 decode
    forward 69 add 3
    forward 70 {END}
"""
FORWARD_OVERLAPPED = f"""
    forward  0 {BEGIN}
    forward  0 attention 0
    forward 10 route
    forward 13 encode
    forward 15 wait
    forward 16 start dispatch
    forward 17-27 dispatch 0 500
    forward 18 MLP 1
    forward 25 shared expert 2
    forward 31 finish dispatch
    forward 32 experts
    forward 44 start combine
    forward 45-57 combine 0 300
    forward 46 finish combine
    forward 58 decode
    forward 60 add 3
    forward 61 {END}
"""
BACKWARD_BLOCKING = f"""
    backward 100 {BEGIN}
    backward 100 add 3
    backward 102 decode
    backward 106 start combine
    backward 107-119 combine 0 500
    backward 119 shared expert 2
    backward 131 MLP 1
    backward 145 finish combine
    backward 147 experts
    backward 171 start dispatch
    backward 172-182 dispatch 0 300
    backward 182 finish dispatch
    backward 183 encode
    backward 186 route
    backward 190 attention 0
    backward 210 {END}
"""
FORWARD_COSTS = PassCosts(
    ops=(10, 7, 6, 1),
    calls=(
        CallCosts(route=3, encode=2, dispatch=10, experts=1 + 12 + 1, combine=12, decode=1 + 2, wait=1 + 1, enqueue=7),
    ),
)
BACKWARD_COSTS = PassCosts(
    ops=(20, 14, 12, 2),
    calls=(CallCosts(route=4, encode=1 + 3, dispatch=10, experts=2 + 24 + 1, combine=12, decode=4 + 1),),
)


def test_a_blocking_forward_by_hand():
    # Of a training step; without any backward, nothing says where training ends and evaluation begins.
    (one,) = passes_of(recording(FORWARD_BLOCKING))
    assert (one.group, one.backward, one.total_s, one.sent_bytes) == (0, False, 70, 800)
    compute = [(span.name, span.start_s, span.end_s) for span in one.spans if span.lane is Lane.COMPUTE]
    assert compute == [
        ("attention", 0, 10),
        ("route", 10, 13),
        ("encode", 13, 15),
        ("wait", 15, 16),
        ("start dispatch", 16, 17),  # then it waits
        ("finish dispatch", 27, 28),
        ("experts", 28, 40),
        ("start combine", 40, 41),
        ("MLP", 53, 60),
        ("shared expert", 60, 66),
        ("finish combine", 66, 67),
        ("decode", 67, 69),
        ("add", 69, 70),
    ]
    assert communication_s(one.spans) == 22
    assert exposed_s(one.spans) == 22  # all of it


def test_an_overlapped_forward_by_hand():
    (one,) = passes_of(recording(FORWARD_OVERLAPPED))
    assert one.total_s == 61
    assert communication_s(one.spans) == 22
    assert exposed_s(one.spans) == 1 + 12  # 17 to 18, while the launch returns; and all of the combine
    last = next(span for span in one.spans if span.name == "finish combine")
    assert (last.start_s, last.end_s) == (57, 58)  # it waited from 46 to 57


def test_costs_of_a_blocking_step_by_hand():
    passes = passes_of(recording(FORWARD_BLOCKING, BACKWARD_BLOCKING))
    assert [one.backward for one in passes] == [False, True]
    assert passes[1].total_s == 110
    assert exposed_s(passes[1].spans) == 22
    costs = costs_of(passes, SHAPE, chunks=1)
    assert costs == SpanCosts(forward=FORWARD_COSTS, backward=BACKWARD_COSTS, forward_runs=1)


def test_a_full_recompute_runs_forward_twice():
    passes = passes_of(
        together(
            recording(FORWARD_BLOCKING),
            recording(FORWARD_BLOCKING, at=100),  # the same forward again, right before its backward
            recording(BACKWARD_BLOCKING, at=100),
        )
    )
    costs = costs_of(passes, SHAPE, chunks=1)
    assert costs == SpanCosts(forward=FORWARD_COSTS, backward=BACKWARD_COSTS, forward_runs=2)


def test_costs_are_medians_over_micro_batches():
    steps = [recording(FORWARD_BLOCKING, BACKWARD_BLOCKING, at=at) for at in (0, 300)]
    late = FORWARD_BLOCKING.replace(f"70 {END}", f"99 {END}")  # a last op that takes 30 s instead of one
    passes = passes_of(together(*steps, recording(late, BACKWARD_BLOCKING, at=600)))
    assert [one.total_s for one in passes] == [70, 110, 70, 110, 99, 110]
    costs = costs_of(passes, SHAPE, chunks=1)
    assert costs == SpanCosts(forward=FORWARD_COSTS, backward=BACKWARD_COSTS, forward_runs=1)


def test_mean_over_ranks():
    one = SpanCosts(forward=FORWARD_COSTS, backward=BACKWARD_COSTS, forward_runs=1)
    other = SpanCosts(forward=BACKWARD_COSTS, backward=FORWARD_COSTS, forward_runs=2)
    mean = mean_costs([one, other])
    assert mean.forward == mean.backward
    assert mean.forward.ops == (15, 10.5, 9, 1.5)
    (call,) = mean.forward.calls
    assert (call.experts, call.dispatch, mean.forward_runs) == (20.5, 10, 1.5)


ONE_CALL = SpanShape(num_ops=2, calls=(RoutedCall(tap=0, landing=1),))


def test_chunks_by_hand():
    (one,) = passes_of(
        recording(f"""
            forward  0 {BEGIN}
            forward  0 route
            forward  2 encode 0
            forward  3 start dispatch 0
            forward  4-8 dispatch 0 1
            forward  8 encode 1
            forward 10 start dispatch 1
            forward 10-16 dispatch 1 2
            forward 16 finish dispatch 0
            forward 16 experts 0
            forward 20 start combine 0
            forward 20-23 combine 0 4
            forward 23 finish dispatch 1
            forward 24 experts 1
            forward 29 start combine 1
            forward 30-35 combine 1 8
            forward 35 shared expert 0
            forward 41 finish combine 0
            forward 41 decode 0
            forward 42 finish combine 1
            forward 43 decode 1
            forward 45 add 1
            forward 46 {END}
        """)
    )
    assert (one.sent_bytes, communication_s(one.spans), exposed_s(one.spans)) == (15, 18, 18)
    costs = costs_of([one, reversed_pass(one)], ONE_CALL, chunks=2)
    assert costs is not None
    call = CallCosts(
        route=2,
        encode=(1 + 2) / 2,
        dispatch=(4 + 6) / 2,
        experts=(4 + 1 + 5 + 1) / 2,
        combine=(3 + 5) / 2,
        decode=(1 + 1 + 2) / 2,
        wait=1,
        enqueue=6,
    )
    assert costs.forward == PassCosts(ops=(6, 1), calls=(call,))


def reversed_pass(one: GroupPass) -> GroupPass:
    """Any backward: costs need one."""
    return GroupPass(one.group, True, (), one.total_s, 0)


def test_two_collectives_at_once_count_once():
    (one,) = passes_of(
        recording(f"""
            forward  0 {BEGIN}
            forward  0 route
            forward  2 encode 0
            forward  3 start dispatch 0
            forward  4-8 dispatch 0 1
            forward  4 encode 1
            forward  5 start dispatch 1
            forward  5-16 dispatch 1 1
            forward  5 shared expert 0
            forward 11 finish dispatch 0
            forward 11 experts 0
            forward 15 start combine 0
            forward 15-20 combine 0 1
            forward 15 finish dispatch 1
            forward 16 experts 1
            forward 21 start combine 1
            forward 21-26 combine 1 1
            forward 21 finish combine 0
            forward 21 decode 0
            forward 22 finish combine 1
            forward 26 decode 1
            forward 28 add 1
            forward 29 {END}
        """)
    )
    assert communication_s(one.spans) == (20 - 4) + (26 - 21)
    assert exposed_s(one.spans) == (16 - 15) + (26 - 22)


def test_both_calls_of_dgmoe_by_hand():
    (one,) = passes_of(
        recording(f"""
            forward  0 {BEGIN}
            forward  0 route
            forward  2 encode
            forward  3 start dispatch
            forward  3-7 dispatch 0 1
            forward  7 finish dispatch
            forward  7 experts
            forward 11 start combine
            forward 11-14 combine 0 2
            forward 14 attention 0
            forward 19 route call 1
            forward 21 encode call 1
            forward 22 start dispatch call 1
            forward 22-28 dispatch 0 4 call 1
            forward 28 finish dispatch call 1
            forward 28 experts call 1
            forward 34 start combine call 1
            forward 34-39 combine 0 8 call 1
            forward 39 finish combine
            forward 39 decode
            forward 40 finish combine call 1
            forward 40 decode call 1
            forward 43 add 1
            forward 44 {END}
        """)
    )
    assert (one.sent_bytes, communication_s(one.spans), exposed_s(one.spans)) == (15, 18, 18)
    shape = SpanShape(num_ops=2, calls=(RoutedCall(tap=0, landing=1), RoutedCall(tap=1, landing=1)))
    costs = costs_of([one, reversed_pass(one)], shape, chunks=1)
    assert costs is not None
    assert costs.forward == PassCosts(
        ops=(5, 1),
        calls=(
            CallCosts(route=2, encode=1, dispatch=4, experts=4, combine=3, decode=1, enqueue=5),
            CallCosts(route=2, encode=1, dispatch=6, experts=6, combine=5, decode=3, enqueue=1),
        ),
    )


def test_a_host_that_is_ahead_of_its_gpu_by_hand():
    """It enqueues an op in half the time that the GPU takes for it."""
    recorded = recording(FORWARD_BLOCKING, BACKWARD_BLOCKING)
    recorded.marks = [dataclasses.replace(mark, host_s=mark.time_s / 2) for mark in recorded.marks]
    costs = costs_of(passes_of(recorded), SHAPE, chunks=1)
    assert costs is not None
    (call,) = costs.forward.calls
    assert call == dataclasses.replace(FORWARD_COSTS.calls[0], enqueue=3.5)
    assert costs.backward == BACKWARD_COSTS
    assert gained_s(costs.forward, SHAPE, Launch.BEHIND) == 2  # of 7 s the lane is busy for 3.5 more
    assert gained_s(FORWARD_COSTS, SHAPE, Launch.BEHIND) == 0  # where the host computes itself


def test_an_attention_at_the_tap_is_measured_in_two_parts():
    """Its core attention is a step of its own in forward, and the host's clock tells what it took to enqueue either."""
    shape = SpanShape(4, (RoutedCall(tap=1, landing=3),), attentions=frozenset({0, 1}))
    in_two = "forward 53 attention 1\n    forward 58 core attention 1\n"
    forward = FORWARD_BLOCKING.replace("forward 53 MLP 1\n", in_two)
    recorded = recording(forward, BACKWARD_BLOCKING)
    recorded.marks = [dataclasses.replace(mark, host_s=mark.time_s / 2) for mark in recorded.marks]
    costs = costs_of(passes_of(recorded), shape, chunks=1)
    assert costs is not None
    (call,) = costs.forward.calls
    assert (costs.forward.ops, costs.forward.cores) == (FORWARD_COSTS.ops, {1: 2})
    assert (call.enqueue, call.enqueue_core) == (3.5, 1)
    assert costs.backward == BACKWARD_COSTS
    # Of the 5 s of its projections the lane is busy for 2.5 more, of all 7 s for 3.5 more.
    assert gained_s(costs.forward, shape, Launch.WITHIN) == gained_s(costs.forward, shape, Launch.BEHIND) == 2
    waits_longer = dataclasses.replace(costs.forward, calls=(dataclasses.replace(call, wait=9),))
    assert gained_s(waits_longer, shape, Launch.WITHIN) == 2.5 and gained_s(waits_longer, shape, Launch.BEHIND) == 3.5
    assert mean_costs([costs, costs]) == costs


def test_a_launch_aside_by_hand():
    """Its transfer begins beside the op at the tap, before the compute lane comes to where the host launched it."""
    aside = FORWARD_OVERLAPPED.replace("forward 15 wait\n", "").replace("forward 16 start dispatch\n", "")
    behind = "    forward 25 wait\n    forward 25 start dispatch\n"
    aside = aside.replace("forward 18 MLP 1\n", "forward 18 MLP 1\n" + behind)
    (one,) = passes_of(recording(aside))
    times = {span.name: (span.start_s, span.end_s) for span in one.spans}
    assert times["start dispatch"] == (25, 25) and times["dispatch"] == (17, 27)
    assert all(start_s <= end_s for start_s, end_s in times.values())


def test_a_transfer_that_seems_to_end_before_its_begin_took_no_time():
    """Marks of two GPU streams may be that far off; a negative cost would be an error on this rank alone."""
    before = FORWARD_BLOCKING.replace("17-27 dispatch", "17-16.9 dispatch")
    costs = costs_of(passes_of(recording(before, BACKWARD_BLOCKING)), SHAPE, chunks=1)
    assert costs is not None and costs.forward.calls[0].dispatch == 0
    assert costs.backward == BACKWARD_COSTS


def test_an_unfinished_pass_is_dropped():
    """Where no gradient reaches the group's input, its backward has no end; a new one must not continue it."""
    unfinished = BACKWARD_BLOCKING.replace(f"backward 210 {END}", "")
    passes = passes_of(recording(FORWARD_BLOCKING, unfinished))
    assert [one.backward for one in passes] == [False]
    assert costs_of(passes, SHAPE, chunks=1) is None
    whole = recording(FORWARD_BLOCKING, BACKWARD_BLOCKING, at=300)
    passes = passes_of(together(recording(FORWARD_BLOCKING, unfinished), whole))
    assert [(one.backward, one.total_s) for one in passes] == [(False, 70), (False, 70), (True, 110)]


def test_evaluation_behind_the_last_backward_is_dropped():
    step = recording(FORWARD_BLOCKING, BACKWARD_BLOCKING)
    evaluation = recording(FORWARD_OVERLAPPED, at=300)
    assert passes_of(together(step, evaluation)) == passes_of(step)


def test_groups_do_not_mix():
    """The second group runs between the first one's forward and its backward, and their transfers have equal names."""
    first_forward, first_backward = recording(FORWARD_BLOCKING), recording(BACKWARD_BLOCKING, at=300)
    second = recording(FORWARD_OVERLAPPED, BACKWARD_BLOCKING, group=1, at=80)
    passes = passes_of(together(first_forward, second, first_backward))
    assert [(one.group, one.backward, one.total_s) for one in passes] == [
        (0, False, 70),
        (1, False, 61),
        (1, True, 110),
        (0, True, 110),
    ]
    assert [one.sent_bytes for one in passes] == [800] * 4


# ---- what is measured is what the solver reckons with -----------------------------------------------------------


def simulated(shape: SpanShape, costs: SpanCosts, plan: Plan, group: int = 0) -> list[GroupPass]:
    """The passes of a span whose ops cost exactly that, as they would be measured."""
    passes = []
    for backward in (False, True):
        spans = schedule(shape, costs.backward if backward else costs.forward, plan, backward=backward)
        total_s = max(span.end_s for span in spans)
        at_taps = [] if backward else list(zip(shape.calls, costs.forward.calls, strict=True))
        host_s = {
            "enqueue_s": {call.tap: its.enqueue for call, its in at_taps},
            "enqueue_core_s": {call.tap: its.enqueue_core for call, its in at_taps},
        }
        passes.append(GroupPass(group, backward, tuple(spans), total_s, 0, **host_s))
    return passes


@st.composite
def shapes(draw):
    """Spans of up to five ops and three calls, some of which land behind the end of their group."""
    num_ops = draw(st.integers(1, 5))
    calls = []
    for tap in sorted(draw(st.lists(st.integers(0, num_ops - 1), min_size=1, max_size=3))):
        late = tap < num_ops - 1 and draw(st.booleans())
        calls.append(RoutedCall(tap, draw(st.integers(tap + late, num_ops - 1)), late))
    return SpanShape(num_ops, tuple(calls), attentions=draw(st.frozensets(st.integers(0, num_ops - 1))))


@st.composite
def worlds(draw):
    shape = draw(shapes())
    seconds = st.integers(0, 99)
    call = st.builds(CallCosts, **dict.fromkeys(("route", *CHUNK_OPS), seconds))
    one_pass = st.builds(
        PassCosts, ops=st.tuples(*[seconds] * shape.num_ops), calls=st.tuples(*[call] * len(shape.calls))
    )
    costs = draw(st.builds(SpanCosts, forward=one_pass, backward=one_pass))
    enqueue = draw(st.tuples(*[seconds] * shape.num_ops))
    enqueue_core = {at: draw(st.integers(0, enqueue[at])) for at in shape.cut}
    calls = tuple(
        dataclasses.replace(
            its, wait=draw(seconds), enqueue=enqueue[call.tap], enqueue_core=enqueue_core.get(call.tap, 0)
        )
        for call, its in zip(shape.calls, costs.forward.calls, strict=True)
    )
    cores = {at: draw(st.integers(0, costs.forward.ops[at])) for at in shape.cut}
    return shape, dataclasses.replace(costs, forward=dataclasses.replace(costs.forward, calls=calls, cores=cores))


@given(world=worlds(), chunks=st.sampled_from((1, 2, 4)))
def test_a_sequential_timeline_gives_its_costs_back(world, chunks):
    shape, costs = world
    assert costs_of(simulated(shape, costs, sequential_plan(shape, chunks)), shape, chunks) == costs


# ---- on ranks, with known times ---------------------------------------------------------------------------------

FORWARD_S = {"attention 0": 0.06, "MLP 1": 0.09, "attention 2": 0.12, "shared expert 3": 0.15, "experts": 0.08}
BACKWARD_S = {"attention 0": 0.15, "MLP 1": 0.12, "attention 2": 0.09, "shared expert 3": 0.06, "experts": 0.11}
DISPATCH_S, COMBINE_S = {False: 0.10, True: 0.16}, {False: 0.14, True: 0.07}


TIMED_STEPS = 3
SHAPE_OF_POS2 = SpanShape(5, (RoutedCall(tap=1, landing=4),))


class TimedWork:
    """A collective that is done some seconds after its launch, for who waits and for who asks for its future."""

    def __init__(self, work: dist.Work, seconds: float) -> None:
        self._work = work
        self._future: torch.futures.Future[None] = torch.futures.Future()
        threading.Timer(seconds, self._land).start()

    def _land(self) -> None:
        self._work.wait()
        self._future.set_result(None)

    def get_future(self) -> torch.futures.Future:
        return self._future

    def wait(self) -> None:
        self._future.wait()


@contextlib.contextmanager
def timed_collectives(seconds: list[float]) -> Iterator[None]:
    """Let each all-to-all of a step, in the order of their launch, take its seconds."""
    original, left = dist.all_to_all_single, iter(seconds)
    dist.all_to_all_single = lambda *args, **kwargs: TimedWork(original(*args, **kwargs), next(left))
    try:
        yield
    finally:
        dist.all_to_all_single = original
    assert next(left, None) is None


def timed_step(case: Case, chunks: int) -> SpanCosts | None:
    """What a few steps under the sequential plan are measured to cost, when their ops take the times above."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    group = model.decoder.layers[-1]
    group.span.plan = sequential_plan(group.span.shape, chunks)
    ((tokens, labels, positions),) = models.my_batch()
    model(tokens, positions, None, labels=labels).sum().backward()  # the first one is slow
    slow = {
        "attention 0": model.decoder.layers[0].self_attention,
        "MLP 1": model.decoder.layers[0].mlp,
        "attention 2": group.self_attention,
        "shared expert 3": group.mlp.shared_experts,
        "experts": group.mlp.experts,
    }
    for name, module in slow.items():
        module.register_forward_pre_hook(lambda *_, name=name: time.sleep(FORWARD_S[name]))
        module.register_full_backward_pre_hook(lambda *_, name=name: time.sleep(BACKWARD_S[name]))
    recordings = []
    forward = [DISPATCH_S[False]] * chunks + [COMBINE_S[False]] * chunks
    backward = [COMBINE_S[True]] * chunks + [DISPATCH_S[True]] * chunks
    for _ in range(TIMED_STEPS):
        dist.barrier()
        with observe.recording() as recorded, timed_collectives(forward + backward):
            model(tokens, positions, None, labels=labels).sum().backward()
        recordings.append(recorded)
    return costs_of([one for recorded in recordings for one in passes_of(recorded)], group.span.shape, chunks)


def about(seconds: float) -> tuple[float, float]:
    """Bounds of a measured time: a sleep is never shorter, and on a busy machine a bit longer."""
    return 0.97 * seconds, 1.3 * seconds + 0.02


@pytest.mark.alone
@pytest.mark.parametrize("chunks", [1, 2])
def test_known_times_are_measured(chunks):
    """Each op by itself, so that none is taken for its neighbour: the times differ by more than the bounds."""
    case = Case(num_groups=1, expert_slot=(1,), chunks=chunks)
    for costs in ranks.run(timed_step, 2, case, chunks, layout=EP2):
        assert costs is not None
        assert costs.forward_runs == 1
        for measured, known, backward in ((costs.forward, FORWARD_S, False), (costs.backward, BACKWARD_S, True)):
            expected = [*known.values(), DISPATCH_S[backward], COMBINE_S[backward]]
            (call,) = measured.calls
            *dense, add = measured.ops
            got = [*dense, call.experts, call.dispatch, call.combine]
            for seconds, one in zip(expected, got, strict=True):
                low, high = about(seconds)
                assert low < one < high, (expected, got)
            for cheap in (call.route, call.encode, call.decode, add):
                assert 0 < cheap < 0.03
            assert (call.wait, call.enqueue) == ((0, 0) if backward else (call.wait, pytest.approx(dense[1])))
            assert call.wait < 0.03
            assert gained_s(measured, SHAPE_OF_POS2, Launch.BEHIND) < 1e-9  # the host computes


def hooks_of_a_step(case: Case, listen: bool) -> tuple[int, int, int]:
    """Tensor hooks that a step adds, what a recording of it heard, and listeners that are left."""
    from megatron_scmoe.overlap import observe

    model = models.build(case)
    hooks = 0
    original = torch.Tensor.register_hook

    def counted(tensor, hook):
        nonlocal hooks
        hooks += 1
        return original(tensor, hook)

    torch.Tensor.register_hook = counted
    ((tokens, labels, positions),) = models.my_batch()
    heard = 0
    with observe.recording() if listen else contextlib.nullcontext() as recorded:
        model(tokens, positions, None, labels=labels).sum().backward()
    if recorded is not None:
        heard = len(recorded.marks) + len(recorded.transfers) + len(recorded.loads)
    return hooks, heard, len(observe._listeners)


def test_nothing_is_added_while_nobody_listens():
    for case in (Case(), Case(shortcut="dgmoe", chunks=2)):
        assert ranks.run(hooks_of_a_step, 2, case, False, layout=EP2) == [(0, 0, 0)] * 2
        for hooks, heard, listeners in ranks.run(hooks_of_a_step, 2, case, True, layout=EP2):
            assert (
                hooks > 10 and heard > hooks and listeners == 0
            )  # negative control: they are seen where there are any


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_transfer_begins_before_its_launch_and_its_end_is_noted(monkeypatch, on_gpu):
    """A fake clock, and a launch of 10 s behind which the transfer is over, as a short one on a GPU may be.

    On a GPU nobody listens before the wait, 5 s later: with one CUDA queue, what is launched behind a listener would
    wait for the transfer. What arrives is held by nobody then.
    """
    from megatron_scmoe.dispatch import exchange
    from megatron_scmoe.overlap import observe, recording

    now_s, works = 1.0, []

    class Work:
        def __init__(self):
            self.future: torch.futures.Future[None] = torch.futures.Future()
            self.future.set_result(None)
            works.append(weakref.ref(self))

        def get_future(self):
            return self.future

        def wait(self):
            pass

    def launch(*_args, **_kwargs):
        nonlocal now_s
        now_s += 10
        return Work()

    monkeypatch.setattr(recording.Moment, "now", classmethod(lambda cls: cls(now_s, None)))
    monkeypatch.setattr(exchange.dist, "all_to_all_single", launch)
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    tag = exchange.Tag(observe.Marker(0), "dispatch")
    with observe.recording() as recorded, monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: on_gpu)
        patch.setattr(torch.cuda, "current_stream", lambda: None)
        patch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
        one = exchange.Exchange(tag=tag, group=group, blocking=False)
        token = one.announce(torch.zeros(4, 2))
        one.launch(None, None)
        now_s += 5
        one.finish(token)
    assert works[0]() is None
    (transfer,) = recorded.transfers
    assert transfer.end_s - transfer.start_s == pytest.approx(15 if on_gpu else 10)


class Untouchable:
    """Stands for a tensor that may not be looked at."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")


def test_a_mark_without_a_listener_looks_at_nothing():
    from megatron_scmoe.overlap import observe

    marker, tensor = observe.Marker(0), Untouchable()
    marker.now("attention")
    marker.in_backward("attention", tensor)
    assert marker.moment() is None
    marker.transfer(tensor, None, "dispatch", 0, (1, 1), call=0, backward=False)
    marker.load(tensor, tensor, 1)
    with observe.recording(), pytest.raises(AssertionError, match="was asked for"):
        marker.in_backward("attention", tensor)
    assert observe._listeners == []
