"""Small damaged inputs for every file that every tool reads: right all the same, or refused in one line.

The damages are drawn by hypothesis, the same ones at every run. A failing test prints those that made it fail, and the
name of a case is enough to repeat it. In ``make test-full`` there are more, and any number with FUZZ_SEEDS=50.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import commands
import fuzz
import numpy
import pytest
import ranks
import small_checkpoints
import test_ablate_codec
import test_ablation
import test_optimizers
from ablation import verdicts
from codec_study import goals
from test_strangers_inputs import a_report
from training import ROOT

TOOLS = ROOT / "tools"
EXAMPLES, MORE_EXAMPLES = 10, 25
"""Of each case in ``make test``, and of each case and seed in ``make test-full``."""
SEEDS = range(1, 1 + int(os.environ.get("FUZZ_SEEDS", "4")))
DRAWING = ("ablation.render", "codec_study.render", "matplotlib.backends.backend_svg")
OF_TOOL: dict[str, dict[str, Any]] = {
    "inspect_checkpoint.py": {"proof": "", "finds": True},
    "convert_checkpoint.py": {"proof": "conversion.json"},
    "score.py": {"proof": "summary.json", "chatter": "score.py: ", "finds": True},
    "preprocess_data.py": {"proof": "manifest.json", "chatter": "bad: "},
    "trace.py": {"proof": "", "chatter": "trace.py: warning: "},
    "ablate_overlap.py": {"imported": DRAWING, "replaced": ("overlap/report.html", "overlap.md")},
    "ablate_codec.py": {"imported": DRAWING, "replaced": ("study/report.html", "study.md")},
}
CASES: dict[str, fuzz.Case] = {}


def add(name: str, command: str, damaged: str, beside: str = "") -> None:
    tool, words = f"{command} ".split(" ", 1)
    CASES[name] = fuzz.Case(tool, words, tuple(damaged.split()), tuple(beside.split()), **OF_TOOL[tool])


def add_all() -> None:
    for model in ("dense", "longcat", "scmoe", "megatron"):
        add(f"inspect {model}", f"inspect_checkpoint.py in/{model} --norms --scan --json out", model)
    add("compare", "inspect_checkpoint.py in/megatron in/other --json out", "other", "megatron")
    ways = ("longcat megatron", "scmoe megatron", "dense megatron", "megatron megatron", "megatron hf-scmoe")
    more = {"dense megatron": "--experts 2 --skip-change", "megatron megatron": "--transformer-impl transformer_engine"}
    for way in ways:
        model, target = way.split()
        source = model if model == "megatron" else f"hf-{model}"
        words = f"--from {source} --to {target} --load in/{model} --save out {more.get(way, '')}"
        add(f"convert {way}", f"convert_checkpoint.py {words}", model)
    moments = "--from megatron --to megatron --with-optimizer --load in/run --save out --verify"
    add("convert moments", f"convert_checkpoint.py {moments}", "run")
    add("plan", f"convert_checkpoint.py {words} --dry-run", model)
    ids, text = (f"score.py --load in/megatron --input in/{name} --output out" for name in ("ids.npy", "texts"))
    add("score megatron", ids, "megatron", "ids.npy")
    add("score ids", ids, "ids.npy", "megatron")
    add("score text", text, "texts", "megatron")
    add("score tokenizer", text, "megatron/tokenizer", "texts megatron")
    again = "preprocess_data.py --input in/texts --workers 1 --tokenizer-model in/sp.model --output"
    add("preprocess", f"{again} out", "texts sp.model")
    add("preprocess again", f"{again} in/data", "data", "texts sp.model")
    add("trace", "trace.py in/report --output out", "report")
    add("overlap", "ablate_overlap.py --from in/overlap --write-results in/overlap.md", "overlap overlap.md")
    add("codec", "ablate_codec.py --from in/study --write-results in/study.md", "study study.md")
    add("step times", "ablate_codec.py --from in/study --step-times in/overlap", "overlap", "study")


add_all()
for makes_nothing in ("plan", "preprocess again"):
    CASES[makes_nothing] = CASES[makes_nothing]._replace(proof=None)


# --- input that is right ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """All input, undamaged."""
    home = tmp_path_factory.mktemp("pristine")
    made = small_checkpoints.all_formats(home / "made", first=with_tokenizer)
    for name in ("hf-dense", "hf-longcat", "hf-scmoe", "megatron"):
        made[name].rename(home / name.removeprefix("hf-"))
    small_checkpoints.with_common_file(home / "megatron" / "release")
    shutil.copytree(home / "megatron", home / "other")
    test_optimizers.write_run(home / "made" / "run").rename(home / "run")
    numpy.save(home / "ids.npy", numpy.arange(20).reshape(2, 10) % 7)
    a_report(home / "report")
    line = (home / "report" / "rank00000.jsonl").read_text()
    (home / "report" / "rank00001.jsonl").write_text(line.replace('"rank": 0', '"rank": 1') * 2)
    keep_studies(home)
    keep_data(home)
    return home


def with_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "the", "quick", "brown", "fox"])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')


def keep_studies(home: Path) -> None:
    """What both ablations leave, of few arms: drawing takes time."""
    arms = ("top-2", "pos2 off", "pos2 adaptive chunks", "pos2 lsh adaptive chunks")
    result = test_ablation.with_arms(test_ablation.make_result((0.6,)), 0, *arms)
    for arm in result["points"][0]["arms"]:
        arm["sent_rate"] = 0.2 if "lsh" in arm["arm"]["name"] else 1.0
    (home / "overlap").mkdir()
    (home / "overlap" / "result.json").write_text(json.dumps(result))
    study = test_ablate_codec.make_result(models=("top-2",), wanted=("none", "lsh q6"))
    study["runs"] = [run for run in study["runs"] if run["seed"] == 1]
    test_ablate_codec.keep(study, home / "study")
    for name, marks in {"overlap": verdicts, "study": goals}.items():
        (home / f"{name}.md").write_text(f"# Results\n\n{marks.BEGIN}\nold\n{marks.END}\n\nBy hand.\n")


def keep_data(home: Path) -> None:
    """Texts, and what preprocess_data.py has made of them with a tokenizer that it has made before."""
    (home / "texts").mkdir()
    (home / "texts" / "a.txt").write_text("the quick brown fox\n" * 40)
    (home / "texts" / "b.jsonl").write_text('{"text": "the lazy dog"}\n{"text": "jumps over"}\n' * 8)
    (home / "in").symlink_to(".")  # the manifest has the names that inputs have in a case
    for name, tokenizer in (("first", "--vocab-size 300"), ("data", "--tokenizer-model first/tokenizer.model")):
        words = f"--input in/texts --output {name} --workers 1 {tokenizer}".split()
        done = commands.run(TOOLS / "preprocess_data.py", *words, cwd=home)
        assert done.returncode == 0, done.stderr
    shutil.copy(home / "first" / "tokenizer.model", home / "sp.model")
    (home / "in").unlink()


# --- tests -----------------------------------------------------------------------------------------------------------


def draw(name: str, pristine: Path, count: int, number: int) -> None:
    case = CASES[name]
    ranks.run(fuzz.draw, 1, TOOLS / case.tool, pristine, case, count, number, distributed=False, timeout_s=900)


@pytest.mark.parametrize("name", CASES)
def test_damaged_input_is_right_or_refused_in_one_line(pristine, name):
    draw(name, pristine, EXAMPLES, 0)


@pytest.mark.full
@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_more_damaged_input_is_right_or_refused_in_one_line(pristine, name, number):
    draw(name, pristine, MORE_EXAMPLES, number)


BAD_TOOLS = {
    "exit code": "sys.exit(3)",
    "traceback": "raise RuntimeError('oh')",
    "terminal": "print('\\x1b[31mred')",
    "one line": "print('tool.py: error: this', 'tool.py: error: and that', sep='\\n', file=sys.stderr); sys.exit(2)",
    "no line": "sys.exit(1)",
    "another line": "sys.exit('this is wrong')",
    "memory": "bytearray(b'1') * (300 << 20)",
    "endless memory": "[bytes(1 << 28) for _ in range(100)]",
    "changed": "pathlib.Path('in/texts/a.txt').write_text('mine')",
    "changed mode": "pathlib.Path('in/texts/a.txt').chmod(0o600)",
    "changed to a link": "os.remove('in/texts/a.txt'); os.symlink('b.jsonl', 'in/texts/a.txt')",
    "removed": "os.remove('in/texts/a.txt')",
    "left over": "pathlib.Path('.out.partial').mkdir()",
    "left behind": "os.mkdir('out'); print('tool.py: error: no', file=sys.stderr); sys.exit(2)",
    "half written": "os.mkdir('out')",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}
NAMES = {
    **{"no line": "one line", "another line": "one line", "endless memory": "traceback", "changed mode": "changed"},
    **{"changed to a link": "changed", "removed": "changed", "left behind": "left over", "killed": "exit code"},
}
GOOD_TOOLS = {
    "refuses": "print('tool.py: error: no', file=sys.stderr); sys.exit(2)",
    "makes what it should": "os.mkdir('out'); pathlib.Path('out/proof').touch()",
}


def test_whatever_a_tool_does_wrong_is_noticed(pristine, tmp_path):
    expected = {name: [NAMES.get(name, name)] for name in BAD_TOOLS} | {name: [] for name in GOOD_TOOLS}
    assert names_of_faults(pristine, tmp_path, BAD_TOOLS | GOOD_TOOLS) == expected


def names_of_faults(pristine: Path, folder: Path, tools: dict[str, str]) -> dict[str, list[str]]:
    """By the name of each of ``tools``, which are given as source."""
    scripts, cases = [], []
    for number, source in enumerate(tools.values()):
        scripts.append(folder / str(number) / "tool.py")
        scripts[-1].parent.mkdir()
        scripts[-1].write_text(f"import os, pathlib, signal, sys\n{source}\n")
        cases.append(fuzz.Case("tool.py", "", ("texts",), proof="proof" if "'out'" in source else None))
    (found,) = ranks.run(fuzz.faults_of_each, 1, scripts, pristine, cases, distributed=False)
    return {name: [one.partition(":")[0] for one in its] for name, its in zip(tools, found, strict=True)}
