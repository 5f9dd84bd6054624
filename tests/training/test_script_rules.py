"""What would have no effect, or go wrong later, is refused at the start; data made anew are seen as such."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

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
    "--fim-rate 0.3": ["no effect here", "--fim-rate is 0.3", "plain GPT datasets"],
    "--apply-residual-connection-post-layernorm": ["no effect here", "nothing reads it"],
    "--save-interval 7": ["no effect here", "--save-interval is 7", "add --save"],
    "--exit-on-missing-checkpoint": ["no effect here", "add --load"],
    "--hysteresis 3": ["no effect here", "--hysteresis is 3", "add --fp16"],
    "--sgd-momentum 0.5": ["no effect here", "add --optimizer sgd"],
    "--no-data-sharding": ["no effect here", "add --dataloader-type cyclic"],
    "--hybrid-override-pattern M*": ["Core calls it deprecated", "use --hybrid-layer-pattern"],
    "--save /tmp --save-tokens-per-expert-interval 1": ["grouped products alone", "--transformer-impl is local"],
}
TOO_LATE = {
    "--overlap-chunks 99999999999999999999": ["a chunk has a token at least", "use --overlap-chunks 4"],
    "--a2a-codec lsh --lsh-seed -1": ["a seed is a number from 0", "--lsh-seed is -1"],
    "--a2a-codec lsh --lsh-seed 99999999999999999999": ["a seed is a number from 0", "one below"],
    **{
        f"{flag} /proc/x --save-interval 1": [
            "files in a folder",
            f"{flag.split()[-1]} is /proc/x",
            "give another folder",
        ]
        for flag in ("--save", "--save /tmp --data-cache-path", "--save /tmp --moe-routing-trace-path")
    },
    "--overlap-report /proc/x": ["files in a folder", "--overlap-report is /proc/x", "give another folder"],
    f"--save /tmp/{'a' * 300} --save-interval 1": ["files in a folder", "File name too long"],
    "--per-dataset-sequences-path nowhere": ["--per-dataset-sequences-path is nowhere, which is no file"],
    "--pretrained-checkpoint nowhere": ["no checkpoint in either", "--load is None", "nowhere"],
    "--tp-comm-overlap": ["Transformer Engine is not installed", "drop --tp-comm-overlap"],
    "--load nowhere --exit-on-missing-checkpoint": ["--load is nowhere, where there is none", "drop --exit-on-missing"],
}


SIZES = {
    **{
        f"{flag} {value}": ["a whole number from 1", f"{flag} is {value}"]
        for flag, value in (
            *(("--hidden-size", 0), ("--hidden-size", 99999999999999999968), ("--num-layers", 0), ("--num-layers", -2)),
            *(("--num-attention-heads", 0), ("--ffn-hidden-size", -4), ("--moe-ffn-hidden-size", 0)),
            *(("--moe-router-topk", -1), ("--seq-length", -1), ("--log-interval", 0), ("--eval-interval", 0)),
            *(("--tensor-model-parallel-size", 0), ("--expert-model-parallel-size", 0), ("--vocab-size", -5)),
            *(("--make-vocab-size-divisible-by", 0), ("--seed", -1), ("--micro-batch-size", -1)),
        )
    },
    **{
        f"{flag} -1": ["a whole number from 0", f"{flag} is -1"]
        for flag in ("--num-experts", "--num-workers", "--train-iters", "--eval-iters")
    },
    **{
        f"{flag} nan": ["nan is no number", f"{flag} is "]
        for flag in ("--lr", "--clip-grad", "--weight-decay", "--moe-aux-loss-coeff")
    },
    "--moe-router-topk 999": ["to different experts", "there are 4", "use fewer"],
}
"""Most of these divided by zero, or went as far as the process groups."""


@pytest.mark.parametrize(
    "refused", [IGNORED, TOO_LATE, SIZES], ids=["without effect", "that would fail later", "that no run has"]
)
def test_flags_are_refused(refused):
    entry.assert_refused((with_flags(SCMOE, *changes(flags)), words) for flags, words in refused.items())


def test_what_another_flag_gives_an_effect_is_accepted(tmp_path):
    """Negative control: as above, with the other flag; folders that can be made, and are not yet."""
    entry.assert_accepted(
        with_flags(SCMOE, *changes(flags))
        for flags in (
            f"--save {tmp_path}/a/b --save-interval 7 --tensorboard-dir {tmp_path}/c --data-cache-path {tmp_path}/d/e",
            f"--load {tmp_path}/none --finetune",
            "--optimizer sgd --sgd-momentum 0.5",
            "--fp16 --hysteresis 3",
            "--dataloader-type cyclic --no-data-sharding",
        )
    )
    assert not (tmp_path / "a").exists() and not (tmp_path / "d").exists()


def flags_that_are_not_refused() -> list[str]:
    """Of the tables, in the way that each asks for; and those that would be where they should not."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_scmoe.config import ConfigError
    from megatron_scmoe.training import unread_flags

    parser = add_megatron_arguments(argparse.ArgumentParser())
    unread, wrong = unread_flags.UnreadFlags(parser), list[str]()
    defaults = vars(parser.parse_args([]))
    companions = [name for one in unread_flags.COMPANIONS for name in one.names]
    unread.check(argparse.Namespace(**defaults))
    for name in (*unread_flags.LEFTOVERS, *companions):
        (action,) = (one for one in parser._actions if f"--{name.replace('_', '-')}" in one.option_strings)
        try:
            unread.check(argparse.Namespace(**defaults | {action.dest: "something else"}))
            wrong.append(name)
        except ConfigError as error:
            if f"{action.option_strings[0]} is something else" not in str(error):
                wrong.append(f"{name}: {error}")
    return wrong


def test_every_flag_of_the_tables_is_refused():
    (wrong,) = ranks.run(flags_that_are_not_refused, 1, distributed=False)
    assert not wrong


def test_the_wheel_reads_none_of_the_leftovers():
    """But for its parser, and its configurations, which say what there is."""
    from megatron_scmoe.training.unread_flags import LEFTOVERS

    names = [name for name, reason in LEFTOVERS.items() if reason == "nothing reads it"]
    assert len(names) > 5
    reads = re.compile(rf"args\.({'|'.join(names)}|seq_length)\b|config\.({'|'.join(names)})\b")
    found = set()
    for root in importlib.util.find_spec("megatron").submodule_search_locations:
        for path in Path(root).rglob("*.py"):
            if path.name not in ("arguments.py", "yaml_arguments.py"):
                found |= {one or other for one, other in reads.findall(path.read_text(encoding="utf-8"))}
    assert found == {"seq_length"}  # negative control: what is read is found


@pytest.mark.parametrize("damage", ["no change", "half an index", "no index", "half the tokens", "no tokens"])
def test_a_damaged_dataset_is_refused(tmp_path, damage):
    prefix = tmp_path / "data"
    ranks.run(write_dataset, 1, str(prefix), distributed=False)
    path = prefix.with_suffix(".idx" if "index" in damage else ".bin")
    content = path.read_bytes()
    path.write_bytes({"no": b"", "half": content[: len(content) // 2]}.get(damage.split()[0], b""))
    flags = with_flags(without_flag(SCMOE, "--mock-data"), f"--data-path {prefix}", "--split 90,10,0")
    if damage == "no change":
        path.write_bytes(content)
        entry.assert_accepted(
            [flags, with_flags(without_flag(flags, "--data-path"), f"--train-data-path {prefix}", "--eval-iters 0")]
        )
    else:
        entry.assert_refused([(flags, [str(path), "write it anew with tools/preprocess_data.py"])])


def write_dataset(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(500))
    for index in range(40):
        builder.add_document(numpy.full(20, index, dtype=numpy.int32), [20])
    builder.finalize(prefix + ".idx")


def write_short_documents(prefix: str, end_of_document: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder, random = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(64)), numpy.random.default_rng(0)
    for _ in range(400):
        builder.add_document(numpy.array([*random.integers(1, 60, 3), end_of_document], dtype=numpy.int32), [4])
    builder.finalize(prefix + ".idx")


def test_a_mask_of_documents_has_an_effect_where_it_is_accepted(tmp_path):
    """Without it tokens see the documents before theirs; 62 is the end of a document to this tokenizer."""
    prefix = str(tmp_path / "data")
    ranks.run(write_short_documents, 1, prefix, 62, distributed=False)
    flags = without_flag(without_flag(SCMOE, "--mock-data"), "--no-create-attention-mask-in-dataloader")
    flags = with_flags(flags, f"--data-path {prefix}", "--split 80,20,0", "--train-iters 1")
    losses = []
    for number, change in enumerate([[], ["--reset-attention-mask"]]):
        log = tmp_path / str(number)
        (printed,) = ranks.run(training.train, 1, with_flags(flags, *change, f"--tensorboard-dir {log}"))
        assert "exit code" not in printed, printed[-2000:]
        losses.append(training.scalars(log, "lm loss")["lm loss"][1])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_files_in_the_place_of_folders_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    words = ["files in a folder", "give another folder"]
    places = (f"--overlap-report {file}", f"--tensorboard-dir {file}", f"--tensorboard-dir {tmp_path}/loop")
    places += (f"--save {file}/new", f"--save {tmp_path}/loop", f"--save {tmp_path}/link")
    load = (with_flags(SCMOE, f"--load {file}"), ["a checkpoint is a folder", "the folder that --save wrote"])
    saving = "--save-interval 1"
    folders = (with_flags(SCMOE, place, *[saving] * place.startswith("--save")) for place in places)
    entry.assert_refused([*((flags, words) for flags in folders), load])
    assert file.read_text() == "mine"


def test_a_signal_and_asynchronous_saves_do_not_go_together(tmp_path):
    flags = with_flags(SCMOE, f"--save {tmp_path}", "--save-interval 1", "--async-save")
    words = ["--async-save and --exit-signal-handler are set; drop one"]
    entry.assert_refused([(with_flags(flags, "--exit-signal-handler"), words)])
    entry.assert_accepted([with_flags(flags, "--use-persistent-ckpt-worker")])


def test_what_megatron_would_turn_off_or_end_at_is_refused(tmp_path):
    flags = with_flags(SCMOE, f"--save {tmp_path}", "--save-interval 1", "--async-save")
    lacks_process = ["--async-save is set and --use-persistent-ckpt-worker is not", "add --use-persistent-ckpt-worker"]
    lacks_interval = ["--eval-interval is not set and --eval-iters is 1", "set --eval-interval"]
    at = SCMOE.index("--eval-interval")
    without = SCMOE[:at] + SCMOE[at + 2 :]
    entry.assert_refused([(flags, lacks_process), (without, lacks_interval)])


@pytest.mark.parametrize("restarts", ["TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"])
def test_a_restart_that_would_begin_anew_is_refused(tmp_path, restarts):
    flags = with_flags(SCMOE, f"--save {tmp_path}", "--save-interval 1")
    goes_on = with_flags(flags, f"--load {tmp_path}")
    refused = [
        (flags, [f"{restarts} is 2 and --load is None and --save is {tmp_path}; use --load {tmp_path}"]),
        (with_flags(flags, "--load elsewhere"), ["--load is elsewhere and --save is"]),
        (with_flags(goes_on, "--finetune"), [f"{restarts} is 2 and --finetune is set"]),
        (with_flags(goes_on, "--ckpt-step 5"), ["--ckpt-step is 5", "--pretrained-checkpoint"]),
    ]
    entry.assert_refused(refused, {restarts: "2"})
    entry.assert_accepted([goes_on, SCMOE], {restarts: "2"})
    entry.assert_accepted([flags], {restarts: "0"})


@pytest.mark.parametrize("damage", ["common.pt", ".metadata"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    flags = with_flags(SCMOE, "--train-iters 1", f"--save {tmp_path}", "--save-interval 1", "--ckpt-format torch_dist")
    ranks.run(training.train, 1, flags)
    words = [f"step 1 in {tmp_path} is damaged: {damage} ", "no older one is whole; give another --load"]
    (tmp_path / "iter_0000001" / damage).write_bytes(b"")
    entry.assert_refused([(with_flags(SCMOE, f"--load {tmp_path}"), words)])


def test_a_vocabulary_is_padded_as_in_the_checkpoint(tmp_path):
    """Other sizes pad 600 tokens to 768 rows, of which 128 were never trained: the loss would jump."""
    flags = with_flags(SCMOE, "--vocab-size 600", "--train-iters 3", "--ckpt-format torch_dist", "--bf16")
    ranks.run(training.train, 1, with_flags(flags, f"--save {tmp_path}/c", "--save-interval 2"))
    load = with_flags(flags, f"--load {tmp_path}/c", "--ckpt-step 2", "--no-load-optim", "--no-load-rng")
    other = "--make-vocab-size-divisible-by 256"
    pretrained = with_flags(flags, f"--pretrained-checkpoint {tmp_path}/c")
    printed = ranks.run(training.train, 1, with_flags(pretrained, other, "--train-iters 1"))[0]
    assert "vocabulary padded to 640 rows, as in the checkpoint, and not to 768" in printed
    assert "exit code" not in printed
    losses = {}
    for name, change in {"same": [], "other": [other]}.items():
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
