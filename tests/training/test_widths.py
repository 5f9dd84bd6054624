"""Moments at widths where Core pads gradient buckets: they pass between layouts, or are refused to be saved.

A bucket is padded to a multiple of 128 elements, and a model of 72 or 136 has matrices of other numbers of them.
"""

from __future__ import annotations

import pytest
import test_layouts as layouts
from cases import cases
from test_layouts import MODELS, SEVERAL, STOCK
from training import with_flags

PADDED = ("--hidden-size 72", "--hidden-size 136")
UNPADDED = "--hidden-size 96"
WIDTHS = (*PADDED, UNPADDED)
MOVES = (("ep2", "ep4"), ("ep4", "tp2 sp"), ("tp2 sp", "pp2 ep2"), ("one", "dp2"), ("dp2", "pp2"))
"""Each with one bucket for each kind of parameter, behind whose padding nothing lies."""
QUICK_MOVES = {
    ("scmoe", PADDED[0], "dp2", "pp2"),
}
RULE = "Core saves moments at the wrong places behind a gradient bucket that ends in padding"


def named(value: str) -> str:
    return value.removeprefix("--hidden-size ")


@pytest.mark.parametrize(
    ("model", "width", "source", "target"),
    cases(((model, width, *move) for model in ("scmoe", "dgmoe") for width in WIDTHS for move in MOVES), QUICK_MOVES),
    ids=named,
)
def test_moments_pass_between_layouts(tmp_path, model, width, source, target):
    saved = layouts.save(tmp_path / "source", model, source, width)
    layouts.assert_loads(saved, tmp_path / "target", model, target, width)


@pytest.mark.parametrize(
    ("model", "width"),
    cases(
        ((model, width) for model in ("scmoe", "dgmoe", "stock") for width in PADDED),
        {("dgmoe", PADDED[0]), ("scmoe", PADDED[1])},
    ),
    ids=named,
)
def test_several_buckets_are_refused(tmp_path, model, width):
    flags = with_flags(MODELS[model], *SEVERAL, width)
    save = (f"--save {tmp_path}", "--save-interval 1", "--train-iters 1")
    line = layouts.refused_in_training(2, with_flags(flags, *save))
    assert RULE in line and "use --ddp-bucket-size" in line
    assert not list(tmp_path.glob("iter_*"))


@pytest.mark.parametrize("model", cases(("scmoe", "dgmoe", "stock"), {"scmoe"}))
def test_several_buckets_without_padding_resume(tmp_path, model):
    """Bit for bit: a bucket ends with a matrix, of which each has a multiple of 128 elements at this width."""
    through, again = layouts.resumed(with_flags(MODELS[model], *SEVERAL, UNPADDED), tmp_path)
    assert again == through


@pytest.mark.full
@pytest.mark.parametrize("width", PADDED)
def test_unrefused_they_resume_otherwise(tmp_path, width):
    """Negative control: what is refused goes wrong."""
    through, again = layouts.resumed(with_flags(STOCK, *SEVERAL, width), tmp_path, layouts.train_unchecked)
    assert again["grad-norm"][3] != pytest.approx(through["grad-norm"][3], rel=layouts.TOLERANCE)
