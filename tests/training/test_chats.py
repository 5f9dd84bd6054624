"""--sft: chats of a JSONL file through a tokenizer's template, packed, and trained by the entry script."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import entry
import numpy
import pytest
import ranks
import training
from training import SCMOE, with_flags, without_flag

from megatron_scmoe.mcore.chats import Chats

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
SPECIAL = ("<s>", "</s>", "<pad>", *(f"<SPECIAL_{number}>" for number in (10, 11, 233)))
PAD = 256 + SPECIAL.index("<pad>")
SEQ_LENGTH = 48


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A token for each byte, and the special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def conversation(question: str, answer: str, system: str = "add") -> list[dict[str, str]]:
    roles = (("system", system), ("user", question), ("assistant", answer))
    return [{"role": role, "content": content} for role, content in roles]


def write_chats(path: Path, chats: list[list[dict[str, str]]]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> list[str]:
    """Flags of a run on sums: one or two conversations a line, of other lengths."""
    folder = tmp_path_factory.mktemp("chats")
    ranks.run(save_tokenizer, 1, folder / "tokenizer", distributed=False)
    drawn = random.Random(3)
    sums = [(drawn.randrange(9), drawn.randrange(9)) for _ in range(120)]
    talks = [conversation(f"{a}+{b}", str(a + b)) for a, b in sums]
    write_chats(folder / "chats.jsonl", [*talks[:40], *(a + b for a, b in zip(talks[40:80], talks[80:], strict=True))])
    flags = without_flag(without_flag(SCMOE, "--mock-data"), "--vocab-size")
    sizes = [f"--seq-length {SEQ_LENGTH}", f"--max-position-embeddings {SEQ_LENGTH}", "--split 90,10,0"]
    named = [
        "--tokenizer-type SFTTokenizer",
        f"--tokenizer-model {folder}/tokenizer",
        f"--data-path {folder}/chats.jsonl",
    ]
    return with_flags(flags, *sizes, *named, "--sft", "--sft-tokenizer-prompt-format default")


def samples(flags: list[str], number: int) -> list[dict[str, numpy.ndarray]]:
    """The first samples of the dataset that the entry script builds of ``flags``."""
    import contextlib
    import io
    import sys

    sys.argv[:] = ["pretrain_gpt_scmoe.py", *flags]
    script = training.entry_script()
    with contextlib.redirect_stdout(io.StringIO()):
        script.parse_and_validate_args()
        script.parallel_state.initialize_model_parallel()
        script._builds_datasets = lambda *_args: True
        data, *_ = script.train_valid_test_datasets_provider((number, 1, 1))
    return [{key: value.numpy() for key, value in data[index].items()} for index in range(number)]


def tokens_of(text: str) -> list[int]:
    """By hand, of ASCII: a printable byte is its place in the alphabet, which begins with these."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found, rest = [], text
    while rest:
        token = next((token for token in SPECIAL if rest.startswith(token)), None)
        letter = token or rest[0]
        spelled = {" ": "\u0120", "\n": "\u010a"}.get(letter, letter)
        found.append(256 + SPECIAL.index(letter) if token else alphabet.index(spelled))
        rest = rest[len(letter) :]
    return found


def sample_by_hand(sample: dict[str, numpy.ndarray], texts: list[str], counted: str) -> None:
    """``texts`` of conversations behind one another, and that of the tokens that the loss counts as labels."""
    tokens = [tokens_of(text) for text in texts]
    flat = list(itertools.chain(*tokens))
    assert sample["tokens"].tolist()[: len(flat)] == flat
    assert set(sample["tokens"].tolist()[len(flat) :]) <= {PAD, 256 + SPECIAL.index("<SPECIAL_233>")}
    length = len(sample["tokens"])
    begins = [0, *numpy.cumsum([len(part) for part in tokens])[:-1].tolist(), length]
    assert sample["cu_seqlens"].tolist() == begins + [length] * (length + 1 - len(begins))
    assert sample["labels"][sample["loss_mask"] > 0].tolist() == tokens_of(counted)
    assert sample["position_ids"].tolist()[: len(tokens[0])] == list(range(len(tokens[0])))


def own_template(flags: list[str]) -> None:
    """On a rank."""
    lines = Chats(flags[flags.index("--data-path") + 1])
    for sample, messages in zip(samples(flags, 2), (lines[0], lines[1]), strict=True):
        text = "".join(f"<s>{message['role']}: {message['content']}</s>" for message in messages)
        sample_by_hand(sample, [text], text[len("<s>") :])


def masked_template(flags: list[str]) -> None:
    """On a rank: of a format of Core's, whose loss counts what the assistant says alone; two conversations a line."""
    flags = with_flags(flags, "--sft-tokenizer-prompt-format nemotron-h-aligned")
    path = Path(flags[flags.index("--data-path") + 1]).with_name("two.jsonl")
    write_chats(path, [conversation("1+1", "2") + conversation("2+3", "5", "sum")] * 20)
    flags = with_flags(flags, f"--data-path {path}", "--seq-length 128", "--max-position-embeddings 128")
    (sample,) = samples(flags, 1)
    texts = [
        "<SPECIAL_10>System\n{}\n<SPECIAL_11>User\n{}\n<SPECIAL_11>Assistant\n{}\n".format(*words)
        for words in (("add", "1+1", "2"), ("sum", "2+3", "5"))
    ]
    sample_by_hand(sample, texts, "2\n5\n")


@pytest.mark.parametrize("check", [own_template, masked_template])
def test_samples_are_what_the_template_makes_of_chats(chats, check):
    ranks.run(check, 1, chats)


def test_it_trains_on_answers_and_overlap_changes_no_bit(chats, tmp_path):
    flags = with_flags(chats, "--expert-model-parallel-size 2", "--train-iters 20")
    logs = {}
    for overlap in ("fixed", "off"):
        log = tmp_path / overlap
        printed = ranks.run(training.train, 2, with_flags(flags, f"--overlap {overlap}", f"--tensorboard-dir {log}"))
        assert "exit code" not in printed[0], printed[0][-3000:]
        logs[overlap] = training.scalars(log, "lm loss", "grad-norm")
    assert logs["fixed"] == logs["off"]
    assert logs["fixed"]["lm loss"][20] < logs["fixed"]["lm loss"][1] - 2


# --- refusals ------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "{": "line 2 of",
    '{"text": "a"}': "it has no list of messages",
    '{"messages": [{"role": "teacher", "content": "a"}]}': "one of the roles system, user, assistant, tool",
    '{"messages": [{"role": "user", "content": ["a"]}]}': "the content of a message is text",
    "[" * 100_000: "is no chat",
}


def test_lines_that_are_no_chats_are_refused(chats, tmp_path):
    refusals = []
    for number, (line, words) in enumerate(BAD_LINES.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"messages": conversation("1", "2")}) + "\n" + line + "\n")
        refusals.append((with_flags(chats, f"--data-path {path}"), [str(path), words, "; mend it"]))
    (tmp_path / "empty.jsonl").touch()
    refusals += [
        (with_flags(chats, f"--data-path {tmp_path}/{name}"), [f"{tmp_path}/{name}", words])
        for name, words in (("empty.jsonl", "has no chats"), ("none.jsonl", "No such file"))
    ]
    entry.assert_refused(refusals)


def test_a_template_that_fails_is_refused(chats, tmp_path):
    ranks.run(save_tokenizer, 1, tmp_path / "none", None, distributed=False)
    ranks.run(save_tokenizer, 1, tmp_path / "fails", "{{ raise_exception('no system') }}", distributed=False)
    said = "the first chat goes through the tokenizer's template"
    entry.assert_refused(
        (with_flags(chats, f"--tokenizer-model {tmp_path}/{name}"), [said, words, "--sft-tokenizer-prompt-format"])
        for name, words in (("none", "chat_template"), ("fails", "no system"))
    )


def test_chats_are_accepted(chats):
    """Negative control: next to what is refused lies what is not."""
    entry.assert_accepted([chats, with_flags(chats, "--sft-tokenizer-prompt-format nemotron-h-aligned")])


def test_a_chat_is_found_by_its_number(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_chats(path, [conversation(str(number), "ä" * number) for number in range(5)])
    path.write_text("\n" + path.read_text().replace("\n", "\n \n"))
    chats = Chats(str(path))
    assert len(chats) == 5
    assert [chats[number][2]["content"] for number in (4, 0, 2)] == ["ääää", "", "ää"]
