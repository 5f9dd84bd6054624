"""Tokenizers and other small files go where the model goes, and what stays behind is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import commands
import pytest
from test_longcat import ROOT, convert, score

TEXT = "the quick brown fox jumps over the lazy dog"
GENERATION = b'{"eos_token_id": 1, "temperature": 0.7}\n'


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    """A dense model with a tokenizer of its own, settings for generation, and files that no checkpoint needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("companions") / "llama"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", *dict.fromkeys(TEXT.split())])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(GENERATION)
    (folder / "README.md").write_text("about it")
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    (folder / "figures").mkdir()
    return folder


def companions_of(folder: Path) -> dict[str, bytes]:
    """Files of the tokenizer and for generation; there are at least four."""
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    names |= {"generation_config.json"}
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture(scope="module")
def converted(llama_folder, tmp_path_factory) -> Path:
    save = tmp_path_factory.mktemp("companions") / "scmoe"
    done = convert("hf-dense", "megatron", llama_folder, save, "--experts", "2", "--skip-change")
    assert done.returncode == 0, done.stderr[-2000:]
    return save


def test_a_tokenizer_comes_along_into_megatron(llama_folder, converted):
    """Every file as it was, and AutoTokenizer finds it, as --tokenizer-type HuggingFaceTokenizer does."""
    from transformers import AutoTokenizer

    expected = companions_of(llama_folder)
    assert len(expected) >= 4
    assert {path.name: path.read_bytes() for path in (converted / "tokenizer").iterdir()} == expected
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (llama_folder, converted / "tokenizer"))
    assert one(TEXT)["input_ids"] == other(TEXT)["input_ids"] and len(one(TEXT)["input_ids"]) == 9
    hashed = {entry["path"] for entry in json.loads((converted / "conversion.json").read_text())["files"]}
    assert {f"tokenizer/{name}" for name in expected} <= hashed


def test_the_receipt_says_what_to_train_with_and_what_stayed(converted):
    notes = json.loads((converted / "conversion.json").read_text())["notes"]
    assert any("--tokenizer-type HuggingFaceTokenizer --tokenizer-model SAVED/tokenizer" in note for note in notes)
    assert "left behind: README.md, figures, modeling_mine.py" in notes


def test_it_goes_on_into_every_other_folder(llama_folder, converted, tmp_path):
    """To the other spec, and from there to Hugging Face, byte for byte."""
    done = convert("megatron", "megatron", converted, tmp_path / "te", "--transformer-impl", "transformer_engine")
    assert done.returncode == 0, done.stderr[-2000:]
    done = convert("megatron", "hf-scmoe", tmp_path / "te", tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-2000:]
    assert companions_of(tmp_path / "hf") == companions_of(llama_folder)
    assert not (tmp_path / "hf/README.md").exists() and "no tokenizer" not in done.stdout


def test_what_training_used_comes_before_what_came_along(converted, tmp_path):
    """Saved arguments that name a tokenizer are those of a run; the folder beside the weights is older."""
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.mappings.tokenizer import tokenizer_of

    source = MegatronCheckpoint(converted)
    assert tokenizer_of(source).files["generation_config.json"] == GENERATION
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    source.args.tokenizer_type, source.args.tokenizer_model = "HuggingFaceTokenizer", str(tmp_path)
    assert tokenizer_of(source).files == {"tokenizer_config.json": b"{}"}
    source.args.tokenizer_model = str(tmp_path / "gone")
    found = tokenizer_of(source)
    assert not found.files and "gone" in found.notes[0]


def test_a_folder_that_is_not_beside_a_checkpoint_is_none_of_it(converted, tmp_path):
    """The weights of one iteration, moved to a place where something else is called tokenizer."""
    from checkpoints.disk.torch_dist import MegatronCheckpoint
    from checkpoints.mappings.tokenizer import tokenizer_of

    shutil.copytree(converted / "release", tmp_path / "release")
    shutil.copytree(converted / "tokenizer", tmp_path / "tokenizer")
    assert not tokenizer_of(MegatronCheckpoint(tmp_path / "release")).files
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert tokenizer_of(MegatronCheckpoint(tmp_path / "release")).files  # negative control


def test_files_of_other_folders_are_not_taken(llama_folder, tmp_path):
    """A link out of the folder, no regular file, one that is too large: one line, and nothing is written."""
    secret = tmp_path / "secret"
    secret.write_text("something private")
    for words, make in {
        "leads out of its folder": lambda path: path.symlink_to(secret),
        "is no file": lambda path: path.mkdir(),
        "too many for its name": lambda path: path.open("wb").truncate((1 << 28) + 1),
    }.items():
        folder = tmp_path / "hf"
        shutil.copytree(llama_folder, folder)
        (folder / "tokenizer.json").unlink()
        make(folder / "tokenizer.json")
        done = convert("hf-dense", "megatron", folder, tmp_path / "scmoe", "--experts", "2", "--skip-change")
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1
        shutil.rmtree(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_links_of_the_hub_s_cache_are_followed(llama_folder, tmp_path):
    """Its folders are links to files that are named by their hash."""
    from checkpoints.disk.companions import companions

    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shutil.copy(llama_folder / "tokenizer.json", blobs / "123")
    (snapshot / "tokenizer.json").symlink_to(blobs / "123")
    assert companions(snapshot) == {"tokenizer.json": (blobs / "123").read_bytes()}


def test_a_source_without_a_tokenizer_is_a_note(llama_folder, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(llama_folder, folder)
    for name in companions_of(folder):
        (folder / name).unlink()
    save = tmp_path / "scmoe"
    done = convert("hf-dense", "megatron", folder, save, "--experts", "2", "--skip-change")
    assert done.returncode == 0 and "note: the source has no tokenizer_config.json" in done.stdout
    assert [path.name for path in (save / "tokenizer").iterdir()] == ["generation_config.json"]  # of config.json's ids


def test_text_is_scored_with_the_tokenizer_that_came_along(llama_folder, converted, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = {
        name: ["--input", str(tmp_path / "text.txt"), "--load", str(folder), "--output", str(tmp_path / name)]
        for name, folder in (("source", llama_folder), ("target", converted))
    }
    assert score.main(words["source"]) == 0  # here, since Megatron's CPU backend is in the processes of commands
    done = commands.run(ROOT / "tools/score.py", *words["target"])
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [json.loads((tmp_path / name / "summary.json").read_text())["total"]["tokens"] for name in words]
    assert counts[0] == counts[1] > 0
