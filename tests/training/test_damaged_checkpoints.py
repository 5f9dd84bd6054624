"""Where the newest checkpoint is damaged, a run continues from the newest whole one, and says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import entry
import pytest
import ranks
import training
from training import SCMOE, with_flags

from megatron_scmoe.mcore import whole
from megatron_scmoe.training import whole_step

FLAGS = with_flags(SCMOE, "--train-iters 3")


def saving(save: Path, folder: Path) -> list[str]:
    """Every step, on two ranks."""
    flags = with_flags(FLAGS, "--expert-model-parallel-size 2", f"--save {save}", "--save-interval 1")
    return with_flags(flags, f"--tensorboard-dir {folder}/log")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """``save`` with the steps 1 to 3, and ``log``."""
    folder = tmp_path_factory.mktemp("trained")
    ranks.run(training.train, 2, saving(folder / "save", folder))
    return folder


@pytest.fixture
def save(trained, tmp_path) -> Path:
    return shutil.copytree(trained / "save", tmp_path / "save")


def cut(path: Path) -> None:
    """Lose the last byte that is in use."""
    os.truncate(path, path.stat().st_size - 1)


def piece(folder: Path) -> Path:
    return sorted(folder.glob("*.distcp"))[-1]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    # what is done to the folder of a step, and the words for it
    "gone": (shutil.rmtree, "its folder is missing"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "cut metadata": (lambda folder: os.truncate(folder / ".metadata", 100), ".metadata cannot be read"),
    "no format": (lambda folder: (folder / "metadata.json").unlink(), "metadata.json is missing"),
    "cut format": (lambda folder: os.truncate(folder / "metadata.json", 20), "metadata.json is cut"),
    "cut arguments": (lambda folder: (folder / "common.pt").write_bytes(b"PK"), "common.pt is cut"),
    "no piece": (lambda folder: piece(folder).unlink(), "__1_0.distcp has 0 of "),
    "cut piece": (lambda folder: cut(piece(folder)), "__1_0.distcp has "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_checkpoint_lacks_is_said(save, damage):
    act, words = DAMAGES[damage]
    folder = whole.folder_of(save, 3)
    assert whole.flaw(folder) == ""
    act(folder)
    assert words in whole.flaw(folder)


def test_a_run_continues_from_the_newest_whole_one(trained, save, tmp_path):
    """Bit for bit as if it had ended there; and its own save takes the place of the damaged one."""
    cut(piece(whole.folder_of(save, 3)))
    printed = ranks.run(training.train, 2, with_flags(saving(save, tmp_path), f"--load {save}"))
    line = f" > the checkpoint of step 3 in {save} is damaged: __1_0.distcp has "
    assert line in printed[0] and "bytes; continuing from step 2, the newest whole one\n" in printed[0]
    assert line not in printed[1]
    names = ("lm loss", "grad-norm")
    through, resumed = (training.scalars(folder / "log", *names) for folder in (trained, tmp_path))
    assert resumed == {name: {3: values[3]} for name, values in through.items()}
    assert whole.flaw(whole.folder_of(save, 3)) == ""


def test_a_step_that_was_asked_for_is_that_or_nothing(save):
    cut(piece(whole.folder_of(save, 3)))
    asked = with_flags(FLAGS, f"--load {save}", "--ckpt-step 3")
    entry.assert_refused([(asked, ["step 3", "is damaged: __1_0.distcp", "give another --ckpt-step, or none"])])


def test_none_is_whole(save):
    for step in (1, 2, 3):
        cut(piece(whole.folder_of(save, step)))
    entry.assert_refused(
        [(with_flags(FLAGS, f"--load {save}"), ["step 3", "is damaged", "no older one is whole; give another --load"])]
    )


TORN = {"empty": b"", "of another kind": b"\xff", "gone": None}


def tear(save: Path, text: bytes | None) -> None:
    tracker = save / whole.TRACKER
    tracker.unlink() if text is None else tracker.write_bytes(text)


@pytest.mark.parametrize("text", TORN.values(), ids=TORN)
def test_a_run_continues_where_the_tracker_is_torn(trained, save, tmp_path, text):
    """From the newest whole one, bit for bit; Core alone would end, or begin with step 1."""
    shutil.rmtree(whole.folder_of(save, 3))
    tear(save, text)
    printed = ranks.run(training.train, 2, with_flags(saving(save, tmp_path), f"--load {save}"))
    says = "is missing" if text is None else f"is damaged: it says {text.decode(errors='replace')!r}, no step"
    assert f" > {whole.TRACKER} in {save} {says}; now it says 2, the newest whole one\n" in printed[0]
    through, resumed = (training.scalars(folder / "log", "lm loss")["lm loss"] for folder in (trained, tmp_path))
    assert resumed == {3: through[3]}
    assert (save / whole.TRACKER).read_text() == "3"


@pytest.mark.parametrize("asked", [None, 1])
def test_the_tracker_is_written_anew(save, asked):
    cut(piece(whole.folder_of(save, 3)))
    tear(save, b"\0\0")
    step, line = whole_step._whole_step(save, asked)
    assert step == asked and line.endswith("now it says 2, the newest whole one")
    assert (save / whole.TRACKER).read_text() == "2"
    assert [path.name for path in save.glob("latest*")] == [whole.TRACKER]
    assert whole_step._whole_step(save, asked) == (asked, "")


def test_a_release_and_a_new_folder_have_no_step(save, tmp_path):
    tear(save, b"release")
    assert whole_step._whole_step(save, None) == (None, "")
    unfinished = tmp_path / "unfinished"
    (unfinished / "iter_0000002").mkdir(parents=True)
    assert whole_step._whole_step(unfinished, None) == (None, "")
    assert list(unfinished.glob("latest*")) == []


def test_a_torn_tracker_and_nothing_whole(save):
    for step in (1, 2, 3):
        cut(piece(whole.folder_of(save, step)))
    tear(save, b"")
    entry.assert_refused(
        [(with_flags(FLAGS, f"--load {save}"), ["it says '', no step", "no checkpoint is whole; give another --load"])]
    )
