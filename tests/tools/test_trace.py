"""tools/trace.py: a trace that opens, whose lanes do not overlap, from a real report and from hand-made lines."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import ranks
import training
from training import ROOT, SCMOE, with_flags

TOOL = ROOT / "tools" / "trace.py"
sys.path.append(str(TOOL.parent))  # last: not to be taken for the standard library's `trace`
_spec = importlib.util.spec_from_file_location("overlap_trace", TOOL)  # the standard library has a `trace` too
assert _spec is not None and _spec.loader is not None
tool = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = tool
_spec.loader.exec_module(tool)

REQUIRED = {
    "X": {"name", "ph", "ts", "dur", "pid", "tid"},
    "M": {"name", "ph", "pid", "args"},
    "i": {"name", "ph", "ts"},
}
TID = {"compute": 1, "communication": 2}
IDLE_TID = 3


def span(
    name: str, lane: str, start_s: float, end_s: float, *, backward: bool = False, at: int = 0, call: int | None = None
) -> dict:
    where = {"at": at, "call": call}
    return {"name": name, "lane": lane, "start_s": start_s, "end_s": end_s, "backward": backward} | where


def of_call(name: str, lane: str, start_s: float, end_s: float, *, call: int = 0, **where: Any) -> dict:
    """A span of a routed call, the first one unless another is named."""
    return span(name, lane, start_s, end_s, call=call, **where)


def line(
    iteration: int, rank: int, *spans: dict, group: int = 0, backward: bool = False, idle: list | None = None
) -> dict[str, Any]:
    """A line of a report with one pass; without spans it has none."""
    one = {"group": group, "backward": backward, "spans": list(spans), "total_s": 1.0, "sent_bytes": 77, "idle": idle}
    return {"iteration": iteration, "rank": rank, "groups": [], "passes": [one] if spans else []}


def write_report(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for one in lines:
        with (folder / f"rank{one['rank']:05d}.jsonl").open("a") as file:
            file.write(json.dumps(one) + "\n")
    return folder


def traced(folder: Path, *words: str) -> dict[str, Any]:
    """The trace of a report, as the command line makes it."""
    assert tool.main([str(folder), "--overwrite", *words]) == 0
    return json.loads((folder / "trace.json").read_text())


def spans_of(trace: dict[str, Any], rank: int, lane: str) -> list[dict[str, Any]]:
    events = trace["traceEvents"]
    return [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (rank, TID[lane])]


def times(events: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]


def overlaps(trace: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of neighbours on one lane of which one begins before the other has ended."""
    lanes = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            # Whole nanoseconds, as they were measured: microseconds with a fraction do not add up exactly.
            begin, duration = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
            lanes[event["pid"], event["tid"]].append((begin, begin + duration, event["name"]))
    pairs = (pair for events in lanes.values() for pair in itertools.pairwise(sorted(events)))
    return [(one[2], other[2]) for one, other in pairs if other[0] < one[1]]


def opens(trace: dict[str, Any]) -> None:
    """Every event has what the format asks for."""
    assert trace["displayTimeUnit"] == "ms"
    assert trace["traceEvents"]
    for event in trace["traceEvents"]:
        assert REQUIRED[event["ph"]] <= event.keys(), event
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0, event


# ---- a real report ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Of two ranks, whose tokens travel in two chunks: two collectives are under way at once."""
    folder = tmp_path_factory.mktemp("report") / "report"
    flags = with_flags(SCMOE, "--expert-model-parallel-size 2", "--train-iters 5", "--overlap-chunks 2")
    printed = ranks.run(training.train, 2, with_flags(flags, f"--overlap-report {folder}"))
    assert "exit code" not in printed[0], printed[0][-3000:]
    return folder


def test_a_real_report(report):
    trace = traced(report)
    opens(trace)
    assert overlaps(trace) == []
    lines = [json.loads(text) for text in (report / "rank00001.jsonl").read_text().splitlines()]
    recorded = [one for one in lines for one in one["passes"]]
    for lane in TID:
        spans = [one for one_pass in recorded for one in one_pass["spans"] if one["lane"] == lane]
        assert len(spans_of(trace, 1, lane)) == len(spans) > 0
    steps = {event["args"]["step"] for event in spans_of(trace, 0, "compute")}
    assert steps == {2, 3, 4, 5}  # all but the first: the epilog says so
    dispatch = next(event for event in spans_of(trace, 1, "communication") if event["name"] == "dispatch backward")
    assert dispatch["args"].keys() == {
        *("step", "group", "backward", "call", "chunk", "sent_bytes_of_pass", "launched_us"),
    }
    assert dispatch["args"]["launched_us"] <= dispatch["ts"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert names == {(rank, tid): lane for rank in (0, 1) for lane, tid in TID.items()}
    assert {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"} == {"rank 0", "rank 1"}


def test_overlaps_would_be_noticed(tmp_path):
    """Negative control: drawn as they were launched, collectives overlap, and nothing else does."""
    transfers = [of_call("dispatch", "communication", 0.001 * at, 0.001 * at + 0.003, at=at) for at in (0, 2, 5)]
    trace = traced(write_report(tmp_path / "r", line(2, 0, *transfers, span("MLP", "compute", 0.0, 0.01))))
    assert overlaps(trace) == []
    for event in spans_of(trace, 0, "communication"):
        event["dur"] += event["ts"] - event["args"]["launched_us"]
        event["ts"] = event["args"]["launched_us"]
    assert overlaps(trace) == [("dispatch", "dispatch")]


def test_chosen_steps_alone(report):
    trace = traced(report, "--steps", "3")
    opens(trace)
    assert {event["args"]["step"] for event in trace["traceEvents"] if event["ph"] == "X"} == {3}


def test_chosen_ranks_alone(report):
    everyone, one = traced(report), traced(report, "--ranks", "1")
    opens(one)
    assert {event["pid"] for event in one["traceEvents"]} == {1}
    assert times(spans_of(one, 1, "compute")) and spans_of(everyone, 0, "compute")


def test_what_is_not_drawn_is_not_kept(report):
    assert tool.read_report(report, steps=[3]).keys() == {3} < tool.read_report(report).keys()
    assert tool.read_report(report, ranks=[1])[3].keys() == {1} < tool.read_report(report)[3].keys()


# ---- by hand ----------------------------------------------------------------------------------------------------


def test_times_and_arguments_by_hand(tmp_path):
    folder = write_report(
        tmp_path / "report",
        line(
            2,
            0,
            of_call("route", "compute", 0.001, 0.002),
            of_call("encode", "compute", 0.002, 0.003, at=1),
            span("MLP", "compute", 0.003, 0.006, at=1),
            of_call("dispatch", "communication", 0.003, 0.005),
            of_call("dispatch", "communication", 0.004, 0.007, at=1),
            of_call("combine", "communication", 0.005, 0.0065, at=2),
            group=3,
        ),
        line(2, 1, span("add", "compute", 0.0, 0.010, at=4, backward=True), backward=True),
        line(3, 0),  # a step without spans
        line(7, 0, span("MLP", "compute", 0.001, 0.004, at=1)),
    )
    trace = traced(folder)
    opens(trace)
    step_7 = 10_000 + 1_000  # behind the longest rank of the step before it, and a gap
    assert times(spans_of(trace, 0, "compute")) == [
        ("route", 1000, 2000),
        ("encode", 2000, 3000),
        ("MLP", 3000, 6000),
        ("MLP", step_7 + 1000, step_7 + 4000),
    ]
    assert times(spans_of(trace, 1, "compute")) == [("add backward", 0, 10_000)]
    # By their ends; each begins where the one before it ended.
    assert times(spans_of(trace, 0, "communication")) == [
        ("dispatch", 3000, 5000),
        ("combine", 5000, 6500),
        ("dispatch", 6500, 7000),
    ]
    common = {"step": 2, "group": 3, "backward": False}
    assert [event["args"] for event in spans_of(trace, 0, "compute")][:3] == [
        common | {"call": 0},
        common | {"call": 0, "chunk": 1},
        common | {"dense_op": 1},
    ]
    assert [event["args"]["dense_op"] for event in spans_of(trace, 1, "compute")] == [4]
    assert [event["args"] for event in spans_of(trace, 0, "communication")] == [
        common | {"call": 0, "chunk": 0, "sent_bytes_of_pass": 77, "launched_us": 3000},
        common | {"call": 0, "chunk": 2, "sent_bytes_of_pass": 77, "launched_us": 5000},
        common | {"call": 0, "chunk": 1, "sent_bytes_of_pass": 77, "launched_us": 4000},
    ]
    markers = [(event["name"], event["ts"]) for event in trace["traceEvents"] if event["ph"] == "i"]
    assert markers == [("step 2", 0), ("step 7", step_7)]


def test_calls_have_their_number_in_their_names_where_there_are_several(tmp_path):
    first = [of_call("experts", "compute", 0.0, 0.001), of_call("combine", "communication", 0.001, 0.002)]
    second = [
        of_call("route", "compute", 0.001, 0.002, call=1),
        of_call("dispatch", "communication", 0.002, 0.003, call=1, at=3),
    ]
    op = span("attention", "compute", 0.002, 0.003, at=2)
    steps = line(2, 0, *first, *second, op, backward=True), line(3, 0, *first, op)
    folder = write_report(tmp_path / "r", *steps)
    compute, communication = (spans_of(traced(folder), 0, lane) for lane in TID)
    assert [event["name"] for event in compute] == [
        *("experts call 0 backward", "route call 1 backward", "attention backward"),
        *("experts", "attention"),  # of a step with one call
    ]
    assert [event["name"] for event in communication] == [
        *("combine call 0 backward", "dispatch call 1 backward"),
        "combine",
    ]
    where = [{name: event["args"].get(name) for name in ("call", "chunk", "dense_op")} for event in compute[:3]]
    assert where == [
        {"call": 0, "chunk": 0, "dense_op": None},
        {"call": 1, "chunk": None, "dense_op": None},
        {"call": None, "chunk": None, "dense_op": 2},
    ]
    assert [event["args"]["call"] for event in communication] == [0, 1, 0]


def test_idle_times_have_a_lane_where_they_are_known(tmp_path):
    """As on a GPU; the real report above has none."""
    op = span("attention", "compute", 0.0, 0.004)
    known = line(2, 1, op, idle=[[0.001, 0.0025], [0.003, 0.003]], group=3, backward=True)
    trace = traced(write_report(tmp_path / "r", line(2, 0, op), known))
    opens(trace)
    idle = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["tid"] == IDLE_TID]
    assert [(event["pid"], *times([event])[0]) for event in idle] == [
        (1, "nothing enqueued backward", 1000, 2500),
        (1, "nothing enqueued backward", 3000, 3000),
    ]
    assert idle[0]["args"] == {"step": 2, "group": 3, "backward": True}
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert names == {*TID, "nothing enqueued"}


def test_a_step_that_was_written_twice_counts_as_written_last(tmp_path):
    """A run that is resumed trains some steps again."""
    first, second = (line(2, 0, span("MLP", "compute", 0.0, end)) for end in (0.001, 0.002))
    assert times(spans_of(traced(write_report(tmp_path / "r", first, second)), 0, "compute")) == [("MLP", 0, 2000)]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_torn_line_is_left_out_with_a_warning(tmp_path, capsys, resumed):
    folder = write_report(tmp_path / "r", line(2, 0, span("MLP", "compute", 0.0, 0.001)))
    with (folder / "rank00000.jsonl").open("a") as file:
        file.write(json.dumps(line(3, 0, span("MLP", "compute", 0.0, 0.001)))[:-20])
    if resumed:
        from megatron_scmoe.report.files import ReportFile

        ReportFile(folder, 0).write(4, [], [])
    trace = traced(folder)
    assert {event["args"]["step"] for event in spans_of(trace, 0, "compute")} == {2}
    assert "rank00000.jsonl line 2 is torn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([5], "5"),
        ([2, 4], "2, 4"),
        ([1, 2, 3, 4], "1 to 4"),
        ([2, 3, 10, 20, 30, 40, 41], "2, 3, 10 to 40 by 10, 41"),
    ],
)
def test_steps_in_few_words(steps, words):
    assert tool.described(reversed(steps)) == words


# ---- errors -----------------------------------------------------------------------------------------------------


def run_tool(*words: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def refused(capsys, *words: object) -> str:
    """What the tool says, in one line, when it refuses."""
    try:
        code = tool.main([*map(str, words)])
    except SystemExit as error:
        code = error.code
    (message,) = capsys.readouterr().err.splitlines()
    assert code == 2 and message.startswith("trace.py: error: "), (code, message)
    return message


GOOD = line(2, 0, span("MLP", "compute", 0.0, 0.001))
OLDER = {"name": "MLP", "lane": "compute", "start_s": 0.0, "end_s": 0.001, "backward": False, "chunk": 1}


def test_bad_requests(tmp_path, capsys):
    folder = write_report(tmp_path / "r", GOOD, line(4, 0), line(6, 0, span("MLP", "compute", 0.0, 0.001)))
    assert "no spans of step 4, 9: there are those of 2, 6" in refused(capsys, folder, "--steps", 9, 4, 2)
    assert "no report of rank 3, 7: there are those of 0" in refused(capsys, folder, "--ranks", 7, 0, 3)
    assert "no folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no rank*.jsonl" in refused(capsys, tmp_path / "empty")
    assert "invalid int value: 'x'" in refused(capsys, folder, "--steps", "x")
    assert "FOLDER" in refused(capsys)
    assert "cannot be a file" in refused(capsys, folder, "--output", tmp_path / "nowhere" / "t.json")
    assert "cannot be a file" in refused(capsys, folder, "--output", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["rank00000.jsonl"]  # nothing was left


def test_a_report_without_spans(tmp_path, capsys):
    folder = write_report(tmp_path / "r", line(2, 0), line(3, 0))
    message = refused(capsys, folder)
    assert "--log-interval" in message and "not in the first step" in message and "was killed" in message


def test_an_older_trace_is_kept(tmp_path, capsys):
    folder = write_report(tmp_path / "r", GOOD)
    target = tmp_path / "mine.json"
    target.write_text("precious")
    assert "add --overwrite" in refused(capsys, folder, "--output", target)
    assert target.read_text() == "precious"
    assert tool.main([str(folder), "--output", str(target), "--overwrite"]) == 0
    opens(json.loads(target.read_text()))
    assert [path.name for path in tmp_path.glob(".*")] == []  # no partial file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "is no JSON"),
        ("[]", "not as --overlap-report writes it"),
        ("null", "not as --overlap-report writes it"),
        (json.dumps({"iteration": 2, "rank": 0}), "'passes' is missing"),
        (json.dumps(GOOD | {"iteration": "2"}), "'2' is no whole number"),
        (json.dumps(GOOD | {"rank": True}), "True is no whole number"),
        (json.dumps(line(2, 0, span("MLP", "lane", 0.0, 1.0))), "'lane' is not a valid Lane"),
        (json.dumps(line(2, 0, span("MLP", "compute", 2.0, 1.0))), "MLP lasts from 2.0 to 1.0 s"),
        (json.dumps(line(2, 0, span("MLP", "compute", 0.0, float("inf")))), "MLP lasts from 0.0 to inf s"),
        (json.dumps(line(2, 0, span("MLP", "compute", 0.0, 1.0) | {"start_s": None})), "line 2 is not as"),
        (json.dumps(line(2, 0, span("MLP", "compute", 0.0, 1.0, call=True))), "True is no whole number"),
        (json.dumps(line(2, 0, span("MLP", "compute", 0.0, 1.0), idle=[[2.0, 1.0]])), "lasts from 2.0 to 1.0 s"),
        (json.dumps(line(2, 0, span("MLP", "compute", 0.0, 1.0), idle=[1.0])), "line 2 is not as"),
        (json.dumps(line(2, 0, OLDER)), "an older version wrote it; draw it with the tools/trace.py of that version"),
        (json.dumps(line(2, 0, {name: OLDER[name] for name in OLDER if name != "chunk"})), "'call' is missing"),
    ],
)
def test_malformed_lines(tmp_path, capsys, text, words):
    folder = write_report(tmp_path / "r", GOOD)
    with (folder / "rank00000.jsonl").open("a") as file:
        file.write(f"{text}\n")
    message = refused(capsys, folder)
    assert words in message and "rank00000.jsonl line 2" in message


def test_as_a_command(tmp_path):
    folder = write_report(tmp_path / "r", GOOD)
    assert run_tool(folder) == (0, "")
    code, message = run_tool(folder)
    assert code == 2 and message.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    text = capsys.readouterr().out
    for word in (
        "--overlap-report",
        "--log-interval",
        "ui.perfetto.dev",
        "chrome://tracing",
        "aligned",
        "one\n    after",
    ):
        assert word in text
