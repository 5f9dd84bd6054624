"""Hashing, clusters and means against slow loops; what must hold whatever the rows are; exact gradients.

Rows are drawn with a margin: no coordinate is so near to another, or to 0, that rounding decides which axis is nearest.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_scmoe.codec.lsh import Clusters, Hasher, cluster, means, restore

MARGIN = 1e-5  # of a row's length; fp32 products of the widths below are right to 1e-6 of it
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

untimed = settings(deadline=None, max_examples=60)


# ---- a slow reference: one row and one function at a time


def functions_of(hasher: Hasher, hashes: int, width: int) -> list[list[list[float]]]:
    """The columns of every function, [hashes][width][h]."""
    columns = hasher._columns
    return columns.view(columns.shape[0], hashes, width).permute(1, 2, 0).double().tolist()


def slow_code(function, row) -> tuple[int, bool]:
    turned = [math.sumprod(row, column) for column in function]
    axis = max(range(len(turned)), key=lambda i: abs(turned[i]))
    return axis, turned[axis] < 0


def slow_codes(functions, rows: torch.Tensor) -> list[tuple]:
    return [tuple(slow_code(function, row) for function in functions) for row in rows.double().tolist()]


def is_clear(function, row) -> bool:
    second, first = sorted([0.0, *(abs(math.sumprod(row, column)) for column in function)])[-2:]
    return first - second > MARGIN * math.hypot(*row)


def experts_of(rows_per_expert) -> list[int]:
    return [expert for expert, num_rows in enumerate(rows_per_expert) for _ in range(num_rows)]


@dataclass(frozen=True)
class Group:
    """A cluster of the reference."""

    chunk: int
    expert: int
    members: list[int]


def slow_clusters(codes, rows_per_expert, chunks: int = 1) -> list[Group]:
    """The clusters in the order in which they travel."""
    found: list[dict] = [{} for _ in rows_per_expert]
    for row, (expert, code) in enumerate(zip(experts_of(rows_per_expert), codes, strict=True)):
        found[expert].setdefault(code, []).append(row)
    groups = []
    for chunk in range(chunks):
        for expert, clusters in enumerate(found):
            end, next_end = (math.ceil(i * len(clusters) / chunks) for i in (chunk, chunk + 1))
            groups += [Group(chunk, expert, members) for members in list(clusters.values())[end:next_end]]
    return groups


def check_keys(keys: torch.Tensor, codes) -> None:
    """Keys are equal where codes are, and nowhere else."""
    assert keys.dtype == torch.int64 and keys.shape == (len(codes),)
    assert len(set(zip(keys.tolist(), codes, strict=True))) == len(set(keys.tolist())) == len(set(codes))


def check_clusters(clusters: Clusters, groups: list[Group], rows_per_expert, chunks: int = 1) -> None:
    num_rows = sum(rows_per_expert)
    numbers = {row: number for number, group in enumerate(groups) for row in group.members}
    assert clusters.ids.tolist() == [numbers[row] for row in range(num_rows)]
    assert clusters.sizes.tolist() == [len(g.members) for g in groups] + [0] * (num_rows - len(groups))
    counts = Counter((group.chunk, group.expert) for group in groups)
    every_expert = range(len(rows_per_expert))
    assert clusters.per_expert.tolist() == [[counts[chunk, e] for e in every_expert] for chunk in range(chunks)]


def check_means(found: torch.Tensor, rows: torch.Tensor, groups: list[Group]) -> None:
    assert found.dtype == rows.dtype and found.shape == (len(groups), rows.shape[1])
    slow = rows.double().tolist()
    for mean, group in zip(found, groups, strict=True):
        columns = zip(*(slow[row] for row in group.members), strict=True)
        expected = [sum(column) / len(group.members) for column in columns]
        torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float64).to(rows.dtype))


# ---- strategies


@dataclass(frozen=True)
class Case:
    hasher: Hasher
    functions: list
    rows: torch.Tensor
    rows_per_expert: list[int]
    chunks: int

    @property
    def codes(self) -> list[tuple]:
        return slow_codes(self.functions, self.rows)

    @property
    def keys(self) -> torch.Tensor:
        return self.hasher.keys(self.rows)[0]

    def clusters(self) -> Clusters:
        return self.clusters_of(self.rows)

    def clusters_of(self, rows: torch.Tensor) -> Clusters:
        return cluster(self.hasher.keys(rows)[0], torch.tensor(self.rows_per_expert), self.chunks)


WIDTHS, HASHES, CHUNKS = st.integers(1, 12), st.integers(1, 8), st.integers(1, 4)
experts = st.lists(st.integers(0, 12), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


@st.composite
def cases(draw, hidden=WIDTHS, hashes=HASHES, width=None):
    """A few centres with noise: none makes duplicates, and the largest is as good as no centres."""
    hidden, hashes = draw(hidden), draw(hashes)
    width = draw(st.integers(1, hidden) if width is None else width)
    hasher = Hasher(hidden, hashes=hashes, width=width, seed=draw(seeds))
    functions = functions_of(hasher, hashes, width)
    rows_per_expert = draw(experts)
    num_rows, num_centres = sum(rows_per_expert), draw(st.integers(1, 4))
    noise = draw(st.sampled_from([0.0, 1e-3, 0.1, 3.0]))
    generator = torch.Generator().manual_seed(draw(seeds))
    centres = torch.randn(num_centres, hidden, generator=generator)
    rows = centres[torch.randint(num_centres, (num_rows,), generator=generator)]
    rows = (rows + noise * torch.randn(num_rows, hidden, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    assume(all(is_clear(function, row) for row in rows.double().tolist() for function in functions))
    return Case(hasher, functions, rows, rows_per_expert, draw(CHUNKS))


@st.composite
def keyed(draw, max_rows=12):
    """Keys as they come, rows of each expert, chunks."""
    rows_per_expert = draw(st.lists(st.integers(0, max_rows), min_size=1, max_size=5))
    num_rows = sum(rows_per_expert)
    some = st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1])
    return draw(st.lists(some, min_size=num_rows, max_size=num_rows)), rows_per_expert, draw(CHUNKS)


def clusters_of(keys, rows_per_expert, chunks: int = 1) -> Clusters:
    return cluster(torch.tensor(keys, dtype=torch.int64), torch.tensor(rows_per_expert), chunks)


def number_of(clusters: Clusters) -> int:
    return int(clusters.per_expert.sum())


# ---- equal to the reference


@settings(untimed, max_examples=100)
@given(cases())
def test_equals_the_slow_reference(case):
    check_keys(case.keys, case.codes)
    groups = slow_clusters(case.codes, case.rows_per_expert, case.chunks)
    clusters = case.clusters()
    check_clusters(clusters, groups, case.rows_per_expert, case.chunks)
    check_means(means(case.rows, clusters, len(groups)), case.rows, groups)


@untimed
@given(
    st.sampled_from([(62, 1), (63, 1), (31, 2), (32, 2), (20, 4), (21, 4), (22, 4), (40, 4), (64, 8)]).flatmap(
        lambda shape: cases(hidden=st.just(16), hashes=st.just(shape[0]), width=st.just(shape[1]))
    )
)
def test_keys_around_and_over_62_bits(case):
    check_keys(case.keys, case.codes)


@untimed
@given(keyed())
def test_clusters_of_any_keys(drawn):
    keys, rows_per_expert, chunks = drawn
    groups = slow_clusters(keys, rows_per_expert, chunks)
    check_clusters(clusters_of(*drawn), groups, rows_per_expert, chunks)


def test_hand_made_clusters_in_two_chunks():
    # Three clusters of one expert, of which two go first; one of another; none.
    clusters = clusters_of([7, 8, 7, 9, 8, 7, 7], [5, 2, 0], chunks=2)
    assert clusters.ids.tolist() == [0, 1, 0, 3, 1, 2, 2]
    assert clusters.sizes.tolist() == [2, 2, 2, 1, 0, 0, 0]
    assert clusters.per_expert.tolist() == [[2, 1, 0], [1, 0, 0]]


def test_the_checks_notice_what_is_wrong():
    """Negative controls: experts ignored, sums over all rows, a function too few or too many."""
    rows_per_expert = [4, 4]
    hasher = Hasher(6, hashes=5, width=2, seed=3)
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    keys, codes = hasher.keys(rows)[0], slow_codes(functions_of(hasher, 5, 2), rows)
    groups = slow_clusters(codes, rows_per_expert)
    right = clusters_of(keys.tolist(), rows_per_expert)
    check_keys(keys, codes)
    check_clusters(right, groups, rows_per_expert)
    check_means(means(rows, right, 4), rows, groups)

    blind = clusters_of(keys.tolist(), [8])
    assert number_of(right) == 4 and number_of(blind) == 2
    for wrong in (replace(right, ids=blind.ids), replace(right, sizes=blind.sizes), replace(right, ids=right.ids ^ 1)):
        with pytest.raises(AssertionError):
            check_clusters(wrong, groups, rows_per_expert)
    with pytest.raises(AssertionError):
        check_means(means(rows, replace(right, sizes=torch.full_like(right.sizes, 8)), 4), rows, groups)
    for wrong_keys in (torch.zeros_like(keys), torch.arange(8)):
        with pytest.raises(AssertionError):
            check_keys(wrong_keys, codes)


# ---- properties


@untimed
@given(keyed())
def test_sizes_and_numbers(drawn):
    keys, rows_per_expert, chunks = drawn
    clusters, num_rows = clusters_of(*drawn), len(keys)
    num_clusters = number_of(clusters)
    assert sorted(set(clusters.ids.tolist())) == list(range(num_clusters))
    assert clusters.sizes.shape == (num_rows,) and clusters.sizes.sum() == num_rows
    assert (clusters.sizes[:num_clusters] > 0).all() and (clusters.sizes[num_clusters:] == 0).all()
    # Numbers run through the experts of the first chunk, then through those of the second, and so on.
    assert clusters.per_expert.shape == (chunks, len(rows_per_expert))
    expert_of_cluster = [e for counts in clusters.per_expert.tolist() for e in experts_of(counts)]
    assert [expert_of_cluster[number] for number in clusters.ids] == experts_of(rows_per_expert)


@untimed
@given(keyed())
def test_chunks_are_even_and_change_numbers_only(drawn):
    keys, rows_per_expert, _ = drawn
    whole, cut = clusters_of(keys, rows_per_expert), clusters_of(*drawn)
    assert cut.per_expert.sum(dim=0).tolist() == whole.per_expert[0].tolist()
    assert (cut.per_expert.amax(dim=0) - cut.per_expert.amin(dim=0) <= 1).all()
    assert len(set(zip(whole.ids.tolist(), cut.ids.tolist(), strict=True))) == number_of(whole)
    assert torch.equal(whole.sizes[whole.ids], cut.sizes[cut.ids])


@untimed
@given(cases(), st.data())
def test_identical_rows_share_within_an_expert_only(case, data):
    assume(len(case.rows))
    row = case.rows[data.draw(st.integers(0, len(case.rows) - 1))]
    rows = row.expand_as(case.rows)
    clusters = case.clusters_of(rows)
    assert clusters.per_expert[0].tolist() == [min(num_rows, 1) for num_rows in case.rows_per_expert]
    assert number_of(clusters) == clusters.per_expert[0].sum()
    torch.testing.assert_close(means(rows, clusters, number_of(clusters))[clusters.ids], rows)


@untimed
@given(cases(), st.randoms(use_true_random=False))
def test_order_within_an_expert_does_not_matter(case, random):
    order: list[int] = []
    for expert_rows in torch.arange(len(case.rows)).split(case.rows_per_expert):
        order += random.sample(expert_rows.tolist(), len(expert_rows))
    case = replace(case, chunks=1)
    before, rows = case.clusters(), case.rows[order]
    after = case.clusters_of(rows)
    assert after.per_expert.tolist() == before.per_expert.tolist()
    renamed = set(zip(before.ids[order].tolist(), after.ids.tolist(), strict=True))
    assert len(renamed) == number_of(before)
    assert list(dict.fromkeys(after.ids.tolist())) == list(range(len(renamed)))  # by first row again
    found = means(rows, after, len(renamed))[after.ids]
    torch.testing.assert_close(found, means(case.rows, before, len(renamed))[before.ids][order])


@untimed
@given(st.permutations(range(30)), st.sampled_from(DTYPES), seeds)
def test_rows_alone_travel_unchanged(keys, dtype, seed):
    clusters = clusters_of(keys, [10, 0, 20])
    assert clusters.ids.tolist() == list(range(30)) and clusters.sizes.tolist() == [1] * 30
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert torch.equal(means(rows, clusters, 30), rows)


@untimed
@given(cases(), st.floats(0.01, 100))
def test_length_of_a_row_does_not_matter(case, factor):
    assert torch.equal(case.hasher.keys(case.rows.float() * factor)[0], case.keys)


@untimed
@given(cases(hashes=st.just(1)))
def test_opposite_rows_differ_in_every_function(case):
    both = torch.cat([case.rows, -case.rows])
    keys, opposite = case.hasher.keys(both)[0].chunk(2)
    assert (keys != opposite).all()
    check_keys(torch.cat([keys, opposite]), slow_codes(case.functions, both))


def test_bf16_rows_are_summed_in_fp32():
    rows = torch.ones(257, 1, dtype=torch.bfloat16)
    alone = torch.zeros(1, dtype=torch.bfloat16)
    for row in rows:
        alone = alone + row
    assert alone == torch.tensor(257).bfloat16() == 256  # which bf16 lacks, in steps or at once
    assert means(rows, clusters_of([0] * 257, [257]), 1).tolist() == [[1.0]]


# ---- levels: only the first functions count


@untimed
@given(cases(), st.data())
def test_a_level_counts_the_first_functions(case, data):
    """Of a fraction, the next one counts in some buckets; where it does is read from the keys."""
    num_functions = len(case.functions)
    level = torch.tensor(data.draw(st.integers(0, num_functions).map(float) | st.floats(0, num_functions, width=32)))
    keys, whole, codes = case.hasher.keys(case.rows, level)[0], int(level), case.codes
    buckets: dict[tuple, set[int]] = {}
    for code, key in zip(codes, keys.tolist(), strict=True):
        buckets.setdefault(code[:whole], set()).add(key)
    cut = {bucket for bucket, keys_in_it in buckets.items() if len(keys_in_it) > 1}
    assert not cut or level > whole
    check_keys(keys, [code[: whole + 1] if code[:whole] in cut else code[:whole] for code in codes])


@untimed
@given(cases(), st.data())
def test_a_higher_level_splits_clusters_only(case, data):
    levels = st.floats(0, len(case.functions), width=32)
    low, high = sorted(data.draw(st.tuples(levels, levels)))
    few, many = (case.hasher.keys(case.rows, torch.tensor(level))[0].tolist() for level in (low, high))
    assert len(set(zip(few, many, strict=True))) == len(set(many))
    assert torch.equal(case.hasher.keys(case.rows, torch.tensor(float(len(case.functions))))[0], case.keys)


@pytest.mark.parametrize("hashes", [6, 40])
def test_equal_parts_of_a_level_multiply_alike_where_buckets_are_cut_in_all_parts(hashes):
    rows = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    hasher = Hasher(64, hashes=hashes, width=4, seed=1)

    def num_keys(level: float) -> int:
        return len(hasher.keys(rows, torch.tensor(level))[0].unique())

    fewest, most = num_keys(4.0), num_keys(5.0)
    for fraction in (0.1, 0.3, 0.5, 0.9):
        cut = (8**fraction - 1) / 7  # of the buckets
        assert (num_keys(4 + fraction) - fewest) / (most - fewest) == pytest.approx(cut, abs=0.03)


# ---- the same everywhere


def test_a_seed_decides_and_nothing_else():
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    one = Hasher(16, hashes=6, width=2, seed=1234).keys(rows)[0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(one, Hasher(16, hashes=6, width=2, seed=1234).keys(rows)[0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    for seed in (0, 1235, 1234 * 100_003):
        assert not torch.equal(one, Hasher(16, hashes=6, width=2, seed=seed).keys(rows)[0])
    wide = [Hasher(16, hashes=40, width=4, seed=7).keys(rows)[0] for _ in range(2)]
    assert torch.equal(*wide)


@untimed
@given(cases())
def test_keys_do_not_depend_on_the_other_rows(case):
    assert torch.equal(case.hasher.keys(case.rows.flip(0))[0], case.keys.flip(0))
    for row, key in zip(case.rows, case.keys, strict=True):
        assert case.hasher.keys(row[None])[0] == key


@pytest.mark.parametrize(("hidden", "hashes", "width"), [(1, 3, 1), (8, 1, 8), (64, 6, 2), (64, 40, 4), (64, 12, 1)])
def test_columns_of_a_function_are_orthonormal(hidden, hashes, width):
    functions = torch.tensor(functions_of(Hasher(hidden, hashes=hashes, width=width, seed=5), hashes, width))
    torch.testing.assert_close(functions @ functions.mT, torch.eye(width).expand(hashes, -1, -1))
    if hidden > 1:
        assert len({str(function.tolist()) for function in functions}) == hashes


# ---- edges


@untimed
@given(cases(), st.data())
def test_bad_rows_are_announced(case, data):
    finite = case.hasher.keys(case.rows)[1]
    assert finite.dtype == torch.bool and finite.shape == () and finite
    assume(len(case.rows))
    rows = case.rows.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.integers(0, rows.shape[0] - 1))
        column = data.draw(st.integers(0, rows.shape[1] - 1))
        rows[row, column] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    assert not case.hasher.keys(rows)[1]
    # Nobody looks at the flag before the counts are exchanged: clusters are made of such keys too.
    assert case.clusters_of(rows).sizes.sum() == len(rows)


def test_a_width_over_the_hidden_size_is_refused():
    with pytest.raises(ValueError, match="a function keeps 9 coordinates of 8: lower the width"):
        Hasher(8, hashes=2, width=9, seed=0)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype, chunks):
    rows = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    keys, finite = Hasher(8, hashes=2, width=4, seed=0).keys(rows)
    clusters = cluster(keys, torch.tensor([0, 0]), chunks)
    assert finite and clusters.ids.shape == clusters.sizes.shape == (0,)
    assert clusters.per_expert.tolist() == [[0, 0]] * chunks
    centroids = means(rows, clusters, 0)
    assert centroids.shape == (0, 8) and centroids.dtype == dtype
    (centroids[clusters.ids] * 2 + (rows - centroids[clusters.ids])).sum().backward()
    assert rows.grad is not None and rows.grad.shape == (0, 8)


# ---- gradients, of the function that given clusters make


@settings(untimed, max_examples=50)
@given(keyed(max_rows=3), seeds)
def test_gradients(drawn, seed):
    keys, _, _ = drawn
    assume(keys)
    clusters = clusters_of(*drawn)
    num_clusters = number_of(clusters)
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(len(keys), 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def compensated(x, w):
        at_home = means(x, clusters, num_clusters)[clusters.ids]
        return at_home * w + (x - at_home)

    assert torch.autograd.gradcheck(lambda x: means(x, clusters, num_clusters), (x,))
    assert torch.autograd.gradcheck(compensated, (x, w))


def in_four_ops(outputs, clusters, weights, residual=None):
    """``restore`` as one would write it down."""
    rows = outputs[clusters.ids]
    if residual is not None:
        rows = rows + (residual[0] - residual[1][clusters.ids])
    return (rows * weights.unsqueeze(-1)).to(outputs.dtype)


def restoring(drawn, seed: int, dtype: torch.dtype):
    """Clusters, and outputs, rows, centroids and weights that want gradients."""
    clusters = clusters_of(*drawn)
    n, m = len(drawn[0]), number_of(clusters)
    generator = torch.Generator().manual_seed(seed)
    outputs, rows = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, 2), (n, 2)))
    centroids = means(rows, clusters, m)
    weights = torch.rand(n, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return clusters, *(tensor.requires_grad_() for tensor in (outputs, rows, centroids, weights))


@pytest.mark.parametrize("compensates", [True, False])
@given(drawn=keyed(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_restored_rows_have_exact_gradients(drawn, seed, compensates):
    assume(drawn[0])
    clusters, outputs, rows, _, weights = restoring(drawn, seed, torch.float64)

    def restored(outputs, weights, rows):
        return restore(outputs, clusters, weights, (rows, means(rows, clusters, outputs.shape[0])))

    if compensates:
        assert torch.autograd.gradcheck(restored, (outputs, weights, rows))
    else:
        assert torch.autograd.gradcheck(lambda o, w: restore(o, clusters, w), (outputs, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(drawn=keyed(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_restore_equals_its_four_ops(drawn, seed, dtype):
    assume(drawn[0])
    clusters, outputs, rows, centroids, weights = restoring(drawn, seed, dtype)
    inputs = (outputs, rows, centroids, weights)
    grad = torch.randn(len(drawn[0]), 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    one = restore(outputs, clusters, weights, (rows, centroids))
    other = in_four_ops(outputs, clusters, weights, (rows, centroids))
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    assert one.dtype is dtype
    exact = in_four_ops(outputs.double(), clusters, weights.double(), (rows.double(), centroids.double()))
    error = (one.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 16 * torch.finfo(torch.float32).eps).all()
    alone = clusters.sizes[clusters.ids] == 1
    assert torch.equal(one[alone], other[alone])
    gradients = [torch.autograd.grad(result, inputs, grad) for result in (one, other)]
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.dtype is theirs.dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_no_rows_are_restored():
    clusters, outputs, rows, centroids, weights = restoring(([], [0, 0]), 0, torch.float32)
    restore(outputs, clusters, weights, (rows, centroids)).sum().backward()
    assert rows.grad.shape == (0, 2)


# ---- a realistic size


def test_more_functions_and_more_coordinates_make_more_clusters():
    generator = torch.Generator().manual_seed(0)
    num_rows, hidden = 8192, 256
    rows_per_expert = torch.tensor([1024] * 8)
    centres = torch.randn(64, hidden, generator=generator)
    rows = centres[torch.randint(64, (num_rows,), generator=generator)]
    rows = rows + 0.15 * torch.randn(num_rows, hidden, generator=generator)

    def share(hashes: int, width: int) -> float:
        keys, finite = Hasher(hidden, hashes=hashes, width=width, seed=1234).keys(rows)
        assert finite
        return number_of(cluster(keys, rows_per_expert)) / num_rows

    by_hashes = [share(hashes, 2) for hashes in (1, 2, 4, 6, 8)]
    by_width = [share(6, width) for width in (1, 2, 4)]
    for shares in (by_hashes, by_width):
        assert all(few < many for few, many in itertools.pairwise(shares))
        assert shares[-1] < 0.4
