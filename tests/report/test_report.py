"""The overlap report: its arithmetic by hand, and what a real run writes."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
import training
from test_arguments import DGMOE
from training import SCMOE, with_flags

from megatron_scmoe.config import Codec, CodecConfig
from megatron_scmoe.contracts import Launch, Plan
from megatron_scmoe.overlap.costs import GroupPass
from megatron_scmoe.overlap.recording import Compression, Load, Recording
from megatron_scmoe.overlap.spans import Lane, Span
from megatron_scmoe.report.figures import GroupRow, Summary, codec_scalars, rows_of, summarize, warning
from megatron_scmoe.report.files import ReportFile

# ---- by hand ----------------------------------------------------------------------------------------------------


def one_pass(
    group: int,
    *,
    backward: bool,
    compute: tuple[float, float],
    communication: tuple[float, float],
    sent: int,
    idle: tuple[tuple[float, float], ...] | None = None,
):
    spans = (
        Span("MLP", Lane.COMPUTE, *compute, backward, 1),
        Span("dispatch", Lane.COMMUNICATION, *communication, backward, 0, call=0),
    )
    return GroupPass(group, backward, spans, 100.0, sent, idle)


def load(group: int, *tokens: int, part: int = 0, dropped: int = 0) -> Load:
    return Load(group, part, torch.tensor(tokens), torch.tensor(dropped))


def compression(group: int, rows: int, clusters: int, largest: int, residual: float) -> Compression:
    return Compression(group, rows, clusters, torch.tensor(largest), torch.tensor(residual))


def row(group: int, **changes: Any) -> GroupRow:
    values = {
        "slots": ((1,),),
        "launch": Launch.BEFORE,
        "blocking": False,
        "communication_ms": 10.0,
        "exposed_ms": 4.0,
        "hidden_share": 0.6,
        "sent_bytes": 2**20,
        "tokens_per_expert": (4, 4),
        "tokens_max_over_mean": 1.0,
        "dropped_share": 0.0,
    }
    return GroupRow(group=group, **(values | changes))


def test_bytes_by_transfer_by_hand():
    """Of all passes and groups of the rank that sends most, in the order in which they fly; for a codec that rounds."""
    passes = [
        replace(
            one_pass(4, backward=True, compute=(0, 6), communication=(2, 10), sent=30), sent_by=sent, plain_by=plain
        )
        for sent, plain in (
            ({"combine-backward": 10, "dispatch-forward": 20}, {"combine-backward": 40, "dispatch-forward": 40}),
            ({"dispatch-forward": 30}, {"dispatch-forward": 60}),
        )
    ]
    (found,) = rows_of(passes, Recording(), {4: Plan(((1,),))})
    assert list(found.sent_by.items()) == [("dispatch-forward", 50), ("combine-backward", 10)]
    assert found.plain_by == {"dispatch-forward": 100, "combine-backward": 40}
    less = row(0, sent_bytes=3, sent_by={"dispatch-forward": 3}, plain_by={"dispatch-forward": 3})
    more = row(0, sent_bytes=2**20, sent_by={"dispatch-forward": 2**20}, plain_by={"dispatch-forward": 2**21})
    nothing = row(0, sent_bytes=0, sent_by={"combine-forward": 0}, plain_by={"combine-forward": 0})
    summary = summarize([[less], [more, nothing]])
    fp8 = CodecConfig(a2a_codec=Codec.FP8)
    assert summary.words(fp8).endswith(" dropped, dispatch-forward 1 MiB (50.0% of what it was), combine-forward 0 MiB")
    assert summary.scalars(fp8)["sent_mib/dispatch-forward"] == summary.scalars(fp8)["sent_mib"] == 1
    for other in (CodecConfig(), CodecConfig(a2a_codec=Codec.LSH)):
        assert "MiB (" not in summary.words(other) and "sent_mib/dispatch-forward" not in summary.scalars(other)
    hops = row(0, sent_bytes=3 * 2**20, sent_by={"dispatch-forward": 2**20}, plain_by={"dispatch-forward": 2**21})
    assert summarize([[hops]]).words(fp8).endswith("what it was), inside nodes 2 MiB")
    assert "of the rows sent" not in summary.words(fp8) and "residual" not in summary.scalars(fp8)


def test_rows_by_hand():
    passes = [
        one_pass(4, backward=False, compute=(0, 6), communication=(2, 10), sent=100),  # 8 s, of which 4 exposed
        one_pass(7, backward=False, compute=(10, 20), communication=(12, 14), sent=7),
        one_pass(4, backward=True, compute=(24, 30), communication=(20, 22), sent=30),  # 2 s, all exposed
    ]
    recording = Recording(
        loads=[
            load(4, 5, 1, 0, 2, dropped=1),
            load(7, 1, 1, 1, 1, part=1),  # the second group of a span
            load(7, 2, 2, 2, 2),
            load(4, 1, 1, 4, 2, dropped=3),
        ],
        compressions=[compression(4, 12, 3, 5, 0.25), compression(4, 4, 1, 4, 0.75)],
    )
    rows = rows_of(
        passes, recording, {7: Plan(((1,),), blocking=True), 4: Plan(((1, 3), (1, 1)), launch=Launch.BEHIND)}
    )
    assert rows == [
        GroupRow(
            group=4,
            slots=((1, 3), (1, 1)),
            launch=Launch.BEHIND,
            blocking=False,
            communication_ms=10_000,
            exposed_ms=6_000,
            hidden_share=1 - 6 / 10,
            sent_bytes=130,
            tokens_per_expert=(6, 2, 4, 4),
            tokens_max_over_mean=6 / 4,
            dropped_share=4 / 20,
            sent_rate=4 / 16,
            largest_cluster=5,
            residual=(12 * 0.25 + 4 * 0.75) / 16,
        ),
        GroupRow(
            group=7,
            slots=((1,),),
            launch=Launch.BEFORE,
            blocking=True,
            communication_ms=2_000,
            exposed_ms=0,
            hidden_share=1,
            sent_bytes=7,
            tokens_per_expert=(2, 2, 2, 2, 1, 1, 1, 1),
            tokens_max_over_mean=2 * 8 / 12,
            dropped_share=0,
            sent_rate=1,  # without a codec
            largest_cluster=1,
            residual=0,
        ),
    ]


def test_idle_times_by_hand():
    """Of all passes; not known where it is not of one."""
    lanes = {"compute": (0.0, 6.0), "communication": (2.0, 10.0), "sent": 1}
    known = [
        one_pass(4, backward=False, idle=((0.5, 1.0), (3.0, 5.0)), **lanes),
        one_pass(4, backward=True, idle=((7.0, 7.25),), **lanes),
        one_pass(7, backward=True, idle=(), **lanes),
    ]
    plans = {index: Plan(((1,),)) for index in (4, 7)}
    assert [one.idle_at_most_ms for one in rows_of(known, Recording(), plans)] == [2_750, 0]
    unknown = [*known, one_pass(4, backward=False, **lanes)]
    assert [one.idle_at_most_ms for one in rows_of(unknown, Recording(), plans)] == [None, 0]


def test_idle_time_is_of_the_slowest_rank_and_said_where_it_is_known():
    fast = [row(0, exposed_ms=1.0, idle_at_most_ms=30.0), row(1, idle_at_most_ms=50.0)]
    slow = [row(0, exposed_ms=6.0, idle_at_most_ms=2.0), row(1, idle_at_most_ms=0.25)]
    known, unknown = summarize([fast, slow]), summarize([fast, [*slow[:1], row(1)]])
    assert (known.idle_at_most_ms, unknown.idle_at_most_ms) == (2.25, None)
    assert "50% hidden, idle 2.2 ms at most, " in known.words(CodecConfig())
    assert "50% hidden, idle unknown, " in unknown.words(CodecConfig())
    assert known.scalars(CodecConfig()).keys() - unknown.scalars(CodecConfig()).keys() == {"idle_at_most_ms"}
    assert known.scalars(CodecConfig(a2a_codec=Codec.LSH)).keys() == set(Summary.__slots__) - {"sent_by", "plain_by"}


def test_a_group_that_was_not_heard_of_has_an_empty_row():
    (empty,) = rows_of([], Recording(), {0: Plan(((1,),))})
    assert (empty.communication_ms, empty.hidden_share, empty.tokens_per_expert) == (0, 1, ())
    assert (empty.tokens_max_over_mean, empty.dropped_share) == (0, 0)


def test_summary_by_hand():
    """Times of the slowest rank, by exposed time; the tokens of all ranks, group by group."""
    fast = [row(0, exposed_ms=1.0), row(1, exposed_ms=5.0, tokens_per_expert=(1, 3), sent_bytes=3 * 2**20)]
    slow = [
        row(0, exposed_ms=6.0, communication_ms=20.0, tokens_per_expert=(6, 2), sent_rate=0.4, residual=0.5),
        row(1, exposed_ms=3.0, tokens_per_expert=(1, 3), dropped_share=0.25),
    ]
    assert summarize([fast, slow]) == Summary(
        communication_ms=30,
        exposed_ms=9,
        hidden_share=1 - 9 / 30,
        sent_mib=4,
        tokens_max_over_mean=6 * 2 / 8,  # of group 1: (2, 6); of group 0: (10, 6), which is less
        dropped_share=0.25,
        sent_rate=(1 + 1 + 0.4 + 1) / 4,
        residual=0.5 / 4,
    )
    assert summarize([fast, slow]) == summarize([slow, fast])


def test_scalars_of_a_codec_by_hand():
    """Group by group: means over the ranks, and the largest of all clusters."""
    one = [row(0, sent_rate=0.4, largest_cluster=9, residual=0.5), row(3, sent_rate=0.2, largest_cluster=2)]
    other = [row(0, sent_rate=0.2, largest_cluster=7, residual=0.25), row(3, sent_rate=0.3, largest_cluster=4)]
    assert codec_scalars([one, other]) == pytest.approx(
        {
            **{"sent_rate/group0": 0.3, "largest_cluster/group0": 9, "residual/group0": 0.375},
            **{"sent_rate/group3": 0.25, "largest_cluster/group3": 4, "residual/group3": 0},
        }
    )


def summary(hidden_share: float = 0.5, tokens_max_over_mean: float = 1.0) -> Summary:
    return Summary(10.0, 5.0, hidden_share, 1.0, tokens_max_over_mean, 0.0)


def test_ten_points_below_prediction_are_no_warning_yet():
    assert warning(summary(0.5), 0.59, one_queue=False) is None
    assert warning(summary(0.9), 0.2, one_queue=True) is None
    assert warning(summary(0.5), 0.61, one_queue=False) is not None


@pytest.mark.parametrize(
    ("one_queue", "imbalance", "words"),
    [
        (True, 9.0, ["CUDA_DEVICE_MAX_CONNECTIONS is 1", "waits for another one", "set it to 32"]),
        (False, 2.0, ["busiest expert gets 2.0 times the mean", "--moe-aux-loss-coeff"]),
        (False, 1.2, ["the plan was made for other times", "--overlap-interval"]),
    ],
)
def test_a_warning_names_the_likely_cause(one_queue, imbalance, words):
    text = warning(summary(0.5, imbalance), 0.9, one_queue=one_queue)
    assert text is not None and text.startswith("50% of the communication is hidden, 90% was predicted: ")
    for word in words:
        assert word in text


def test_a_run_that_continues_begins_a_new_line(tmp_path):
    ReportFile(tmp_path, 3).write(1, [row(0)], [])
    path = tmp_path / "rank00003.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    for iteration in (2, 3):
        ReportFile(tmp_path, 3).write(iteration, [row(0)], [])
    lines = path.read_text().splitlines()
    assert lines[1] == whole[:20]
    assert [json.loads(lines[index])["iteration"] for index in (0, 2, 3)] == [1, 2, 3]


# ---- a real run -------------------------------------------------------------------------------------------------

NUM_STEPS, HIDDEN_SIZE, SEQ_LENGTH, GLOBAL_BATCH = 6, 32, 16, 8
CHANGES = [
    "--expert-model-parallel-size 2",
    f"--train-iters {NUM_STEPS}",
    "--eval-interval 2",
    "--eval-iters 2",
    "--log-interval 2",
]
FLAGS = with_flags(SCMOE, *CHANGES)
OTHERS = {"sent_rate", "residual", "sent_by", "plain_by", "idle_at_most_ms"}  # of codecs, of a GPU
SCALARS = {f"overlap/{name}" for name in Summary.__slots__ if name not in OTHERS}


def read(folder: Path) -> list[list[dict[str, Any]]]:
    """The lines of each rank."""
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("*.jsonl"))]


def run(folder: Path, flags: list[str]) -> list[str]:
    flags = with_flags(flags, f"--overlap-report {folder / 'report'}", f"--tensorboard-dir {folder / 'log'}")
    printed = ranks.run(training.train, 2, flags)
    assert "exit code" not in printed[0], printed[0][-3000:]
    return printed


@pytest.fixture(scope="module", params=["scmoe", "scmoe under recompute", "dgmoe, two chunks"])
def reported(request, tmp_path_factory) -> tuple[str, Path, list[str]]:
    """A run with evaluation in between: its name, its folder and what the ranks printed."""
    flags = {
        "scmoe": FLAGS,
        "scmoe under recompute": with_flags(
            FLAGS, "--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 2"
        ),
        "dgmoe, two chunks": with_flags(DGMOE, *CHANGES, "--overlap-chunks 2", "--moe-expert-capacity-factor 0.75"),
    }[request.param]
    folder = tmp_path_factory.mktemp("run")
    return request.param, folder, run(folder, flags)


def test_fields_of_the_lines(reported):
    name, folder, _ = reported
    lines_of_ranks = read(folder / "report")
    assert len(lines_of_ranks) == 2
    for rank, lines in enumerate(lines_of_ranks):
        assert [line["iteration"] for line in lines] == list(range(2, NUM_STEPS + 1))
        for line in lines:
            assert line.keys() == {"iteration", "rank", "groups", "passes"} and line["rank"] == rank
            assert bool(line["passes"]) == (line["iteration"] in (2, 4, 6))  # those that are logged
            assert [group["group"] for group in line["groups"]] == [0, 1]
            for group in line["groups"]:
                assert group.keys() == set(GroupRow.__slots__)
                assert group["slots"] == ([[1, 2], [1, 1]] if "chunks" in name else [[2]])
                assert group["idle_at_most_ms"] is None  # as there is no GPU
                assert 0 <= group["exposed_ms"] <= group["communication_ms"]
                share = 1 - group["exposed_ms"] / group["communication_ms"]
                assert group["hidden_share"] == pytest.approx(share)


def test_tokens_are_those_of_the_step(reported):
    """Evaluation, which is heard as well, and what recompute runs again are not counted."""
    name, folder, _ = reported
    tokens_of_rank = GLOBAL_BATCH // 2 * SEQ_LENGTH * (2 if "dgmoe" in name else 1)
    for lines in read(folder / "report"):
        for line in lines:
            for group in line["groups"]:
                tokens = group["tokens_per_expert"]
                assert len(tokens) == 4
                assert group["tokens_max_over_mean"] == pytest.approx(max(tokens) * 4 / sum(tokens))
                assert sum(tokens) == round(tokens_of_rank * (1 - group["dropped_share"]))
                assert (group["dropped_share"] > 0) == ("dgmoe" in name)


def test_bytes_are_those_that_have_to_be_sent(reported):
    """Forward sends tokens with their weights to their experts and outputs back; backward the gradients of both."""
    name, folder, _ = reported
    with_weight, without = HIDDEN_SIZE * 4 + 16, HIDDEN_SIZE * 4  # a weight is filled up to 16 bytes
    forwards = 2 if "recompute" in name else 1
    for lines in zip(*read(folder / "report"), strict=True):
        for groups in zip(*(line["groups"] for line in lines), strict=True):
            # Experts 0 and 1 are on rank 0.
            away = [sum(groups[0]["tokens_per_expert"][2:]), sum(groups[1]["tokens_per_expert"][:2])]
            for rank, group in enumerate(groups):
                mine, theirs = away[rank], away[1 - rank]
                forward = mine * with_weight + theirs * without
                backward = mine * without + theirs * with_weight
                assert group["sent_bytes"] == forwards * forward + backward > 0


def test_tensorboard_has_six_scalars(reported):
    _, folder, printed = reported
    assert len(SCALARS) == 6
    assert {tag for tag in training.scalar_names(folder / "log") if tag.startswith("overlap")} == SCALARS
    values = training.scalars(folder / "log", *SCALARS)
    lines = read(folder / "report")
    for iteration in (2, 4, 6):
        rows = [[GroupRow(**group) for group in of_rank[iteration - 2]["groups"]] for of_rank in lines]
        expected = summarize(rows)
        for scalar, by_iteration in values.items():
            assert sorted(by_iteration) == [2, 4, 6]
            assert by_iteration[iteration] == pytest.approx(getattr(expected, scalar.removeprefix("overlap/")))
        said = f" > overlap at iteration {iteration}: {expected.communication_ms:.1f} ms of communication"
        assert said in printed[0] and said not in printed[1]
        assert printed[0].count("hidden, idle unknown, ") == 3


def test_the_last_step_is_reported_where_megatron_ends_the_process(tmp_path):
    flags = (f"--overlap-report {tmp_path / 'report'}", f"--tensorboard-dir {tmp_path / 'log'}", "--exit-interval 4")
    printed = ranks.run(training.train, 2, with_flags(FLAGS, *flags))
    assert "exit code 0" in printed[0] and "iteration        5/" not in printed[1]
    assert [[line["iteration"] for line in lines] for lines in read(tmp_path / "report")] == [[2, 3, 4]] * 2
    assert list(training.scalars(tmp_path / "log", "overlap/exposed_ms")["overlap/exposed_ms"]) == [2, 4]
    assert " > overlap at iteration 4:" in printed[0]


def reports_last_step(exit_code: int, has_group: bool) -> bool:
    """Whether the session is closed where Megatron ends the process with this code."""
    entry_script, closed = training.entry_script(), []

    def end(*_: object, **__: object) -> None:
        if not has_group:
            torch.distributed.destroy_process_group()
        sys.exit(exit_code)

    entry_script.pretrain = end
    entry_script.OverlapSession.close = lambda _: closed.append(True)
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *with_flags(FLAGS, "--overlap-report report")]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        entry_script.main()
    return closed == [True]


def test_a_step_that_was_given_up_is_not_reported():
    """It ends with a code of its own, or, behind a signal in its middle, without a process group."""
    assert ranks.run(reports_last_step, 2, 0, True) == [True, True]
    assert ranks.run(reports_last_step, 2, 16, True) == [False, False]
    assert ranks.run(reports_last_step, 2, 0, False) == [False, False]


def logged_by_wandb(runs: bool) -> list[dict[str, float]]:
    """What W&B gets while its run goes on, or when it has ended."""
    from megatron_scmoe.report import scalars

    logged: list[dict[str, float]] = []
    wandb = SimpleNamespace(run=object() if runs else None, log=lambda values, _iteration: logged.append(values))
    scalars.get_tensorboard_writer, scalars.get_wandb_writer = (lambda: None), (lambda: wandb)
    scalars._write(2, {"overlap/sent_mib": 1.5})
    return logged


def test_a_run_of_wandb_that_has_ended_gets_nothing():
    """Megatron ends it before the last step is reported; to log then is an error."""
    assert ranks.run(logged_by_wandb, 1, True) == [[{"overlap/sent_mib": 1.5}]]
    assert ranks.run(logged_by_wandb, 1, False) == [[]]


def test_a_report_changes_no_number(tmp_path):
    flags = with_flags(FLAGS, "--train-iters 3")
    ranks.run(training.train, 2, with_flags(flags, f"--tensorboard-dir {tmp_path / 'plain'}"))
    run(tmp_path, flags)
    names = ("lm loss", "grad-norm")
    assert training.scalars(tmp_path / "plain", *names) == training.scalars(tmp_path / "log", *names)
    assert not any(tag.startswith("overlap") for tag in training.scalar_names(tmp_path / "plain"))
