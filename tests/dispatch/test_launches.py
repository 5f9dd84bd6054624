"""Kernels, copies and host waits of a group beside Megatron's own layer: docs/launches.md says what is counted now."""

from __future__ import annotations

import dataclasses

import launches
import pytest
import ranks
import torch

Counts = dict[str, tuple[launches.Count, launches.Count]]


@pytest.fixture(scope="module")
def counts() -> Counts:
    return ranks.run(launches.all_counts, 1, distributed=False)[0]


def test_the_document_says_what_is_counted(counts):
    assert launches.document(counts) == launches.DOCUMENT.read_text(), "run make docs"


def test_another_count_is_noticed(counts):
    """Negative control of the test above: one kernel more."""
    forward, backward = counts["scmoe"]
    more = dataclasses.replace(forward, kernels=forward.kernels + 1)
    assert launches.document(counts | {"scmoe": (more, backward)}) != launches.DOCUMENT.read_text()


def test_backward_waits_for_nothing(counts):
    assert all(backward.waits == backward.values_read == 0 for _, backward in counts.values())


def test_one_exchange_each_where_core_has_two_for_the_dispatch(counts):
    """And the counts' gather in forward."""
    core, ours = counts[launches.STOCK], counts["scmoe"]
    assert [one.collectives - other.collectives for one, other in zip(ours, core, strict=True)] == [-1, -1]


def test_one_chunk_launches_no_more_than_six(counts):
    """Kernels and copies beyond Megatron's, in each direction; and chunks do (negative control)."""
    more = {
        name: [(ours.kernels + ours.copies) - (core.kernels + core.copies) for ours, core in zip(*pair, strict=True)]
        for name in ("scmoe", *launches.LAUNCHES, "scmoe, two chunks")
        for pair in [(counts[name], counts[launches.STOCK])]
    }
    few = [count for name in ("scmoe", *launches.LAUNCHES) for count in more[name]]
    assert max(few) <= 6 < min(more["scmoe, two chunks"])


def test_the_host_waits_once_a_routing_and_before_no_op_that_it_can_enqueue(counts):
    waits = {name: (forward.waits, forward.waits_before_dense) for name, (forward, _) in counts.items()}
    assert waits.pop("dgmoe")[0] == 2 and {one for one, _ in waits.values()} == {1}
    assert {waits[name] for name in launches.LAUNCHES} == {(1, 0)}
    assert waits["scmoe"] == waits["scmoe at pos1"] == (1, 1)


def found(run) -> tuple[int, int]:
    """Kernels and copies of what runs."""
    _, names, _ = launches.launched(run)
    copies = names.pop("copy_", 0)
    return names.total(), copies


def test_the_count_knows_kernels_from_views():
    one = torch.ones(4, 4)
    assert found(lambda: one.t().view(2, 8) if one.t().is_contiguous() else one.view(2, 8)) == (0, 0)
    assert found(lambda: one.add(1).mul_(2)) == (2, 0)
    assert found(lambda: (one.new_zeros(0), one.new_zeros(1))) == (1, 0)
    assert found(lambda: one.t().contiguous()) == (0, 1)
    assert found(lambda: torch.matmul(one, one)) == (1, 0)
    assert found(lambda: torch.nn.functional.pad(one, (0, 1))) == (1, 1)
