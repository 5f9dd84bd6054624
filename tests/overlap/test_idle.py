"""When the compute lane may have had nothing enqueued: found by events and the host's clock on a simulated device.

The device is a queue with a clock of its own; what it really did is known to it alone, and compared.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scmoe.overlap import observe, recording
from megatron_scmoe.overlap.costs import GroupPass, passes_of
from megatron_scmoe.overlap.observe import BEGIN, END
from megatron_scmoe.overlap.spans import Interval, intersection, length, union

US, MS = 1e-6, 1e-3
LAUNCH_S = 6 * US  # from the host's call to the device
CALL_S = 2 * US  # that a call takes the host
SEEN_S = 20 * US  # until a waiting host notices
TOLERANCE_S = 2 * (LAUNCH_S + CALL_S)  # of one gap


class Device:
    """One stream of a GPU, and the host that launches into it; times in seconds of one clock that neither shows."""

    def __init__(self) -> None:
        self.host_s = 1000.0
        self.free_s = 0.0
        self.busy: list[Interval] = []
        self.synchronised = 0

    def launch(self, work_s: float) -> None:
        """A kernel."""
        start_s = max(self.free_s, self.host_s + LAUNCH_S)
        self.free_s = start_s + work_s
        self.busy.append((start_s, self.free_s))
        self.host_s += CALL_S

    def wait_for(self, reached_s: float) -> None:
        """The host waits until the device has got there."""
        self.host_s = max(self.host_s, reached_s + SEEN_S)

    def idle(self, start_s: float, end_s: float) -> list[Interval]:
        """When it really had nothing to do."""
        edges = [start_s, *(edge for one in union(self.busy) for edge in one), end_s]
        return intersection([(start_s, end_s)], union(zip(edges[::2], edges[1::2], strict=True)))


class Event:
    """A CUDA event on ``device``, which is set for each test."""

    device: Device

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.reached_s = math.inf

    def record(self) -> None:
        device = self.device
        self.reached_s = device.free_s = max(device.free_s, device.host_s + LAUNCH_S)
        device.host_s += CALL_S

    def query(self) -> bool:
        return self.reached_s <= self.device.host_s

    def synchronize(self) -> None:
        self.device.synchronised += 1
        self.device.wait_for(self.reached_s)

    def elapsed_time(self, other: Event) -> float:
        if not (self.query() and other.query()):
            raise RuntimeError("not ready")
        return (other.reached_s - self.reached_s) * 1e3


@pytest.fixture
def device(monkeypatch) -> Device:
    return on_device(monkeypatch)


def on_device(patch: pytest.MonkeyPatch) -> Device:
    Event.device = device = Device()
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(recording, "time", SimpleNamespace(perf_counter=lambda: device.host_s))
    return device


# What the host does: a kernel of so many seconds, so many seconds of its own, or a wait for all that it launched.
type Action = tuple[str, float]
NOTHING = torch.zeros(0)


def run_pass(device: Device, ops: list[list[Action]]) -> tuple[GroupPass, float, Interval]:
    """A pass whose ops do these things, when its recording began, and from when to when it lay on the device."""
    marker = observe.Marker(0)
    with observe.recording() as recorded:
        marker.now(BEGIN)
        for index, op in enumerate(ops):
            marker.now("op", index)
            for what, seconds in op:
                if what == "kernel":
                    device.launch(seconds)
                elif what == "host":
                    device.host_s += seconds
                else:  # behind it nothing is launched, as where a host waits for counts
                    marker.in_backward("op", NOTHING, index)
                    device.wait_for(device.free_s)
        marker.now(END)
    (one,) = passes_of(recorded)
    began_s = recorded._began.event.reached_s
    marks = [began_s + mark.time_s for mark in recorded.marks]
    return one, began_s, (marks[0], marks[-1])


def found_and_true(device: Device, ops: list[list[Action]]) -> tuple[list[Interval], list[Interval]]:
    """When the lane may have been idle by the recording, and when it was, both on the device's clock."""
    one, began_s, of_pass = run_pass(device, ops)
    assert one.idle is not None
    return [(began_s + start_s, began_s + end_s) for start_s, end_s in one.idle], device.idle(*of_pass)


AHEAD: list[list[Action]] = [[("kernel", MS)] * 3] * 6
LATE_BUT_AHEAD: list[list[Action]] = [[("host", 45 * MS), ("kernel", MS)], *AHEAD]


def of_a_busy_device(patch: pytest.MonkeyPatch, ops: list[list[Action]]) -> tuple[list[Interval], list[Interval]]:
    """``found_and_true`` where the device has 50 ms to do when the recording begins, so that it never runs dry."""
    device = on_device(patch)
    device.launch(50 * MS)
    return found_and_true(device, ops)


@pytest.mark.parametrize("ops", [AHEAD, LATE_BUT_AHEAD])
def test_a_host_that_is_ahead_leaves_nothing_idle(monkeypatch, ops):
    found, true = of_a_busy_device(monkeypatch, ops)
    assert length(true) < 1e-9 and found == []


@pytest.mark.parametrize("bound", ["the host's begin", "nothing is early"])
def test_the_clocks_have_to_be_compared(monkeypatch, bound):
    """Negative controls: the device begins when the host does; it is only asked that nothing is early."""
    if bound == "nothing is early":
        monkeypatch.setattr(recording, "WAKE_S", 1.0)
    else:
        monkeypatch.setattr(recording.Recording, "_device_began_s", lambda self: self._began.host_s)
    found, true = of_a_busy_device(monkeypatch, LATE_BUT_AHEAD)
    assert length(true) < 1e-9 and length(found) > MS


def test_a_host_that_waits_leaves_the_lane_idle(device):
    """It waits for counts behind a short kernel, and then needs 150 us to launch what comes next."""
    ops: list[list[Action]] = [
        [("kernel", 2 * MS)],
        [("kernel", 100 * US), ("wait", 0.0), ("host", 150 * US)],
        [("kernel", 2 * MS)],
        [("kernel", 2 * MS)],
    ]
    found, true = found_and_true(device, ops)
    assert 150 * US < length(true) < 150 * US + SEEN_S + 5 * TOLERANCE_S
    assert length(found) == pytest.approx(length(true), abs=3 * TOLERANCE_S)


def test_without_the_end_of_a_step_its_work_would_count_as_idle(device, monkeypatch):
    """Negative control: the kernel before the wait."""
    monkeypatch.setattr(observe.Marker, "in_backward", lambda *_args: None)
    found, true = found_and_true(device, [[("kernel", 100 * US), ("wait", 0.0), ("host", 150 * US)]] * 3)
    assert length(found) - length(true) > 3 * 80 * US


def test_kernels_each_just_in_time_are_not_told_from_none(device):
    """What it cannot tell: the bound is the whole of an op that the host launches slowly."""
    found, true = found_and_true(device, [[("kernel", 40 * US), ("host", 48 * US)] * 10])
    assert length(found) > 450 * US and length(true) < 200 * US


ACTIONS = st.one_of(
    st.tuples(st.just("kernel"), st.floats(0, 500 * US)),
    st.tuples(st.just("host"), st.floats(0, 500 * US)),
    st.tuples(st.just("wait"), st.just(0.0)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(ACTIONS, max_size=5), min_size=1, max_size=8), st.floats(0, 5 * MS))
def test_the_lane_is_never_idle_outside_of_what_is_found(ops, backlog_s):
    with pytest.MonkeyPatch.context() as patch:
        device = on_device(patch)
        device.launch(backlog_s)
        found, true = found_and_true(device, ops)
    missed = length(true) - length(intersection(true, union(found)))
    gaps = sum(len(op) for op in ops) + 3 * len(ops) + 3  # each begins a launch after the host's call
    assert missed <= gaps * TOLERANCE_S
    assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(found))


@pytest.mark.parametrize("reads", ["events one by one", "one event"])
def test_a_recording_waits_for_the_device_once(device, monkeypatch, reads):
    """Negative control: the way it was, each event waited for."""
    if reads == "events one by one":
        seconds = recording.Recording._seconds

        def waiting(self, moment):
            moment.event.synchronize()
            return seconds(self, moment)

        monkeypatch.setattr(recording.Recording, "_seconds", waiting)
    run_pass(device, AHEAD * 10)
    assert device.synchronised == 1 if reads == "one event" else device.synchronised > 60


def test_a_transfer_whose_end_is_late_is_waited_for(device):
    """It lies on a stream of its own. What the compute lane has behind is not read before it is there."""
    with observe.recording() as recorded:
        begin = recording.Moment.now()
        late = recording.Moment(device.host_s, Event(enable_timing=True))
        late.event.reached_s = device.host_s + MS
        recorded.launch(recording.Flying("dispatch", 0, 0, 0, False, begin, 1, 1, end=late))
        assert not late.event.query()
    assert device.synchronised == 1
    (transfer,) = recorded.transfers
    assert device.synchronised == 2
    assert transfer.end_s - transfer.start_s == pytest.approx(MS, abs=TOLERANCE_S)
    assert recorded.transfers == [transfer] and device.synchronised == 2


def test_without_a_gpu_it_is_not_known():
    """There the device is the host, which is never late for itself."""
    marker = observe.Marker(0)
    with observe.recording() as recorded:
        for name in (BEGIN, "op", END):
            marker.now(name)
    assert recorded.idle is None
    (one,) = passes_of(recorded)
    assert one.idle is None


def test_passes_get_the_idle_times_that_begin_in_them(device):
    """Those between two passes belong to none."""
    marker = observe.Marker(0)
    with observe.recording() as recorded:
        for backward in (False, True):
            marker.now(BEGIN, backward=backward)
            device.launch(100 * US)
            device.host_s += 400 * US
            marker.now(END, backward=backward)
            device.host_s += 2 * MS
    forward, backward = passes_of(recorded)
    assert recorded.idle is not None and forward.idle and backward.idle
    assert len(recorded.idle) == len(forward.idle) + len(backward.idle) + 1
    for one in (forward, backward):
        assert length(one.idle) == pytest.approx(400 * US, abs=3 * TOLERANCE_S)
    assert length(recorded.idle) > 2 * MS
