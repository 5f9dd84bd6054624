"""The two norms of Megatron's ShortcutMoE (``--shortcut-norms upstream``), against the reference."""

from __future__ import annotations

import models
import pytest
import ranks
import reference
import torch
from models import Case
from test_layer import EP, largest_difference, run, run_reference

NORMS = Case(norms="upstream", combine="add")


@pytest.mark.parametrize(
    "case",
    [
        NORMS,
        NORMS.replace(position=("pos1",), moe_every=1, topk=2),
        NORMS.replace(position=("pos3",), combine="cg2", chunks=2),
        NORMS.replace(position=("pos1", "pos2"), combine="cg1"),
        NORMS.replace(position=("farskip",), moe_every=1),
        NORMS.replace(num_groups=2, share_groups=2),
        NORMS.replace(num_groups=2, span=2),
    ],
    ids=["pos2", "every block", "pos3", "position per group", "farskip", "shared MoE", "span"],
)
def test_upstream_norms_equal_the_reference(case):
    assert largest_difference(run(case), run_reference(case.reference_config())) < 1e-5


@pytest.mark.parametrize("dropped", reference.UPSTREAM_NORMS)
def test_a_norm_that_is_left_out_is_noticed(dropped, monkeypatch):
    """Negative control."""
    norm = reference.norm
    monkeypatch.setattr(reference, "norm", lambda p, name, x, cfg: x if dropped in name else norm(p, name, x, cfg))
    loss, _ = run_reference(NORMS.reference_config())
    assert (run(NORMS)[0] - loss).abs().max() > 1e-3


def keys(case: Case) -> set[str]:
    return {name for name, _ in models.build(case).named_parameters()}


def test_they_are_called_as_upstream_calls_them():
    """And they are all that the model has beside the one without them."""
    ((with_norms,), (without,)) = (
        ranks.run(keys, 1, case, layout=EP[1]) for case in (NORMS, NORMS.replace(norms="none"))
    )
    assert with_norms - without == {
        f"decoder.layers.{block}.{name}weight" for block in (1, 3) for name in reference.UPSTREAM_NORMS
    }
    assert without <= with_norms


def test_overlap_changes_no_bit():
    on, off = run(NORMS, 2), run(NORMS.replace(overlap="off"), 2)
    assert torch.equal(on[0], off[0])
    assert all(torch.equal(gradient, off[1][name]) for name, gradient in on[1].items())
