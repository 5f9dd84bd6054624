"""Moments of one optimizer for a run with two, and back: what tools/convert_checkpoint.py --with-optimizer makes loads.

Runs, layouts and comparisons are those of test_layouts.py: a run goes on from the converted checkpoint of another one,
and its next steps are those of the run that was not interrupted.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import commands
import entry
import pytest
import ranks
import test_layouts as layouts
import torch
import training
from cases import cases
from checkpoint_files import TOOLS
from test_layouts import ONE_QUEUE, WIDE
from training import with_flags, without_flag

sys.path.insert(0, str(TOOLS))
import convert_checkpoint as tool
from checkpoints import plan
from checkpoints.mappings import optimizers

TOOL = TOOLS / "convert_checkpoint.py"
FORMAT = "--dist-ckpt-optim-fully-reshardable"
PADDED = "--hidden-size 72"  # gradient buckets end in padding, see test_widths.py
PLAIN_MOVES = (("dp2 plain optimizer", "tp2 ep2 plain optimizer"), ("tp2 ep2 plain optimizer", "dp2 plain optimizer"))
MOVES = (
    *(("one", target) for target in ("ep2", "tp2 ep2", "pp2 ep2")),
    *((source, "one") for source in ("ep2", "tp2 ep2", "pp2 ep2")),
    *PLAIN_MOVES,
)
# Tensor and pipeline sizes stay, so that random numbers go on, too; and the largest layout.
MORE_MOVES = (("expert tp2", "tp2 sp"), ("tp2 sp", "expert tp2"), ("pp2 interleaved", "tp2 pp2 ep2"))
CASES = (
    *(("scmoe", WIDE, *move) for move in (*MOVES, *MORE_MOVES)),
    *(("dgmoe", WIDE, *move) for move in MOVES),
    *(("scmoe", PADDED, *move) for move in (("one", "ep2"), ("ep2", "pp2"), ("tp2 ep2", "one"))),
    *(("stock", WIDE, *move) for move in (("one", "ep2"), ("ep2", "one"))),
    # all blocks are saved as one tensor
    *(("alike", WIDE, *move) for move in (("one", "pp2 ep2"), ("ep2", "one"))),
)
QUICK = {("scmoe", PADDED, "one", "ep2")}
REFUSED = (("one", "ep2"), ("ep2", "one"), ("one", "tp2 sp"))


def converted(source: Path, folder: Path, *words: str) -> Path:
    """What the tool makes of a checkpoint, as a user calls it."""
    words = ("--from", "megatron", "--to", "megatron", "--with-optimizer", *words)
    done = commands.run(TOOL, *words, "--load", source, "--save", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Function of a model, a width and a layout: a run of that, and a checkpoint of it as the tool has converted it."""
    made: dict[tuple[str, str, str], layouts.Saved] = {}

    def make(model: str, width: str, layout: str) -> layouts.Saved:
        if (model, width, layout) not in made:
            folder = tmp_path_factory.mktemp("run")
            saved = layouts.save(folder, model, layout, width)
            found = converted(saved.folder, folder / "converted", "--verify")
            made[model, width, layout] = layouts.Saved(found, saved.through)
        return made[model, width, layout]

    return make


@pytest.mark.parametrize(("model", "width", "source", "target"), cases(CASES, QUICK))
def test_a_run_goes_on_with_another_number_of_optimizers(tmp_path, other, model, width, source, target):
    layouts.assert_loads(other(model, width, source), tmp_path, model, target, width)


@pytest.mark.full
@pytest.mark.parametrize(("source", "target"), [("one", "ep2"), *PLAIN_MOVES])
def test_a_bf16_run_too(tmp_path, other, source, target):
    """Its fp32 copies of the weights are the optimizer's."""
    width = f"{WIDE} --bf16"
    saved = other("scmoe", width, source)
    load = [width, f"--load {saved.folder}", "--train-iters 4"]
    found = layouts.continued(tmp_path / "log", "scmoe", target, *load).scalars
    expected = {name: {i: saved.through.scalars[name][i] for i in (3, 4)} for name in layouts.NAMES}
    layouts.assert_agree(found, expected, layouts.BF16_TOLERANCE)
    layouts.assert_saves_the_same(saved, tmp_path, "scmoe", target, width)


@pytest.mark.parametrize("move", cases([(move,) for move in REFUSED], {(REFUSED[0],)}), ids=" to ".join)
def test_what_the_refusal_names_helps(tmp_path, move):
    """And the layout that the checkpoint came from refuses what became of it."""
    source, target = (layouts.flags_of("scmoe", layout) for layout in move)
    num_ranks = [layouts.LAYOUTS[layout][0] for layout in move]
    layouts.run(num_ranks[0], with_flags(source, "--train-iters 1", f"--save {tmp_path}/run", "--save-interval 1"))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("9")  # a later one, which is not asked for
    loading = with_flags(target, f"--load {tmp_path}/run", "--ckpt-step 1")
    (refused,) = entry.ends([entry.Command(loading, ONE_QUEUE | entry.world(num_ranks[1]))])
    words = re.search(r"tools/convert_checkpoint.py (--from .*) --save NEW", refused.stderr)
    assert words, refused.stderr
    done = commands.run(TOOL, *words[1].split(), "--save", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    entry.assert_accepted([with_flags(target, f"--load {tmp_path}/new")], ONE_QUEUE | entry.world(num_ranks[1]))
    back = entry.Command(with_flags(source, f"--load {tmp_path}/new"), ONE_QUEUE | entry.world(num_ranks[0]))
    (refused,) = entry.ends([back])
    now, then = ("one", "two") if move[0] == "one" else ("two", "one")
    assert refused.refuses([f"this run has {now} (", f"the checkpoint in {tmp_path}/new has {then};"]), refused.stderr


@pytest.mark.full
def test_there_and_back_a_run_is_the_same_bit_for_bit(tmp_path):
    """Of one rank, which has no other order of sums."""
    saved = layouts.save(tmp_path / "source", "scmoe", "one")
    two = converted(saved.folder, tmp_path / "two", "--optimizers", "two")
    again = converted(two, tmp_path / "again", "--optimizers", "one")
    load = [WIDE, f"--load {again}", "--train-iters 4"]
    found = layouts.continued(tmp_path / "log", "scmoe", "one", *load).scalars
    assert found == {name: {i: saved.through.scalars[name][i] for i in (3, 4)} for name in layouts.NAMES}


pieces = optimizers._pieces


def of_one_kind(infos):
    """A wrong conversion: what becomes the second moments are the first ones."""
    for piece in pieces(infos):
        if "exp_avg_sq" in piece.name:
            (read,) = piece.reads
            first = read._replace(name=read.name.replace("exp_avg_sq", "exp_avg"))
            piece = dataclasses.replace(piece, reads=(first,), make=torch.abs)
        yield piece


@pytest.mark.full
@pytest.mark.parametrize("wrong", ["without moments", "other moments"])
def test_wrong_moments_are_noticed(tmp_path, monkeypatch, wrong):
    """Negative control: the third step has the gradients of the checkpoint's weights, and moves them otherwise."""
    saved = layouts.save(tmp_path / "source", "scmoe", "one")
    if wrong == "other moments":
        monkeypatch.setattr(optimizers, "_pieces", of_one_kind)
        monkeypatch.setattr(plan.Account, "faults", {})  # else it is refused: first moments are read, second ones not
    words = ["--from", "megatron", "--to", "megatron", "--with-optimizer", "--load", str(saved.folder)]
    assert tool.main([*words, "--save", str(tmp_path / "new")]) == 0
    more = ["--no-load-optim"] if wrong == "without moments" else []
    load = [WIDE, f"--load {tmp_path}/new", "--train-iters 4", *more]
    found, expected = layouts.continued(tmp_path / "log", "scmoe", "ep2", *load).scalars, saved.through.scalars
    for name in layouts.NAMES:
        assert found[name][3] == pytest.approx(expected[name][3], rel=layouts.TOLERANCE)
        assert found[name][4] != pytest.approx(expected[name][4], rel=10 * layouts.TOLERANCE)


@pytest.mark.full
def test_moments_by_place_are_refused_and_what_the_line_says_helps(tmp_path):
    flags = with_flags(without_flag(layouts.flags_of("scmoe", "ep2"), FORMAT), WIDE, "--bf16")
    save = [f"--save {tmp_path}/run", "--save-interval 1", "--train-iters 1"]
    layouts.run(2, with_flags(flags, *save))
    words = ["--from", "megatron", "--to", "megatron", "--with-optimizer"]
    done = commands.run(TOOL, *words, "--load", tmp_path / "run", "--save", tmp_path / "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
    assert "has the format 'dp_reshardable'; load it in the layout that saved it, and save it with" in done.stderr
    convert = ["--ckpt-convert-format torch_dist", f"--ckpt-convert-save {tmp_path}/named"]
    ranks.run(layouts.train, 2, with_flags(flags, FORMAT, f"--load {tmp_path}/run", *convert), timeout_s=180)
    converted(tmp_path / "named" / "torch_dist", tmp_path / "new")
    found = ranks.run(training.checkpoint_tensors, 1, tmp_path / "new", 1)[0]
    assert any("exp_avg_sq" in key for key in found)
