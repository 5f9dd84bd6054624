"""One step of Lloyd's algorithm against a slow loop, and what must hold whatever the rows are."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lsh import cases, experts_of, number_of, untimed

from megatron_scmoe.codec.lloyd import _STAYS, refined
from megatron_scmoe.codec.lsh import means

ROUNDING = 1e-5  # of a row's squared length


def step(case):
    """Clusters before and after, sketches, and the number of clusters."""
    clusters = case.clusters()
    sketches, number = case.hasher.sketches(case.rows), number_of(clusters)
    return clusters, refined(clusters, sketches, torch.tensor(case.rows_per_expert), number), sketches.double(), number


def expert_of_clusters(clusters):
    return [expert for counts in clusters.per_expert.tolist() for expert in experts_of(counts)]


def squared_distances(sketches, clusters, number):
    return (sketches.unsqueeze(1) - means(sketches, clusters, number)).square().sum(dim=-1)


@untimed
@given(cases())
def test_rows_join_the_nearest_mean_of_their_expert(case):
    before, after, sketches, number = step(case)
    if not number:
        assert after is before
        return
    experts = torch.tensor(expert_of_clusters(before))
    for row, (its, expert) in enumerate(
        zip(squared_distances(sketches, before, number), experts[before.ids], strict=True)
    ):
        least, rounding = its[experts == expert].min(), ROUNDING * sketches[row].square().sum()
        gain, needed = its[before.ids[row]] - least, _STAYS * sketches[row].square().sum()
        chosen = after.ids[row]
        if gain > needed + rounding:
            assert experts[chosen] == expert and its[chosen] <= least + rounding
        elif gain < needed - rounding:
            assert chosen == before.ids[row]


@untimed
@given(cases())
def test_counts_stay_and_sizes_are_those_of_the_rows(case):
    before, after, _, number = step(case)
    assert torch.equal(after.per_expert, before.per_expert)
    assert after.sizes.tolist() == torch.bincount(after.ids, minlength=len(case.rows)).tolist()
    experts = expert_of_clusters(before)
    assert [experts[number] for number in after.ids] == experts_of(case.rows_per_expert)
    assert means(case.rows, after, number).isfinite().all()  # those of no row, too


@untimed
@given(cases())
def test_means_come_nearer(case):
    before, after, sketches, number = step(case)
    if number:
        error, less = (
            squared_distances(sketches, clusters, number).gather(1, clusters.ids.unsqueeze(1)).sum()
            for clusters in (before, after)
        )
        assert less <= error + ROUNDING * sketches.square().sum()


@untimed
@given(cases(), st.integers(1, 5))
def test_chunks_do_not_matter(case, chunks):
    _, whole, _, _ = step(replace(case, chunks=1))
    _, cut, _, _ = step(replace(case, chunks=chunks))
    assert len(set(zip(whole.ids.tolist(), cut.ids.tolist(), strict=True))) == len(set(whole.ids.tolist()))
    assert torch.equal(whole.sizes[whole.ids], cut.sizes[cut.ids])


@untimed
@given(cases())
def test_a_row_that_is_its_own_mean_stays(case):
    before, after, _, _ = step(case)
    alone = before.sizes[before.ids] == 1
    assert torch.equal(after.ids[alone], before.ids[alone])


def test_a_cluster_of_two_heaps_is_split_and_one_is_left_empty():
    """Rows at -1 and 1 that hashing put together move to the clusters that are there already; by hand."""
    from megatron_scmoe.codec.lsh import Clusters

    rows = torch.tensor([[-1.0, 0.0], [1.0, 0.1], [-1.0, 0.1], [1.0, 0.0]])
    together = Clusters(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 1, 0]), torch.tensor([[3]]))
    found = refined(together, rows, torch.tensor([4]), 3)
    assert found.ids.tolist() == [1, 2, 1, 2] and found.sizes.tolist() == [0, 2, 2, 0]
    assert means(rows, found, 3).tolist() == [
        [0.0, 0.0],
        [-1.0, torch.tensor(0.05).item()],
        [1.0, torch.tensor(0.05).item()],
    ]
    apart = Clusters(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 1, 1, 0]), torch.tensor([[1, 2]]))
    assert refined(apart, rows, torch.tensor([2, 2]), 3).ids.tolist() == [0, 0, 1, 2]  # not over the experts' border
