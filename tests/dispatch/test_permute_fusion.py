"""--moe-permute-fusion on the CPU, with stand-ins of Transformer Engine's functions (``fused_permutation.py``).

What Core's dispatcher and ours hand to one another is tried; the kernels themselves are not.
"""

from __future__ import annotations

from types import SimpleNamespace

import fused_permutation
import models
import pytest
import ranks
import test_core_faults
import test_layer
import torch
from cases import cases
from models import Case

WORDS = ("permute", "sort with weights", "sort", "unpermute")


def fused_step(case: Case, mutant: str = "", *, first_expert_alone: bool = False):
    """Losses and gradients of ``losses_and_gradients`` with fused permutations, and how often each was called.

    Args:
        mutant: "order": chunks stay as they came; "host": split sizes are copied to the host; "config": a flight to
            which nothing came goes on without the fused functions, its inverse permutation included.
        first_expert_alone: all tokens go to one expert, so that the other rank gets none.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_scmoe.mcore import token_dispatcher as ours

    fused_permutation.install()
    if first_expert_alone:
        test_core_faults.prefer_first_expert()
    if mutant == "order":
        moe_utils.fused_sort_chunks_by_index = lambda rows, *_: rows
    if mutant == "host":
        sort = moe_utils.fused_sort_chunks_by_index_with_probs
        move = token_dispatcher.maybe_move_tensor_to_cpu
        moe_utils.fused_sort_chunks_by_index_with_probs = lambda rows, weights, sizes, order: sort(
            rows, weights, move(sizes), order
        )
    if mutant == "config":

        def without_fusion(dispatcher, num_rows):
            if not num_rows:
                dispatcher.config = SimpleNamespace(**vars(dispatcher.config) | {"moe_permute_fusion": False})

        ours.sort_nothing_if_empty = without_fusion
    build = models.build

    def build_fused(case):
        model = build(case)
        for module in model.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher.config.moe_permute_fusion = True
        return model

    models.build = build_fused
    fused_permutation.calls.clear()
    loss, gradients = models.losses_and_gradients(case)
    return loss, gradients, [fused_permutation.calls[word] for word in WORDS]


def on_ranks(case: Case, size: int, *, fused: bool = True, **how):
    """Losses and gradients of all ranks, and of each the calls; without ``fused`` none."""
    layout = test_layer.EP[size]
    if fused:
        results = ranks.run(fused_step, size, case, layout=layout, **how)
    else:
        results = [(*one, []) for one in ranks.run(models.losses_and_gradients, size, case, layout=layout)]
    gradients = {name: gradient for _, part, _ in results for name, gradient in part.items()}
    return (torch.cat([loss for loss, _, _ in results]), gradients), [calls for _, _, calls in results]


CASES = [
    (Case(), 2),
    (Case(topk=2, chunks=2), 2),
    (Case(shortcut="dgmoe", chunks=2), 2),
    (Case(codec="lsh", hashes=4), 2),
    (Case(capacity=0.5, chunks=2), 2),
    (Case(topk=2, unique="rank", chunks=2), 2),
    (Case(topk=2), 1),
    (Case(topk=2), 4),
    (Case(position=("pos1",), recompute="full", recompute_blocks=2), 2),
    (Case(codec="lsh", hashes=4, topk=2, capacity=1.0, chunks=2), 2),
    (Case(capacity=1.0, padded=True), 2),
    (Case(latent=8, topk=2, chunks=2), 2),
    (Case(router="longcat", topk=2, zero_experts=2, combine="add"), 2),
    (Case(num_groups=4, span=2, landing=1, topk=2), 2),
    (Case(topk=3, unique="rank", router="longcat", zero_experts=2, combine="add"), 2),
    (Case(topk=2, unique="rank", capacity=0.5), 4),
]


@pytest.mark.parametrize(("case", "size"), cases(CASES, CASES[:6]))
def test_fused_and_unfused_are_the_same_bit_for_bit(case, size):
    fused, calls = on_ranks(case, size)
    plain, _ = on_ranks(case, size, fused=False)
    assert test_layer.largest_difference(fused, plain) == 0
    permuted, sorted_in, sorted_out, unpermuted = zip(*calls, strict=True)
    assert all(permuted) and all(unpermuted)
    assert (
        (all(sorted_in) and all(sorted_out)) or case.padded or size == 4 or case.unique == "rank"
    )  # which sort nothing


def test_a_wrong_order_is_noticed():
    """Negative control."""
    fused, _ = on_ranks(Case(), 2, mutant="order")
    plain, _ = on_ranks(Case(), 2, fused=False)
    assert test_layer.largest_difference(fused, plain) > 1e-3


def test_sizes_on_the_host_are_noticed():
    """Negative control: Transformer Engine asks for them on the device."""
    with pytest.raises(ranks.RankError, match="they are read on the device"):
        on_ranks(Case(), 2, mutant="host")


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_rank_that_gets_nothing_still_reads_its_own_rows_back(chunks):
    """Its flights sort nothing, and what they sent comes back in the order that the fused permutation gave it."""
    case = Case(chunks=chunks)
    found, (busy, idle) = on_ranks(case, 2, first_expert_alone=True)
    losses, gradients = zip(*ranks.run(plain_step, 2, case, layout=test_layer.EP[2]), strict=True)
    expected = torch.cat(losses), {name: gradient for part in gradients for name, gradient in part.items()}
    assert test_layer.largest_difference(found, expected) == 0
    assert min(busy) > 0 and idle[0] == idle[3] > 0 and idle[1:3] == [0, 0]


def plain_step(case: Case):
    test_core_faults.prefer_first_expert()
    return models.losses_and_gradients(case)


def test_an_inverse_without_fusion_cannot_read_a_fused_map():
    """Negative control: what was done for such a flight before."""
    with pytest.raises(ranks.RankError):
        on_ranks(Case(), 2, first_expert_alone=True, mutant="config")


@pytest.mark.parametrize(
    ("fusion", "num_rows", "sorts"), [(True, 0, False), (True, 3, True), (False, 0, True), (False, 3, True)]
)
def test_a_flight_sorts_where_it_brings_rows(fusion, num_rows, sorts):
    from megatron_scmoe.mcore.token_dispatcher import sort_nothing_if_empty

    dispatcher = SimpleNamespace(config=SimpleNamespace(moe_permute_fusion=fusion), num_local_experts=4)
    sort_nothing_if_empty(dispatcher, num_rows)
    assert dispatcher.num_local_experts == (4 if sorts else 1)
    assert dispatcher.config.moe_permute_fusion == fusion
