"""tools/score.py: losses are those of the entry script's model, on any layout, and every token is scored once."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy
import pytest
import ranks
import torch
import training
from cases import cases
from training import ROOT, SCMOE, STOCK, with_flags, without_flag

TOOL = ROOT / "tools" / "score.py"
sys.path.insert(0, str(TOOL.parent))
import score  # noqa: E402
from scoring import inputs, windows  # noqa: E402

VOCABULARY, LENGTH = 320, 16
SMALL = [f"--vocab-size {VOCABULARY}", "--make-vocab-size-divisible-by 8", "--train-iters 1"]
MOE_FLAGS = [flag for flag in STOCK if flag.startswith("--moe")] + ["--num-experts"]
DENSE = STOCK
for flag in MOE_FLAGS:
    DENSE = without_flag(DENSE, flag)
MODELS = {
    "scmoe": with_flags(SCMOE, *SMALL),
    "scmoe cg2, pos1 and pos3": with_flags(SCMOE, *SMALL, "--shortcut-combine cg2", "--shortcut-position pos1 pos3"),
    "dgmoe-share": with_flags(
        without_flag(SCMOE, "--moe-shared-expert-intermediate-size"),
        *SMALL,
        "--shortcut dgmoe",
        "--moe-router-topk 2",
        "--moe-share-groups 2",
    ),
    "stock": with_flags(STOCK, *SMALL, "--moe-layer-freq [0,1]*2", "--moe-shared-expert-gate"),
    "stock, all blocks alike": with_flags(STOCK, *SMALL, "--moe-router-topk 2"),
    "dense": with_flags(DENSE, *SMALL),
}
EXPERT_TENSOR_1 = ["--expert-tensor-parallel-size", "1"]
LAYOUTS = {
    "dp2": (2, []),
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
    "tp2": (2, ["--tensor-model-parallel-size", "2", *EXPERT_TENSOR_1]),
    "expert tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "tp2 ep2": (4, ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", *EXPERT_TENSOR_1]),
    "pp2 ep2": (4, ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]),
}


# --- set-up ------------------------------------------------------------------------------------------------------


def train(flags):
    (printed,) = ranks.run(training.train, 1, flags, timeout_s=240)
    assert "exit code" not in printed, printed[-3000:]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a checkpoint by the name of its model; each is trained once."""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def checkpoint(name):
        if name not in made:
            made[name] = folder / str(len(made))
            train([*MODELS[name], "--save", str(made[name]), "--save-interval", "1"])
        return made[name]

    return checkpoint


def call(argv):
    """On a rank: the tool's exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = score.main([str(word) for word in argv])
        except SystemExit as error:
            code = error.code
    return code, said.getvalue()


def run_tool(*argv, num_ranks=1):
    """Exit code and output of the first rank; 0 ranks: of this process, which has not replaced CUDA for Megatron."""
    if not num_ranks:
        return call(argv)
    return ranks.run(call, num_ranks, argv, timeout_s=60)[0]


def scores(folder, *argv, output, num_ranks=1):
    code, said = run_tool("--load", folder, "--output", output, *argv, num_ranks=num_ranks)
    assert code == 0, said
    return json.loads((output / "summary.json").read_text()), said


def arrays(output, name):
    with numpy.load(next(output.glob(f"*-{name}.losses.npz"))) as found:
        return dict(found)


def logits_of(output, name):
    return numpy.load(next(output.glob(f"*-{name}.logits.npy")))


def random_ids(*shape, seed=3):
    return numpy.random.default_rng(seed).integers(VOCABULARY, size=shape, dtype=numpy.int32)


def entry_script_losses(flags, tokens, labels):
    """What the model of the entry script, with Megatron's own loading, gives for tokens and labels [b, s]."""
    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags, "--finetune"]
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_scmoe.models.gpt import ScMoEGPTModelBuilder, model_config_from_args
    from megatron_scmoe.training.arguments import parse_and_validate_args

    with contextlib.redirect_stdout(io.StringIO()):
        args, scmoe, _ = parse_and_validate_args()
        initialize_megatron(allow_no_cuda=True)
        builder = ScMoEGPTModelBuilder if scmoe.enabled else GPTModelBuilder
        model = builder(model_config_from_args(args, scmoe)).build_model(
            ProcessGroupCollection.use_mpu_process_groups()
        )
        load_checkpoint([model], None, None)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model.eval()(tokens, positions, None, labels=labels)


def convert(source, folder, target, *more):
    """Make a Megatron checkpoint of a folder, in a process of its own; returns the exit code."""
    words = ["--from", source, "--to", "megatron", "--load", folder, "--save", target, *more]
    return commands.run(ROOT / "tools/convert_checkpoint.py", *words).returncode


# --- the numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_entry_script(tmp_path, checkpoints, name):
    rows = random_ids(4, LENGTH + 1)
    numpy.save(tmp_path / "rows.npy", rows)
    summary, _ = scores(checkpoints(name), "--input", tmp_path / "rows.npy", output=tmp_path / "out")
    found = arrays(tmp_path / "out", "rows")
    ids = torch.from_numpy(rows).long()
    flags = [*MODELS[name], "--load", str(checkpoints(name))]
    (expected,) = ranks.run(entry_script_losses, 1, flags, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    losses = found["losses"].reshape(4, LENGTH + 1)
    assert numpy.isnan(losses[:, 0]).all()
    assert numpy.abs(losses[:, 1:] - expected.numpy()).max() < 1e-6
    assert summary["total"]["perplexity"] == pytest.approx(math.exp(expected.double().mean()), rel=1e-6)
    assert summary["total"]["scored_tokens"] == 4 * LENGTH and summary["total"]["not_finite"] == 0


def test_another_wiring_of_the_same_weights_is_noticed(checkpoints, tmp_path):
    """Negative control of the test above: the same tensors at another position give other losses."""
    rows = random_ids(4, LENGTH + 1)
    ids = torch.from_numpy(rows).long()
    flags = [*MODELS["scmoe"], "--load", str(checkpoints("scmoe"))]
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    (one,) = ranks.run(entry_script_losses, 1, flags, *batch)
    (other,) = ranks.run(entry_script_losses, 1, [*flags, "--shortcut-position", "pos3"], *batch)
    assert (one - other).abs().max() > 1e-4


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    numpy.save(folder / "line.npy", random_ids(75))
    numpy.save(folder / "rows.npy", random_ids(5, 12, seed=4).astype(numpy.int64))
    return folder / "line.npy", folder / "rows.npy"


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory, checkpoints, two_files):
    output = tmp_path_factory.mktemp("one") / "out"
    scores(checkpoints("scmoe"), "--input", *two_files, "--stride", 10, "--logits", output=output)
    return output


@pytest.mark.parametrize("layout", cases(LAYOUTS, ["expert tp2", "tp2 ep2", "pp2 ep2"]))
def test_every_layout_gives_the_same(tmp_path, checkpoints, two_files, on_one_rank, layout):
    num_ranks, flags = LAYOUTS[layout]
    argv = ["--input", *two_files, "--stride", 10, "--logits", "--micro-batch-size", 3, *flags]
    summary, _ = scores(checkpoints("scmoe"), *argv, output=tmp_path / "out", num_ranks=num_ranks)
    assert summary["settings"]["layout"]["world_size"] == num_ranks
    for name in ("line", "rows"):
        one, other = (arrays(folder, name) for folder in (on_one_rank, tmp_path / "out"))
        assert one.keys() == other.keys() == {"ids", "losses", "offsets", "windows"}
        assert all(numpy.array_equal(one[key], other[key]) for key in ("ids", "offsets", "windows"))
        numpy.testing.assert_allclose(one["losses"], other["losses"], atol=1e-5, rtol=0)
        numpy.testing.assert_allclose(logits_of(on_one_rank, name), logits_of(tmp_path / "out", name), atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "name"),
    cases(itertools.product(("tp2", "pp2"), ("stock", "dense")), [("tp2", "stock"), ("pp2", "dense")]),
)
def test_stock_models_too(tmp_path, checkpoints, two_files, name, layout):
    num_ranks, flags = LAYOUTS[layout]
    scores(checkpoints(name), "--input", *two_files, output=tmp_path / "one")
    scores(checkpoints(name), "--input", *two_files, *flags, output=tmp_path / "two", num_ranks=num_ranks)
    one, two = (arrays(tmp_path / folder, "line")["losses"] for folder in ("one", "two"))
    numpy.testing.assert_allclose(one, two, atol=1e-5, rtol=0)


def test_perplexity_by_hand(on_one_rank):
    """Losses from the logits by numpy, perplexity from those losses: by file and of both."""
    summary = json.loads((on_one_rank / "summary.json").read_text())
    by_hand = {}
    for name in ("line", "rows"):
        found, logits = arrays(on_one_rank, name), logits_of(on_one_rank, name).astype(numpy.float64)
        assert logits.shape == (len(found["ids"]), VOCABULARY)
        scored = numpy.ones(len(found["ids"]), dtype=bool)
        scored[found["offsets"][:-1]] = False
        assert numpy.isnan(logits[~scored]).all() and numpy.isnan(found["losses"][~scored]).all()
        chosen = logits[numpy.arange(len(logits)), found["ids"]]
        losses = (numpy.log(numpy.exp(logits).sum(axis=1)) - chosen)[scored]
        numpy.testing.assert_allclose(found["losses"][scored], losses, atol=1e-5)
        by_hand[name] = losses
    for entry, losses in zip(summary["files"], by_hand.values(), strict=True):
        assert entry["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert entry["scored_tokens"] == len(losses)
    both = numpy.concatenate(list(by_hand.values()))
    assert summary["total"]["perplexity"] == pytest.approx(math.exp(both.mean()), rel=1e-5)
    assert summary["total"]["bits_per_byte"] is None  # no text, no bytes


def test_a_window_gives_what_its_tokens_alone_give(tmp_path, checkpoints):
    """Stride 3: the loss of a token is that of the last token of its own context."""
    ids = random_ids(24)
    numpy.save(tmp_path / "whole.npy", ids)
    scores(checkpoints("scmoe"), "--input", tmp_path / "whole.npy", "--stride", 3, output=tmp_path / "whole")
    found = arrays(tmp_path / "whole", "whole")
    begin, first, end = found["windows"][2].tolist()
    assert (begin, first, end) == (6, 20, 23)
    numpy.save(tmp_path / "part.npy", ids[begin:end])
    scores(checkpoints("scmoe"), "--input", tmp_path / "part.npy", output=tmp_path / "part")
    part = arrays(tmp_path / "part", "part")["losses"]
    numpy.testing.assert_allclose(found["losses"][first:end], part[first - begin :], atol=1e-5)
    assert numpy.abs(found["losses"][first:end] - part[1 : 1 + end - first]).max() > 1e-3  # those of other tokens


def test_bf16_is_near_and_not_the_same(tmp_path, checkpoints, two_files):
    for dtype in ("stored", "fp32", "bf16"):
        argv = ["--input", two_files[0], "--dtype", dtype]
        scores(checkpoints("scmoe"), *argv, output=tmp_path / dtype)
    stored, fp32, bf16 = (arrays(tmp_path / dtype, "line")["losses"][1:] for dtype in ("stored", "fp32", "bf16"))
    assert numpy.array_equal(stored, fp32)
    assert 1e-5 < numpy.abs(fp32 - bf16).max() < 0.2


def test_the_codec_of_training_is_off(tmp_path):
    """--a2a-codec lsh with learned compensation: the same losses as without it, and the maps are no obstacle."""
    codec = ["--a2a-codec lsh", "--lsh-hashes 1", "--lsh-compensation lowrank"]
    flags = with_flags(MODELS["scmoe"], *codec, f"--save {tmp_path / 'save'}", "--save-interval 1")
    train(flags)
    rows = random_ids(4, LENGTH + 1)
    numpy.save(tmp_path / "rows.npy", rows)
    scores(tmp_path / "save", "--input", tmp_path / "rows.npy", output=tmp_path / "out")
    losses = arrays(tmp_path / "out", "rows")["losses"].reshape(4, LENGTH + 1)[:, 1:]
    ids = torch.from_numpy(rows).long()
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    (without,) = ranks.run(entry_script_losses, 1, [*MODELS["scmoe"], "--load", str(tmp_path / "save")], *batch)
    loading = with_flags(flags, f"--load {tmp_path / 'save'}")
    (in_evaluation,) = ranks.run(entry_script_losses, 1, loading, *batch)
    (with_codec,) = ranks.run(entry_script_losses, 1, with_flags(loading, "--lsh-evaluation centroids"), *batch)
    assert numpy.abs(losses - without.numpy()).max() < 1e-6
    assert torch.equal(in_evaluation, without)  # which is off in evaluation, too
    assert numpy.abs(losses - with_codec.numpy()).max() > 1e-6  # it does change what is computed


def test_a_checkpoint_of_the_other_spec(tmp_path, checkpoints, two_files):
    """Norms have other names under Transformer Engine's spec; the losses are the same bits."""
    assert (
        convert("megatron", checkpoints("scmoe"), tmp_path / "fused", "--transformer-impl", "transformer_engine") == 0
    )
    for name, folder in (("local", checkpoints("scmoe")), ("fused", tmp_path / "fused")):
        scores(folder, "--input", two_files[0], output=tmp_path / f"{name}-out")
    local, fused = (arrays(tmp_path / f"{name}-out", "line")["losses"][1:] for name in ("local", "fused"))
    assert numpy.array_equal(local, fused)


def test_longcat_here_and_there(tmp_path, two_files):
    """LongCat-Flash on one rank of transformers, and converted on two ranks of Megatron's."""
    pytest.importorskip("transformers")
    longcat(tmp_path / "there")
    assert convert("hf-longcat", tmp_path / "there", tmp_path / "here") == 0
    argv = ["--input", *two_files, "--seq-length", 32]
    there, _ = scores(tmp_path / "there", *argv, output=tmp_path / "a", num_ranks=0)
    layout = ["--expert-model-parallel-size", 2]
    here, _ = scores(tmp_path / "here", *argv, *layout, output=tmp_path / "b", num_ranks=2)
    assert here["total"]["loss"] == pytest.approx(there["total"]["loss"], abs=1e-6)
    one, other = (arrays(tmp_path / folder, "line")["losses"] for folder in "ab")
    numpy.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


# --- windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 23])
def test_every_token_is_scored_once(length, size):
    offsets = numpy.array([0, size, size, size + 3], dtype=numpy.int64)
    for stride in range(1, length + 1):
        planned = windows.plan(offsets, length, stride)
        scored = [token for begin, first, end in planned for token in range(first, end)]
        assert sorted(scored) == [*range(1, size), size + 1, size + 2]
        assert all(0 <= window.begin < window.first and window.length <= length for window in planned)
        of_first = [window for window in planned if window.end <= size]
        for earlier, later in itertools.pairwise(of_first):
            assert later.begin - earlier.begin == stride
            assert later.first - later.begin == length + 1 - stride


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_ranks_share_the_windows(data_size):
    ids = numpy.arange(50, dtype=numpy.int32)
    planned = windows.plan(numpy.array([0, 9, 40, 50]), 8, 5)
    dealt = [
        list(windows.batches(ids, planned, micro_batches=2, size=2, data_rank=rank, data_size=data_size, multiple=3))
        for rank in range(data_size)
    ]
    assert len({len(batches) for batches in dealt}) == 1  # no rank waits for one that has no more
    for of_ranks in zip(*dealt, strict=True):
        assert len({batch.tokens.shape for batch in of_ranks}) == 1
    seen = []
    for batches in dealt:
        for batch in batches:
            assert batch.tokens.shape[2] % 3 == 0
            for micro_batch, row, window in batch.windows:
                seen.append(window)
                assert batch.tokens[micro_batch, row, : window.length].tolist() == list(
                    range(window.begin, window.end - 1)
                )
                assert batch.labels[micro_batch, row, : window.length].tolist() == list(
                    range(window.begin + 1, window.end)
                )
    assert sorted(seen) == sorted(planned)


# --- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(f"line {n} says what line {n - 1} said" for n in range(200)))
    words = ["--input", folder / "text.txt", "--output", folder / "data", "--vocab-size", "300"]
    assert commands.run(ROOT / "tools/preprocess_data.py", *words).returncode == 0
    return folder / "data" / "tokenizer.model"


def test_text(tmp_path, checkpoints, tokenizer):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    (tmp_path / "a.txt").write_text("line 7 says nothing\n\u00e9\n")
    lines = ["one line", "another line, which is longer than a window of sixteen tokens: line line line line"]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": line}) + "\n\n" for line in lines))
    argv = ["--input", tmp_path / "a.txt", tmp_path / "b.jsonl", "--tokenizer", tokenizer, "--json-key", "body"]
    summary, said = scores(checkpoints("scmoe"), *argv, output=tmp_path / "out")
    text = arrays(tmp_path / "out", "a")
    assert text["ids"].tolist() == [processor.eos_id(), *processor.encode((tmp_path / "a.txt").read_text())]
    documents = arrays(tmp_path / "out", "b")
    encoded = [[processor.eos_id(), *processor.encode(line)] for line in lines]
    assert documents["ids"].tolist() == encoded[0] + encoded[1]
    assert documents["offsets"].tolist() == [0, len(encoded[0]), len(encoded[0]) + len(encoded[1])]
    for entry, found, num_bytes in (
        (summary["files"][0], text, len((tmp_path / "a.txt").read_bytes())),
        (summary["files"][1], documents, sum(map(len, lines))),
    ):
        assert entry["scored_tokens"] == len(found["ids"]) - entry["documents"] == numpy.isfinite(found["losses"]).sum()
        assert entry["bytes"] == num_bytes
        bits = numpy.nansum(found["losses"], dtype=numpy.float64) / math.log(2) / num_bytes
        assert entry["bits_per_byte"] == pytest.approx(bits)
    assert "bits/byte" in said and "a.txt" in said


def test_tokenizers_of_folders(tmp_path, tokenizer):
    """A SentencePiece model in a folder, and a folder of Hugging Face."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "a").mkdir()
    shutil.copy(tokenizer, tmp_path / "a" / "tokenizer.model")
    one, other = (inputs.find_tokenizer(path, tmp_path / "a", None) for path in (str(tokenizer), None))
    assert one.encode("line 7") == other.encode("line 7") and one.separator == other.separator is not None
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "line": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path / "b")
    found = inputs.find_tokenizer(None, tmp_path / "b", None)
    assert (found.encode("line <s> x"), found.separator, found.vocab_size) == ([1, 0, 2], 0, 3)
    # Megatron ends documents with EOS, and knows no BOS.
    words.add_special_tokens(["</s>"])
    both = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    both.save_pretrained(tmp_path / "c")
    trained = SimpleNamespace(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "c"))
    converted = SimpleNamespace(tokenizer_type=None, tokenizer_model=None)
    for named, saved, separator in ((None, trained, 3), ("c", trained, 3), ("c", converted, 0), ("c", None, 0)):
        name = named and str(tmp_path / named)
        assert inputs.find_tokenizer(name, tmp_path, saved).separator == separator


def test_under_torchrun(tmp_path, checkpoints, two_files):
    """As a user runs it, once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TOOL]
    argv = ["--load", checkpoints("scmoe"), "--input", two_files[0], "--expert-model-parallel-size", "2"]
    done = subprocess.run([*command, *argv, "--output", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: ") == 1
    scores(checkpoints("scmoe"), "--input", two_files[0], output=tmp_path / "one")
    one, two = (arrays(tmp_path / folder, "line")["losses"] for folder in ("one", "out"))
    numpy.testing.assert_allclose(one, two, atol=1e-5, rtol=0)


# --- Hugging Face ------------------------------------------------------------------------------------------------


def longcat(folder):
    """A tiny LongcatFlash folder."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_hugging_face_folder(tmp_path):
    pytest.importorskip("transformers")
    model = longcat(tmp_path / "folder")
    rows = random_ids(3, 13)
    numpy.save(tmp_path / "rows.npy", rows)
    argv = ["--input", tmp_path / "rows.npy", "--seq-length", 16, "--logits"]
    summary, _ = scores(tmp_path / "folder", *argv, output=tmp_path / "out", num_ranks=0)
    ids = torch.from_numpy(rows).long()
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits
    found = logits_of(tmp_path / "out", "rows").reshape(3, 13, VOCABULARY)[:, 1:]
    numpy.testing.assert_allclose(found, logits.numpy(), atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert summary["total"]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_hugging_face_folder_beside_megatron_is_refused(tmp_path):
    """With CUDA replaced, transformers leaves RoPE's frequencies uninitialised."""
    pytest.importorskip("transformers")
    longcat(tmp_path / "folder")
    numpy.save(tmp_path / "rows.npy", random_ids(3, 13))
    argv = ["--load", tmp_path / "folder", "--input", tmp_path / "rows.npy", "--output", tmp_path / "out"]
    assert "another process" in refused(tmp_path, *argv)


def test_code_in_a_folder_does_not_run_unless_it_is_trusted(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "folder"
    longcat(folder)
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('\\x1b[2J and')\n"
    (folder / "evil.py").write_text(evil)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    numpy.save(tmp_path / "ids.npy", random_ids(9))
    argv = ["--load", folder, "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    code, said = run_tool(*argv, num_ranks=0)
    assert code == 2 and "add --trust-remote-code" in said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    code, said = run_tool(*argv, "--trust-remote-code", num_ranks=0)
    assert code == 2 and "transformers cannot load" in said  # negative control: trusted code does run
    assert (tmp_path / "ran").exists()
    assert "\\x1b[2J and" in said and "\x1b" not in said  # what it says reaches no terminal unescaped


OUR_MAP = {
    "AutoConfig": "configuration_scmoe.ScMoEConfig",
    "AutoModel": "modeling_scmoe.ScMoEModel",
    "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
}
FOLDERS = {
    # auto_map, other files -> may run without trust; None: says that it may not
    "ours": (OUR_MAP, [], True),
    "no code": (None, [], False),
    "changed": (OUR_MAP, ["modeling_scmoe.py"], None),
    "another file": (OUR_MAP, ["evil.py"], None),
    "a folder below": ({"AutoModelForCausalLM": "sub/evil.C"}, ["sub/evil.py"], None),
    "another folder": ({**OUR_MAP, "AutoModel": "../evil.C"}, [], None),
    "the Hub": ({"AutoModelForCausalLM": "repository--module.C"}, [], None),
    "custom generation": (OUR_MAP, ["custom_generate/generate.py"], None),
}


@pytest.mark.parametrize(("auto_map", "files", "may_run"), FOLDERS.values(), ids=FOLDERS)
def test_no_code_but_ours_runs_without_trust(tmp_path, auto_map, files, may_run):
    """transformers takes classes from folders below and elsewhere, and runs custom_generate where code is trusted."""
    from checkpoints.running import model
    from checkpoints.tensors import CheckpointError

    if auto_map == OUR_MAP:
        for name in ("configuration_scmoe.py", "modeling_scmoe.py"):
            shutil.copy(TOOL.parent / "checkpoints/mappings/hf_scmoe" / name, tmp_path)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit")
    config = {} if auto_map is None else {"auto_map": auto_map}
    if may_run is not None:
        assert model._own_code_may_run(tmp_path, config, trust=False) == may_run
    else:
        with pytest.raises(CheckpointError, match="then add --trust-remote-code"):
            model._own_code_may_run(tmp_path, config, trust=False)
        assert model._own_code_may_run(tmp_path, config, trust=True)


def test_a_result_is_made_without_git(monkeypatch):
    import provenance

    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance.commit() == {"commit": "unknown", "changed_files": 0}


def test_missing_weights_are_not_random(tmp_path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    longcat(tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlps.1.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    numpy.save(tmp_path / "ids.npy", random_ids(9))
    argv = ["--load", tmp_path / "folder", "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    code, said = run_tool(*argv, num_ranks=0)
    assert code == 2 and "model.layers.0.mlps.1.up_proj.weight" in said, said


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(tmp_path, *argv, num_ranks=1):
    """The one line that the tool says, having written nothing."""
    before = sorted(tmp_path.iterdir())
    code, said = run_tool(*argv, num_ranks=num_ranks)
    assert code == 2, said
    assert sorted(tmp_path.iterdir()) == before
    (line,) = [line for line in said.splitlines() if "error" in line]
    return line


BAD_INPUT = {
    "empty.txt": (b"", "empty"),
    "latin.txt": (b"caf\xe9", "not UTF-8"),
    "no-object.jsonl": (b"[1]\n", "not an object"),
    "no-key.jsonl": (b'{"body": "x"}\n', "no key 'text'"),
    "table.csv": (b"1,2\n", "is no .txt"),
    "no-array.npy": (b"PK", "no array"),
}
BAD_IDS = {
    "beyond": (numpy.array([1, VOCABULARY]), f"token 1 has id {VOCABULARY}"),
    "negative": (numpy.array([1, -1]), "0 or more"),
    "floats": (numpy.array([1.0, 2.0]), "whole numbers"),
    "cube": (numpy.zeros((2, 2, 2), dtype=numpy.int32), "whole numbers"),
    "single": (numpy.array([1]), "nothing to score"),
    "nothing": (numpy.zeros(0, dtype=numpy.int32), "nothing to score"),
    "objects": (numpy.array([{}], dtype=object), "no array"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(tmp_path, checkpoints, tokenizer, name):
    data, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(data)
    argv = ["--load", checkpoints("scmoe"), "--input", tmp_path / name, "--output", tmp_path / "out"]
    assert message in refused(tmp_path, *argv, "--tokenizer", tokenizer)


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids(tmp_path, checkpoints, name):
    ids, message = BAD_IDS[name]
    numpy.save(tmp_path / "ids.npy", ids, allow_pickle=True)
    argv = ["--load", checkpoints("scmoe"), "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    assert message in refused(tmp_path, *argv)


BAD_TOKENIZERS = {
    "no such model": '{"version": "1.0", "model": {"type": "Nope"}}',
    "no JSON": "{",
    "a list": "[]",
    "escape sequence": '{"version": "\\u001b[2J"}',
}


@pytest.mark.parametrize("name", BAD_TOKENIZERS)
def test_damaged_tokenizers(tmp_path, checkpoints, name):
    pytest.importorskip("transformers")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text(BAD_TOKENIZERS[name])
    argv = ["--load", checkpoints("scmoe"), "--input", tmp_path / "a.txt", "--output", tmp_path / "out"]
    message = refused(tmp_path, *argv, "--tokenizer", tmp_path / "words")
    assert "transformers cannot load its tokenizer" in message and message.endswith("; name another")
    assert message.isprintable()


def test_bad_requests(tmp_path, checkpoints):
    numpy.save(tmp_path / "ids.npy", random_ids(40))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "old").mkdir()
    good = {"--load": checkpoints("scmoe"), "--input": tmp_path / "ids.npy", "--output": tmp_path / "out"}

    def argv(**changes):
        words = good | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        return [word for pair in words.items() for word in pair]

    assert "is no folder" in refused(tmp_path, *argv(load=tmp_path / "gone"))
    assert "is no checkpoint" in refused(tmp_path, *argv(load=tmp_path / "old"))
    assert "exists" in refused(tmp_path, *argv(output=tmp_path / "old"))
    assert "a.txt is no folder" in refused(tmp_path, *argv(output=tmp_path / "a.txt" / "out"))
    assert "cannot be read" in refused(tmp_path, *argv(input=tmp_path / "gone.npy"))
    assert "NullTokenizer" in refused(tmp_path, *argv(input=tmp_path / "a.txt"))
    assert "is no tokenizer" in refused(tmp_path, *argv(input=tmp_path / "a.txt", tokenizer=tmp_path / "a.txt"))
    assert "16 positions" in refused(tmp_path, *argv(seq_length=17))
    assert "would leave tokens out" in refused(tmp_path, *argv(stride=17))
    assert "not a whole number" in refused(tmp_path, *argv(stride=0))
    assert "no code to trust" in refused(tmp_path, *argv(), "--trust-remote-code")
    assert "over 2 ranks" in refused(tmp_path, *argv(expert_model_parallel_size=2))
    line = refused(tmp_path, *argv(seq_length=15, tensor_model_parallel_size=2), num_ranks=2)
    assert "multiple of 2" in line
    line = refused(tmp_path, *argv(pipeline_model_parallel_size=4), num_ranks=4)
    assert "whole groups" in line


def test_a_damaged_checkpoint(tmp_path, checkpoints):
    numpy.save(tmp_path / "ids.npy", random_ids(40))
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("scmoe"), folder)
    path = max(folder.glob("iter_*/*.distcp"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-5000])
    argv = ["--load", folder, "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    assert "cut short" in refused(tmp_path, *argv)


def test_losses_that_are_not_finite(tmp_path):
    """They are written, named, and make the exit code 1."""
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    longcat(tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    numpy.save(tmp_path / "ids.npy", random_ids(9))
    argv = ["--load", tmp_path / "folder", "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    code, said = run_tool(*argv, num_ranks=0)
    assert code == 1 and "8 of 8 losses are not finite" in said, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["total"]["perplexity"] is None and summary["total"]["not_finite"] == 8


def test_logits_that_do_not_fit(tmp_path, checkpoints, monkeypatch):
    from preprocessing.sources import UserError
    from scoring import output

    assert isinstance(tmp_path, Path)
    tokens = type("Tokens", (), {"ids": numpy.zeros(1000)})()
    assert output.check_room(tmp_path / "new" / "out", [tokens], 10) == 40_000
    free = shutil.disk_usage(tmp_path)._replace(free=39_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    with pytest.raises(UserError, match="do not fit"):
        output.check_room(tmp_path / "new" / "out", [tokens], 10)


def interrupted(argv):
    """On a rank: the tool, stopped by SIGTERM while it scores."""

    def stopped(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    score.score_files = stopped
    return call(argv)


def test_a_run_that_is_stopped_leaves_nothing(tmp_path, checkpoints):
    numpy.save(tmp_path / "ids.npy", random_ids(40))
    argv = ["--load", checkpoints("scmoe"), "--input", tmp_path / "ids.npy", "--output", tmp_path / "out"]
    ((code, said),) = ranks.run(interrupted, 1, argv)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in said
    assert [path.name for path in tmp_path.iterdir()] == ["ids.npy"]
