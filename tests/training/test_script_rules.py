"""What would have no effect, or go wrong later, is refused at the start; data made anew are seen as such."""

from __future__ import annotations

import sys

import entry
import numpy
import pytest
import ranks
import training
from test_arguments import changes
from training import SCMOE, with_flags, without_flag

IGNORED = {
    "--rampup-batch-size 4 2 24": ["no effect here", "--rampup-batch-size is 4 2 24", "use --step-batch-size-schedule"],
    "--reset-attention-mask": ["a mask of documents", "--no-create-attention-mask-in-dataloader is on", "drop --reset"],
    "--reset-position-ids": ["no table", "--position-embedding-type is rope", "drop --reset-position-ids"],
    "--mask-prob 0.3": ["no effect here", "--mask-prob is 0.3", "masked language models"],
    "--vocab-extra-ids 5": ["no effect here", "--vocab-extra-ids is 5"],
    "--num-classes 7": ["no effect here", "a flag of vision models", "--num-classes is 7"],
    "--inference-max-requests 7": ["no effect here", "a flag of serving", "--inference-max-requests is 7"],
    "--grpo-group-size 7": ["no effect here", "a flag of reinforcement learning", "--grpo-group-size is 7"],
    "--biencoder-projection-dim 7": ["no effect here", "a flag of retrieval", "--biencoder-projection-dim is 7"],
    "--logits-load-prefetch-factor 7": ["no effect here", "does not distil"],
}
TOO_LATE = {
    "--overlap-chunks 99999999999999999999": ["a chunk has a token at least", "use --overlap-chunks 4"],
    "--a2a-codec lsh --lsh-seed -1": ["a seed is a number from 0", "--lsh-seed is -1"],
    "--a2a-codec lsh --lsh-seed 99999999999999999999": ["a seed is a number from 0", "one below"],
    "--overlap-report /proc/x": ["files in a folder", "--overlap-report is /proc/x", "give another folder"],
    "--tp-comm-overlap": ["Transformer Engine is not installed", "drop --tp-comm-overlap"],
    "--load nowhere --exit-on-missing-checkpoint": ["--load is nowhere, where there is none", "drop --exit-on-missing"],
}


@pytest.mark.parametrize("refused", [IGNORED, TOO_LATE], ids=["without effect", "that would fail later"])
def test_flags_are_refused(refused):
    entry.assert_refused((with_flags(SCMOE, *changes(flags)), words) for flags, words in refused.items())


def test_files_in_the_place_of_folders_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    report = (with_flags(SCMOE, f"--overlap-report {file}"), ["files in a folder", "give another folder"])
    load = (with_flags(SCMOE, f"--load {file}"), ["a checkpoint is a folder", "the folder that --save wrote"])
    entry.assert_refused([report, load])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("damage", ["tracker", "common.pt", ".metadata"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    flags = with_flags(SCMOE, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1", "--ckpt-format torch_dist")
    ranks.run(training.train, 1, flags)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    if damage == "tracker":
        tracker.write_bytes(b"\xff")
    else:
        (tmp_path / "iter_0000001" / damage).write_bytes(b"")
    entry.assert_refused(
        [(with_flags(SCMOE, f"--load {tmp_path}"), [f"--load {tmp_path} cannot be read", "--ckpt-step"])]
    )


def test_a_vocabulary_is_padded_as_in_the_checkpoint(tmp_path):
    """Other sizes pad 600 tokens to 768 rows, of which 128 were never trained: the loss would jump."""
    flags = with_flags(SCMOE, "--vocab-size 600", "--train-iters 3", "--ckpt-format torch_dist", "--bf16")
    ranks.run(training.train, 1, with_flags(flags, f"--save {tmp_path}/c", "--save-interval 2"))
    load = with_flags(flags, f"--load {tmp_path}/c", "--ckpt-step 2", "--no-load-optim", "--no-load-rng")
    losses = {}
    for name, change in {"same": [], "other": ["--make-vocab-size-divisible-by 256"]}.items():
        printed = ranks.run(training.train, 1, with_flags(load, *change, f"--tensorboard-dir {tmp_path}/{name}"))[0]
        assert ("vocabulary padded to 640 rows, as in the checkpoint, and not to 768" in printed) == bool(change)
        losses[name] = training.scalars(tmp_path / name, "lm loss")["lm loss"]
    assert losses["same"] == losses["other"] and len(losses["same"]) == 1
    entry.assert_refused(
        [(with_flags(load, "--vocab-size 700"), ["would lose tokens", "has 700", "640 rows", "use the tokenizer"])]
    )


def dataset_documents(prefix: str, cache: str, first_id: int, num_documents: int) -> tuple[set[int], set[int]]:
    """Documents that training and validation see of data made anew: document i consists of the token first_id + i."""
    from megatron.core import parallel_state
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_scmoe.training.arguments import parse_and_validate_args

    entry = training.entry_script()
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(500))
    for index in range(num_documents):
        length = 5 + index % 7
        builder.add_document(numpy.array([first_id + index] * length + [499], dtype=numpy.int32), [length + 1])
    builder.finalize(prefix + ".idx")
    flags = without_flag(SCMOE, "--mock-data")
    flags = with_flags(
        flags, f"--data-path {prefix}", "--split 90,10,0", f"--data-cache-path {cache}", "--vocab-size 499"
    )
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    parse_and_validate_args()
    parallel_state.initialize_model_parallel()
    train, valid, _ = entry.train_valid_test_datasets_provider((20, 2, 0))
    seen = [{int(i) for at in range(len(data)) for i in data[at]["tokens"]} - {499} for data in (train, valid)]
    return seen[0], seen[1]


def test_data_made_again_under_an_old_name_are_trained_on(tmp_path):
    """The cache of sample indices is named by the data, too: with the old one 90 documents would never be seen."""
    prefix, cache = str(tmp_path / "text_document"), str(tmp_path / "cache")
    ranks.run(dataset_documents, 1, prefix, cache, 1, 30)
    ((old, _),) = ranks.run(dataset_documents, 1, prefix, cache, 1, 30)
    assert max(old) <= 30
    made = len(list((tmp_path / "cache").iterdir()))
    ((train, valid),) = ranks.run(dataset_documents, 1, prefix, cache, 200, 120)
    ((fresh_train, fresh_valid),) = ranks.run(dataset_documents, 1, prefix, str(tmp_path / "new"), 200, 120)
    assert (train, valid) == (fresh_train, fresh_valid) and max(train) > 230
    assert len(list((tmp_path / "cache").iterdir())) == 2 * made


def test_the_cache_is_used_again_for_the_same_data(tmp_path):
    """Negative control of the names: the same data find their cache."""
    prefix, cache = str(tmp_path / "text_document"), tmp_path / "cache"
    ranks.run(dataset_documents, 1, prefix, str(cache), 1, 30)
    made = {path.name for path in cache.iterdir()}
    ranks.run(dataset_documents, 1, prefix, str(cache), 1, 30)
    assert {path.name for path in cache.iterdir()} == made
