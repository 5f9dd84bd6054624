"""One checkpoint of every architecture, continued with its experts on 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
import test_layouts as layouts
import training
from test_layouts import COMMON, LAYOUTS, LONGCAT, MODELS, NAMES, TOLERANCE, changes
from training import STOCK, STOCK_SHARED_EXPERT, with_flags

SCMOE, DGMOE = (with_flags(MODELS[name], "--num-layers 4") for name in ("scmoe", "dgmoe"))
TOP_2 = with_flags(STOCK, *COMMON, "--num-layers 4", "--moe-layer-freq [0,1]*2", "--moe-router-topk 2")
ARCHITECTURES = {
    **{
        f"scmoe {position} {combine}": with_flags(
            SCMOE, f"--shortcut-position {position}", f"--shortcut-combine {combine}"
        )
        for position in ("pos1", "pos2", "pos3")
        for combine in ("add", "cg1", "cg2")
    },
    "scmoe, a position for each group": with_flags(SCMOE, "--shortcut-position pos3 pos1"),
    "scmoe-2": with_flags(SCMOE, "--moe-router-topk 2"),
    "scmoe-2 in chunks": with_flags(SCMOE, "--moe-router-topk 2", "--overlap-chunks 2"),
    "scmoe, an moe in every block": with_flags(SCMOE, "--moe-every 1", "--shortcut-position pos1"),
    "scmoe, an moe in every fourth block": with_flags(SCMOE, "--moe-every 4"),
    "scmoe as longcat": with_flags(SCMOE, *changes(f"--{LONGCAT.removeprefix('--')}")),
    "dgmoe": DGMOE,
    **{f"dgmoe {position}": with_flags(DGMOE, f"--shortcut-position {position}") for position in ("pos1", "pos3")},
    "dgmoe in chunks": with_flags(DGMOE, "--overlap-chunks 2"),
    "dgmoe-share": with_flags(DGMOE, "--moe-share-groups 2"),
    "stock top-2": TOP_2,
    "stock top-2 in chunks": with_flags(TOP_2, "--overlap-chunks 2"),
    "stock with a shared expert": with_flags(STOCK_SHARED_EXPERT, *COMMON, "--num-layers 4"),
    "stock with a shared expert in chunks": with_flags(
        STOCK_SHARED_EXPERT, *COMMON, "--num-layers 4", "--overlap-chunks 2"
    ),
}
# One of each kind of which test_layouts.py tries none with 8 blocks.
QUICK = {"scmoe pos1 cg2", "stock top-2 in chunks"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in ARCHITECTURES]
)
def test_experts_on_more_ranks_change_nothing(tmp_path, name):
    flags = ARCHITECTURES[name]
    layouts.run(1, with_flags(flags, "--train-iters 1", f"--save {tmp_path}/start", "--save-interval 1"))
    found = {}
    for layout in ("one", "ep2", "ep4"):
        num_ranks, more = LAYOUTS[layout]
        load = (
            f"--load {tmp_path}/start",
            "--no-load-optim",
            "--train-iters 3",
            f"--tensorboard-dir {tmp_path}/{layout}",
        )
        layouts.run(num_ranks, with_flags(flags, *changes(more), *load))
        found[layout] = training.scalars(tmp_path / layout, *NAMES)
    one = found["one"]
    for layout in ("ep2", "ep4"):
        layouts.assert_agree(found[layout], one)
    for name in NAMES:  # negative control: another step would be noticed
        assert sorted(one[name]) == [2, 3] and one[name][3] != pytest.approx(one[name][2], rel=10 * TOLERANCE)
