"""Prediction layers through the entry script: in layouts, both containers and checkpoints; and what is refused."""

from __future__ import annotations

import entry
import pytest
import ranks
import test_layouts
import training
from test_layouts import case, starts
from training import SCMOE, with_flags

NAMES = (*test_layouts.NAMES, "mtp_1 loss")
EP2, PP2 = "--expert-model-parallel-size 2", "--pipeline-model-parallel-size 2"
UNTIED = "--untie-embeddings-and-output-weights"


@pytest.fixture(scope="module")
def start_of(tmp_path_factory):
    return starts(tmp_path_factory, NAMES)


LAYOUTS = ("ep2", "tp2 sp", "tp2 ep2", "pp2 ep2", "pp2 interleaved", "dp2 overlapped gather")
LAYOUTS += ("recompute full uniform", "tp2 pp2 ep2")
QUICK = {("scmoe-predicting", "pp2 ep2"), ("scmoe-predicting", "pp2 interleaved"), ("longcat-predicting", "tp2 ep2")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        case(f"{name}-predicting", layout, quick=(f"{name}-predicting", layout) in QUICK)
        for name in ("scmoe", "dgmoe", "longcat")
        for layout in LAYOUTS
    ],
)
def test_layout_agrees_with_one_rank(start_of, model, layout):
    """The loss of the prediction layer too, whose embedding is a copy where the first stage is another one."""
    start = start_of(model)
    found = start.continued(layout).scalars
    assert sorted(found["mtp_1 loss"]) == [2, 3, 4]
    test_layouts.assert_agree(found, start.expected)


def test_another_step_would_be_noticed(start_of):
    """Negative control: consecutive steps differ by far more than the tolerance."""
    expected = start_of("scmoe-predicting").expected
    for name in NAMES:
        assert expected[name][3] != pytest.approx(expected[name][2], rel=10 * test_layouts.TOLERANCE)


@pytest.mark.full
@pytest.mark.parametrize("move", [("pp2 ep2", "tp2 ep2"), ("tp2 ep2", "pp2 ep2"), ("one", "pp2 interleaved")])
def test_checkpoints_move_between_layouts(tmp_path, move):
    """Weights and moments bit for bit, logits and losses of the next steps."""
    (tmp_path / "from").mkdir()
    saved = test_layouts.save(tmp_path / "from", "scmoe-predicting", move[0])
    test_layouts.assert_loads(saved, tmp_path / "to", "scmoe-predicting", move[1])


CONTAINERS = {
    "blocks": ["--mtp-num-layers 1"],
    "hybrid": ["--hybrid-layer-pattern *-*E|*-*E/*-"],
}


def flags_in(container: str, *more: str) -> list[str]:
    flags = with_flags(SCMOE, EP2, PP2, UNTIED, *CONTAINERS[container], *more)
    return training.without_flag(flags, "--num-layers") if container == "hybrid" else flags


@pytest.mark.parametrize("container", CONTAINERS)
def test_it_trains_and_resumes_exactly(tmp_path, container):
    """Two stages of two expert-parallel ranks; the log has the loss of the prediction layer, and it falls."""
    flags = flags_in(container, f"--save {tmp_path}/save", "--save-interval 5")
    through = ranks.run(training.train, 4, with_flags(flags, f"--tensorboard-dir {tmp_path}/through"), timeout_s=240)
    assert "exit code" not in through[0], through[0][-3000:]
    assert "mtp_1 loss:" in through[-1]
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("5")
    more = (f"--load {tmp_path}/save", f"--tensorboard-dir {tmp_path}/resumed")
    resumed = ranks.run(training.train, 4, with_flags(flags, *more), timeout_s=240)
    assert "exit code" not in resumed[0], resumed[0][-3000:]
    first, second = (training.scalars(tmp_path / name, *NAMES) for name in ("through", "resumed"))
    for name in NAMES:
        assert [second[name][i] for i in range(6, 11)] == [first[name][i] for i in range(6, 11)], name
    assert first["mtp_1 loss"][10] < first["mtp_1 loss"][1] - 0.1 and first["lm loss"][10] < first["lm loss"][1] - 0.1


REFUSED = [
    (["--mtp-num-layers 1", "--context-parallel-size 2"], ["have not run with cut or packed", "drop --mtp-num-layers"]),
    (
        ["--mtp-num-layers 1", "--dataloader-inter-document-masking", "--micro-batch-size 1"],
        ["have not run with cut or packed", "sequences are packed"],
    ),
    (["--mtp-num-layers 0"], ["a whole number from 1", "--mtp-num-layers is 0"]),
    (["--mtp-loss-scaling-factor 0.3"], ["--mtp-num-layers is not given", "add --mtp-num-layers"]),
    (["--mtp-num-layers 1", "--mtp-standalone"], ["--mtp-standalone is True", "Core finds it out by itself"]),
    (
        ["--mtp-num-layers 1", "--position-embedding-type learned_absolute"],
        ["Megatron's own rule", "not supported with learned_absolute"],
    ),
    (
        [
            "--mtp-num-layers 1",
            "--recompute-granularity full",
            "--recompute-method uniform",
            "--recompute-num-layers 2",
        ],
        ["--recompute-num-layers is 2 and --mtp-num-layers is 1", "use --recompute-num-layers 1"],
    ),
]
REFUSED_PATTERNS = [
    ("*-*E*-*E", ["--mtp-num-layers 1"], ["--mtp-num-layers is 1", "*-*E*-*E has 0", "drop --mtp-num-layers"]),
    ("*-*E*-*E/*-", ["--mtp-num-layers 2"], ["--mtp-num-layers is 2", "*-*E*-*E/*- has 1", "drop --mtp-num-layers"]),
    ("*-*E*-*E/*-/*E", [], ["Megatron's own rule", "All MTP patterns must be identical"]),
    ("*-*E*-*E/*G", [], ["layer G needs kernels"]),
    (
        "*-*E*-*E/*E",
        ["--router longcat", "--shortcut-combine add", "--moe-router-topk-scaling-factor 6.0"],
        ["which knows no bias beside a softmax", "put - in the place of the E behind its /"],
    ),
]


def test_refused():
    patterns = [
        (training.without_flag(with_flags(SCMOE, f"--hybrid-layer-pattern {pattern}", *more), "--num-layers"), words)
        for pattern, more, words in REFUSED_PATTERNS
    ]
    entry.assert_refused([*((with_flags(SCMOE, *flags), words) for flags, words in REFUSED), *patterns])


REFUSED_STAGES = [
    ([PP2], ["cannot save it", "--pipeline-model-parallel-size is 2", f"add {UNTIED}"]),
    (
        ["--pipeline-model-parallel-size 3", UNTIED, "--pipeline-model-parallel-layout Ett|ttm|L"],
        ["only the first and the last pipeline stage get data", "Ett|ttm|L", "put them before its L"],
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED_STAGES)
def test_refused_stages(changes, words):
    num_ranks = int(changes[0].split()[1])
    entry.assert_all_ranks_refuse(with_flags(SCMOE, "--mtp-num-layers 1", *changes), words, num_ranks)


def test_accepted():
    """Negative control."""
    pattern = training.without_flag(with_flags(SCMOE, "--hybrid-layer-pattern *-*E*-*E/*-"), "--num-layers")
    predicting = with_flags(SCMOE, "--mtp-num-layers 2")
    more = ("--mtp-use-repeated-layer", "--mtp-detach-heads", "--mtp-loss-scaling-factor 0.3")
    chunks = with_flags(training.STOCK, "--mtp-num-layers 1", "--overlap-chunks 2")
    entry.assert_accepted([predicting, with_flags(predicting, *more), pattern, [*pattern, *more[2].split()], chunks])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """Checkpoints of one step, with and without a prediction layer."""
    folders = {}
    for name, flags in {"with": ["--mtp-num-layers 1"], "without": []}.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        saving = with_flags(SCMOE, *flags, "--train-iters 1", f"--save {folders[name]}", "--save-interval 1")
        (printed,) = ranks.run(training.train, 1, saving)
        assert "exit code" not in printed, printed[-3000:]
    return folders


def test_another_number_of_them_is_refused(saved):
    lacks, has = saved["without"], saved["with"]
    entry.assert_refused(
        [
            (with_flags(SCMOE, "--mtp-num-layers 1", f"--load {lacks}"), ["is 1 and", "has None; drop it"]),
            (with_flags(SCMOE, "--mtp-num-layers 2", f"--load {has}"), ["has 1; use --mtp-num-layers 1"]),
            (with_flags(SCMOE, f"--load {has}"), ["is None and", "or --finetune, which leaves them out"]),
        ]
    )


def test_a_finetuning_leaves_them_out_and_says_so(saved):
    flags = with_flags(SCMOE, f"--load {saved['with']}", "--finetune", "--train-iters 1")
    (printed,) = ranks.run(training.train, 1, flags)
    assert "exit code" not in printed and "the 1 prediction layers of the checkpoint in" in printed
