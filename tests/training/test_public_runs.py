"""Faults of other people's trainings, found in their public threads: right here, or refused before anything starts."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
from pathlib import Path

import entry
import numpy
import pytest
import ranks
import torch
import training
from training import SCMOE, with_flags, without_flag

EOD = 498
DATA = with_flags(without_flag(SCMOE, "--mock-data"), "--split 70,30,0", "--vocab-size 499")

# --- what of a checkpoint goes on ----------------------------------------------------------------------------------

OVERRIDE, FROM_CHECKPOINT = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
BY_RATES = ["finds the moments of a group of parameters by its learning rates", "--no-load-optim"]
AS_IT_WAS = ["the schedule of a checkpoint goes on as it was", "add " + OVERRIDE]
BROKEN_OFF = {
    "--lr 5e-3": [*BY_RATES, "--lr is 0.005", "has 0.01"],
    f"--lr 5e-3 {OVERRIDE}": [*BY_RATES, "--lr is 0.005"],
    f"--lr 5e-3 {FROM_CHECKPOINT}": [*BY_RATES, "--lr is 0.005"],
    f"--min-lr 1e-3 {OVERRIDE}": [*BY_RATES, "--min-lr is 0.001", "has 0.0"],
    "--train-iters 6": [*AS_IT_WAS, "samples of training is 48", "has 16"],
    "--lr-decay-iters 9": [*AS_IT_WAS, "samples of decay is 72", "has 64"],
    "--lr-warmup-iters 1": [*AS_IT_WAS, "samples of warm-up is 8", "has 0"],
    "--lr-decay-style cosine": [*AS_IT_WAS, "--lr-decay-style is cosine", "has linear"],
    "--weight-decay 0.3": [*AS_IT_WAS, "--start-weight-decay is 0.3", "has 0.01"],
    "--global-batch-size 4": [*AS_IT_WAS, "samples of decay is 32", "has 64"],
}
QUICK = [f"--lr 5e-3 {OVERRIDE}", "--train-iters 6", "--weight-decay 0.3"]
GOES_ON = [f"--train-iters 6 {FROM_CHECKPOINT}", "--lr 5e-3 --no-load-optim", "--lr 5e-3 --finetune"]


def changed(flags: list[str], change: str) -> list[str]:
    return with_flags(flags, *(f"--{word}".strip() for word in change.split("--") if word))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> list[str]:
    """Flags that go on from a checkpoint of two iterations."""
    save = tmp_path_factory.mktemp("begun")
    flags = with_flags(SCMOE, "--train-iters 2", "--lr-decay-iters 8", "--lr-decay-style linear", "--eval-iters 0")
    ranks.run(training.train, 1, with_flags(flags, f"--save {save}", "--save-interval 1", "--ckpt-format torch_dist"))
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    return with_flags(flags, f"--load {save}", "--ckpt-format torch_dist")


@pytest.mark.parametrize("some", [QUICK, pytest.param([*BROKEN_OFF], marks=pytest.mark.full)], ids=["some", "all"])
def test_a_schedule_that_does_not_go_on_is_refused(begun, some):
    entry.assert_refused((changed(begun, change), BROKEN_OFF[change]) for change in some)


@pytest.mark.parametrize("more", [[], pytest.param(GOES_ON, marks=pytest.mark.full)], ids=["some", "all"])
def test_a_schedule_that_goes_on_is_accepted(begun, more):
    some = ["", f"--train-iters 6 {OVERRIDE}", "--lr 5e-3 --skip-train"]
    entry.assert_accepted(changed(begun, change) for change in [*some, *more])


def test_a_release_has_no_schedule(begun, tmp_path):
    """Core loads no optimizer of one, whatever is in it."""
    load = Path(begun[begun.index("--load") + 1])
    (tmp_path / "release").symlink_to(load / "iter_0000001")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    entry.assert_accepted([with_flags(begun, f"--load {tmp_path}", "--lr 5e-3")])


def train_unrefused(flags: list[str]) -> str:
    """What Core makes of it where nothing is refused."""
    from megatron_scmoe.training import schedule

    schedule.check = lambda *_: None
    try:
        return training.train(flags)
    except (AssertionError, ValueError) as error:
        return str(error)


@pytest.mark.full
@pytest.mark.parametrize("change", ["", *BROKEN_OFF])
def test_core_does_not_go_on_either(begun, change):
    """The refusals say what Core would do, and no more."""
    (said,) = ranks.run(train_unrefused, 1, changed(begun, change))
    if not change:
        assert "iteration        2/       2" in said
    elif "lr 5e-3" in change or "min-lr" in change:
        assert "Could not find parameter group" in said
    else:
        assert "do not match" in said


def test_samples_of_another_order_are_said(begun):
    commands = ["", "--seed 7", "--seq-length 8", "--seed 7 --finetune"]
    found = entry.ends([entry.Command(changed(begun, change)) for change in commands])
    said = [
        [line for line in ended.stdout.splitlines() if line.startswith(" > data: samples come in another order")]
        for ended in found
    ]
    assert [len(lines) for lines in said] == [0, 1, 1, 0]
    assert "--seed 1234, now 7" in said[1][0] and "--seq-length 16, now 8" in said[2][0]


# --- data ----------------------------------------------------------------------------------------------------------


def write_datasets(folder: Path) -> None:
    """a and b, of documents of one token each: 1 to 40, and 101 to 140; every sample has another number of ends."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for name, first in (("a", 1), ("b", 101)):
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=DType.optimal_dtype(500))
        for index in range(40):
            document = [first + index] * (3 + index % 7) + [EOD]
            builder.add_document(numpy.array(document, dtype=numpy.int32), [len(document)])
        builder.finalize(f"{folder / name}.idx")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    ranks.run(write_datasets, 1, folder)
    (folder / "link.bin").symlink_to(folder / "a.bin")
    (folder / "link.idx").symlink_to(folder / "a.idx")
    return folder


def blended(folder: Path, words: str) -> list[str]:
    """Flags for a blend of datasets and their weights."""
    paths = [str(folder / word) if word in ("a", "b", "link") else word for word in words.split()]
    return with_flags(DATA, "--data-path " + " ".join(paths), f"--data-cache-path {folder}/cache")


def test_blends_that_go_wrong_are_refused(datasets):
    cases = {
        "1 a 1 a": ["the same samples in the same order", "is blended with itself", "name it once"],
        "1 a 2 link": ["link is blended with itself"],
        "0 a 1 b": ["weights of datasets are above 0", "a is 0", "leave it out"],
        "nan a 1 b": ["weights of datasets are above 0", "a is nan"],
    }
    entry.assert_refused((blended(datasets, words), says) for words, says in cases.items())
    entry.assert_accepted(blended(datasets, words) for words in ("3 a 1 b", "link b"))


def test_a_validation_without_data_is_refused(datasets):
    """Core ends with a traceback at the first validation, which may come after all of the training."""
    no_share = with_flags(blended(datasets, "a"), "--split 100,0,0")
    no_path = with_flags(without_flag(no_share, "--data-path"), f"--train-data-path {datasets}/a")
    no_path = without_flag(no_path, "--split")
    missing = with_flags(no_path, f"--valid-data-path {datasets}/none")
    entry.assert_refused(
        [
            (no_share, ["validation needs documents", "--eval-iters is 1", "--split is 100,0,0", "add --eval-iters 0"]),
            (no_path, ["validation needs documents", "--valid-data-path names none"]),
            (missing, ["none.idx is no file"]),
            (with_flags(SCMOE, "--full-validation"), ["a single set", "add --multiple-validation-sets"]),
        ]
    )
    several = ["--full-validation", "--multiple-validation-sets"]
    with_both = with_flags(no_path, f"--valid-data-path {datasets}/b")
    entry.assert_accepted(
        [with_flags(no_share, "--eval-iters 0"), with_both, with_flags(blended(datasets, "a"), *several)]
    )


def samples(flags: list[str]) -> list[tuple[list[int], list[float]]]:
    """Labels and loss mask of every sample of training."""
    from megatron.core import parallel_state

    from megatron_scmoe.training.arguments import parse_and_validate_args

    script = training.entry_script()
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    parse_and_validate_args()
    parallel_state.initialize_model_parallel()
    train, *_ = script.train_valid_test_datasets_provider((8, 1, 0))
    return [(train[at]["labels"].tolist(), train[at]["loss_mask"].tolist()) for at in range(len(train))]


def test_weights_are_shares_and_seeds_are_orders(datasets):
    ((of_a, of_b),) = [
        [sum((max(set(labels) - {EOD}) > 100) == is_b for labels, _ in drawn) for is_b in (False, True)]
        for drawn in ranks.run(samples, 1, blended(datasets, "6 a 2 b"))
    ]
    assert (of_a, of_b) == (6, 2)
    one, again, other = (ranks.run(samples, 1, with_flags(blended(datasets, "a"), f"--seed {n}")) for n in (7, 7, 8))
    assert one == again != other


@pytest.mark.parametrize("pad", ["</s>", "w5"])
def test_the_end_of_a_document_is_learned_where_it_is_padding_too(datasets, tmp_path, pad):
    """A tokenizer without a padding token of its own has the end of a text for one, as many published ones do."""
    vocabulary = {"</s>": EOD} | {f"w{number}": number for number in range(EOD)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": pad, "unk_token": "w0"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    flags = without_flag(blended(datasets, "a"), "--vocab-size")
    flags = with_flags(flags, "--tokenizer-type HuggingFaceTokenizer", f"--tokenizer-model {tmp_path}")
    (drawn,) = ranks.run(samples, 1, flags)
    learned = {(label, counts) for labels, mask in drawn for label, counts in zip(labels, mask, strict=True)}
    assert (EOD, 1.0) in learned and (EOD, 0.0) not in learned
    assert ((5, 1.0) in learned) == (pad == "</s>")  # what is padding and nothing else does not count


# --- what a step is ------------------------------------------------------------------------------------------------

BIASED = with_flags(
    without_flag(SCMOE, "--moe-aux-loss-coeff"),
    *("--router longcat", "--zero-experts 2", "--moe-router-topk 2", "--moe-router-load-balancing-type none"),
    *("--moe-router-bias-update-rate 0.125", "--train-iters 3", "--eval-iters 0", "--hidden-dropout 0"),
    "--attention-dropout 0",
)
COUNTED_ONCE = {
    "evaluated": ["--eval-iters 2", "--eval-interval 1"],
    "recomputed": ["--recompute-granularity full", "--recompute-method uniform", "--recompute-num-layers 2"],
}


def tokens_of_experts(flags: list[str]) -> list[list[list[float]]]:
    """Tokens of every expert, of every MoE and step, by which Core moves their biases."""
    finalize_model_grads = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    counts: list[list[list[float]]] = []
    update = finalize_model_grads.get_updated_expert_bias

    def noted(tokens_per_expert: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        counts.append(tokens_per_expert.tolist())
        return update(tokens_per_expert, *args, **kwargs)

    finalize_model_grads.get_updated_expert_bias = noted
    training.train(flags)
    return counts


def tokens_of_all_passes(flags: list[str]) -> list[list[list[float]]]:
    """The same where passes without gradients count, too."""
    from megatron.core.transformer.moe.router import TopKRouter

    count = TopKRouter._apply_expert_bias

    def counting(self: TopKRouter, *args: object, **kwargs: object) -> None:
        with torch.enable_grad():
            count(self, *args, **kwargs)

    TopKRouter._apply_expert_bias = counting
    return tokens_of_experts(flags)


@pytest.fixture(scope="module")
def tokens() -> list[list[list[float]]]:
    (found,) = ranks.run(tokens_of_experts, 1, BIASED)
    assert [[sum(of_moe) for of_moe in step] for step in found] == [[2 * 8 * 16] * 2] * 3  # top-2 of 8 samples of 16
    return found


@pytest.mark.parametrize("way", COUNTED_ONCE)
def test_tokens_of_an_expert_are_counted_once(tokens, way):
    """Neither those of an evaluation nor those of a recomputation move the biases of experts."""
    assert ranks.run(tokens_of_experts, 1, with_flags(BIASED, *COUNTED_ONCE[way])) == [tokens]


@pytest.mark.full
@pytest.mark.parametrize("way", COUNTED_ONCE)
def test_tokens_that_count_twice_are_noticed(tokens, way):
    """Negative control."""
    assert ranks.run(tokens_of_all_passes, 1, with_flags(BIASED, *COUNTED_ONCE[way])) != [tokens]


@pytest.mark.full
def test_tokens_count_alike_whatever_the_micro_batch(datasets, tmp_path):
    """Micro-batches with other numbers of tokens: each token of a step counts alike with --calculate-per-token-loss."""
    flags = with_flags(blended(datasets, "a"), "--hidden-dropout 0", "--attention-dropout 0", "--moe-aux-loss-coeff 0")
    flags = with_flags(flags, "--eod-mask-loss", "--train-iters 1", "--eval-iters 0", "--ckpt-format torch_dist")
    ranks.run(training.train, 1, with_flags(flags, f"--save {tmp_path}/begin", "--save-interval 1"))
    norms = {}
    for size, per_token in itertools.product((1, 8), (False, True)):
        change = [f"--micro-batch-size {size}", *(["--calculate-per-token-loss"] if per_token else [])]
        change += [f"--load {tmp_path}/begin", "--finetune", f"--tensorboard-dir {tmp_path}/{size}{per_token}"]
        ranks.run(training.train, 1, with_flags(flags, *change))
        norms[size, per_token] = training.scalars(tmp_path / f"{size}{per_token}", "grad-norm")["grad-norm"][1]
    assert norms[1, True] == pytest.approx(norms[8, True], rel=1e-5) == norms[8, False]
    assert norms[1, False] != pytest.approx(norms[8, False], rel=1e-4)  # a mean of means, as Core's is by default


BALANCED = with_flags(SCMOE, "--hidden-dropout 0", "--attention-dropout 0", "--train-iters 1", "--eval-iters 0")
BALANCED = with_flags(BALANCED, "--moe-aux-loss-coeff 1", "--moe-z-loss-coeff 0.1", "--ckpt-format torch_dist")
SPLIT = {
    "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
    "ep2": "--expert-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
}


def train_with_one_queue(flags: list[str]) -> str:
    """As Megatron asks for with tensor parallelism."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return training.train(flags)


@pytest.fixture(scope="module")
def norm_of(tmp_path_factory):
    """Function of flags and a number of ranks: the norm of gradients of a first step, always from the same weights."""
    folder = tmp_path_factory.mktemp("balanced")
    ranks.run(training.train, 1, with_flags(BALANCED, f"--save {folder}/begin", "--save-interval 1"))
    numbers = itertools.count()

    def norm(flags: str, num_ranks: int = 1) -> float:
        logs = folder / str(next(numbers))
        begin = [f"--load {folder}/begin", "--finetune", f"--tensorboard-dir {logs}"]
        ranks.run(train_with_one_queue, num_ranks, changed(with_flags(BALANCED, *begin), flags))
        return training.scalars(logs, "grad-norm")["grad-norm"][1]

    return norm


@pytest.mark.full
@pytest.mark.parametrize("layout", SPLIT)
def test_balance_and_z_loss_weigh_alike_with_a_loss_per_token(norm_of, layout):
    """They are scaled by tokens there, of which a rank has a part: no layout may count for more."""
    expected = norm_of("")
    assert norm_of(f"--calculate-per-token-loss {SPLIT[layout]}", 2) == pytest.approx(expected, rel=1e-5)
    assert norm_of("--moe-aux-loss-coeff 2") != pytest.approx(expected, rel=1e-3)  # it does weigh
