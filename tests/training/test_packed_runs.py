"""--dataloader-inter-document-masking through the entry script, on text that our own tool has made tokens of."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import commands
import pytest
import ranks
import training
from cases import cases
from test_layouts import EP2, ETP1, FULL, INTERLEAVED, MODELS, NAMES, PP2, TOLERANCE, TP2, assert_agree, changes, train
from training import ROOT, with_flags, without_flag

PACKED = "--dataloader-inter-document-masking"
LAYOUTS = {
    # name -> ranks, flags
    "ep2": (2, EP2),
    "tp2 ep2": (4, f"{TP2} {EP2} {ETP1}"),
    "pp2": (2, PP2),
    "pp2 interleaved": (2, INTERLEAVED),  # whose inner virtual stages read no tokens, but where documents begin
    "recompute full": (1, f"{FULL} uniform --recompute-num-layers 1"),
    "recompute core_attn": (1, "--recompute-granularity selective --recompute-modules core_attn"),
    "samples of two": (1, "--micro-batch-size 2"),
    "samples of four": (2, f"{EP2} --micro-batch-size 4"),
}
TRIED = {
    "scmoe": tuple(LAYOUTS),
    "dgmoe": ("ep2", "tp2 ep2", "samples of four"),
    "longcat": ("tp2 ep2", "samples of two"),
    "stock": ("ep2", "samples of two"),
}
QUICK = {("scmoe", "tp2 ep2"), ("scmoe", "samples of four"), ("stock", "samples of two")}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> list[str]:
    """Flags of a dataset of short documents, several of which are in a sample of 32 tokens."""
    folder = tmp_path_factory.mktemp("text")
    words = (ROOT / "LICENSE").read_text().split()
    lines = [json.dumps({"text": " ".join(words[begin : begin + 3 + begin % 5])}) for begin in range(0, 600, 2)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n")
    tool = ROOT / "tools" / "preprocess_data.py"
    done = commands.run(tool, "--input", folder / "short.jsonl", "--output", folder / "data", "--vocab-size", 400)
    assert done.returncode == 0, done.stderr
    model, data = folder / "data" / "tokenizer.model", folder / "data" / "text_document"
    flags = ["--tokenizer-type SentencePieceTokenizer", f"--tokenizer-model {model}", f"--data-path {data}"]
    return [*flags, "--split 90,10,0", "--seq-length 32", "--max-position-embeddings 32", "--micro-batch-size 1"]


class Start(NamedTuple):
    """A checkpoint of one step on one rank, and what one rank makes of it."""

    flags: list[str]
    folder: Path
    expected: dict[str, dict[int, float]]


@pytest.fixture(scope="module")
def start_of(text, tmp_path_factory):
    made: dict[str, Start] = {}

    def make(model: str) -> Start:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            flags = without_flag(without_flag(MODELS[model], "--mock-data"), "--vocab-size")
            flags = with_flags(flags, *text, PACKED)
            run(1, with_flags(flags, f"--save {folder}/start", "--save-interval 1", "--train-iters 1"))
            flags = with_flags(flags, f"--load {folder}/start", "--no-load-optim", "--train-iters 4")
            made[model] = Start(flags, folder, run(1, with_flags(flags, f"--tensorboard-dir {folder}/one")))
        return made[model]

    return make


def run(num_ranks: int, flags: list[str]) -> dict[str, dict[int, float]]:
    """Losses and gradient norms, where they are logged."""
    results = ranks.run(train, num_ranks, flags, timeout_s=180)
    assert "exit code" not in results[0].printed, results[0].printed[-3000:]
    log = [value for name, value in itertools.pairwise(flags) if name == "--tensorboard-dir"]
    return training.scalars(Path(log[0]), *NAMES) if log else {}


@pytest.mark.parametrize(
    ("model", "layout"), cases([(model, layout) for model, some in TRIED.items() for layout in some], QUICK)
)
def test_layout_agrees_with_one_rank(start_of, model, layout):
    start = start_of(model)
    num_ranks, flags = LAYOUTS[layout]
    log = f"--tensorboard-dir {start.folder / layout.replace(' ', '-')}"
    assert_agree(run(num_ranks, with_flags(start.flags, *changes(flags), log)), start.expected)


def test_boundaries_of_documents_change_the_loss(start_of):
    """Negative control: documents that see one another have other losses, by more than layouts may differ."""
    start = start_of("scmoe")
    flags = with_flags(without_flag(start.flags, PACKED), f"--tensorboard-dir {start.folder}/seen")
    found = run(1, flags)
    assert found["lm loss"][2] != pytest.approx(start.expected["lm loss"][2], rel=3 * TOLERANCE)


@pytest.mark.full
def test_tokens_that_do_not_count_on_parts_of_sequences(start_of):
    """With --calculate-per-token-loss as on one rank, in which they do count otherwise; without it is refused."""
    start = start_of("scmoe")
    plain = with_flags(without_flag(start.flags, PACKED), "--calculate-per-token-loss")
    masked = with_flags(plain, "--eod-mask-loss")
    logs = [
        run(size, with_flags(flags, f"--context-parallel-size {size}", log))
        for name, flags, size in (("all", plain, 1), ("one", masked, 1), ("two", masked, 2))
        for log in [f"--tensorboard-dir {start.folder}/counted-{name}"]
    ]
    assert_agree(logs[2], logs[1])
    assert logs[1]["grad-norm"][2] != pytest.approx(logs[0]["grad-norm"][2], rel=1e-3)
