"""Locality-sensitive hashing: which rows are alike, and their means (LSH-MoE, arXiv 2411.08446, section 3).

Every hash function turns a row by a fixed random rotation, keeps ``width`` of its coordinates, and answers with the
axis that the result is nearest to (cross-polytope hashing; Andoni et al., arXiv 1509.02897). Rows for which all
functions answer alike, and which go to the same expert, are one cluster. A width of 1 answers with a sign: spherical
hashing. Torch only.

No shape here depends on what the rows hold, so nothing waits for the GPU: the number of clusters stays on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

_KEY_BITS = 62
_SCRAMBLER = 0x1E3779B97F4A7C15  # odd, with bits all over: 2^64 over the golden ratio
_EXPERT_SCRAMBLER = 0x2545F4914F6CDD1D
_CHANCES = 1 << 20
_SKETCH_WIDTH = 32


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which cluster each of n rows belongs to; m clusters in all.

    They are numbered by the chunk they travel in, then by expert, then by their first row.

    Attributes:
        ids: cluster of each row, [n]. Rows of different experts never share one.
        sizes: rows of each cluster, [n]; 0 behind the m-th.
        per_expert: clusters of each expert in each chunk, [chunks, e].
    """

    ids: Tensor
    sizes: Tensor
    per_expert: Tensor


class Hasher:
    """``hashes`` functions, the same on every rank, in recomputation and after a resume.

    Args:
        hidden_size: width of a row.
        hashes: number of functions (q in the paper).
        width: coordinates that a function keeps; 1 for spherical hashing.
        seed: of the rotations.

    Raises:
        ValueError: where ``width`` is larger than ``hidden_size``.
    """

    def __init__(self, hidden_size: int, *, hashes: int, width: int, seed: int) -> None:
        if width > hidden_size:
            raise ValueError(f"a function keeps {width} coordinates of {hidden_size}: lower the width")
        self._hashes, self._width = hashes, width
        # Drawn on the CPU whatever the device is. Orthonormal columns: the first ones of a random rotation.
        generator = torch.Generator().manual_seed(seed)
        columns = torch.linalg.qr(torch.randn(hashes, hidden_size, width, generator=generator)).Q
        self._columns = columns.transpose(0, 1).reshape(hidden_size, hashes * width)
        if hashes * math.log2(2 * width) <= _KEY_BITS:
            digits = [(2 * width) ** place for place in range(hashes)]
            self._digits = torch.tensor(digits)
        else:  # a sum of odd multiples, modulo 2^64: two keys out of 2^32 rows collide, and share a cluster, by chance
            self._digits = torch.randint(2**62, (hashes,), generator=generator) * 2 + 1
        width = min(_SKETCH_WIDTH, hidden_size)
        self._sketch = torch.linalg.qr(torch.randn(hidden_size, width, generator=generator)).Q

    @torch.no_grad()
    def sketches(self, rows: Tensor) -> Tensor:
        """``rows``, [n, h], on a random subspace, in fp32, [n, w]: distances in it are nearly those of the rows."""
        if self._sketch.device != rows.device:
            self._sketch = self._sketch.to(rows.device)
        return rows.float() @ self._sketch

    @torch.no_grad()
    def keys(self, rows: Tensor, level: Tensor | None = None, experts: Tensor | int = 0) -> tuple[Tensor, Tensor]:
        """Hash ``rows``, [n, h].

        Args:
            rows: to hash.
            level: how many functions count, from 0 to all, on the rows' device; None for all. Of a fraction, say 4.3,
                the first four count for every row, and the fifth in a part of their buckets: so many that every tenth
                of a level multiplies the keys alike, where a function cuts a bucket in all the parts that it can.
            experts: that the rows go to, [n], or one for all: each has buckets of its own, which are cut or not.

        Returns:
            One key for each row, int64, [n]: equal where all functions answer alike; and whether all rows are finite
            in fp32, a bool on their device. Keys of rows that are not mean nothing.
        """
        if self._columns.device != rows.device:
            self._columns, self._digits = self._columns.to(rows.device), self._digits.to(rows.device)
        # In fp32 whatever the rows are: a bf16 product of this size is slower on CPUs, and rounds neighbours apart.
        turned = (rows.float() @ self._columns).view(-1, self._hashes, self._width)
        axis = turned.abs().argmax(dim=-1, keepdim=True)
        codes = (2 * axis + (turned.gather(-1, axis) < 0)).squeeze(-1)
        return self._combined(codes * self._digits, level, experts), turned.isfinite().all()

    def _combined(self, answers: Tensor, level: Tensor | None, experts: Tensor | int) -> Tensor:
        if level is None:
            return answers.sum(dim=-1)
        whole, parts = level.floor().long(), 2 * self._width
        counts = torch.arange(self._hashes, device=answers.device) < whole
        keys = (answers * counts).sum(dim=-1)
        # A bucket's own key and expert, scrambled, say whether the next function cuts it: so all of its rows agree.
        scrambled = (keys + 1) * _SCRAMBLER + experts * _EXPERT_SCRAMBLER
        chance = (scrambled >> 44) & (_CHANCES - 1)  # the upper bits depend on all of both
        cuts = chance < (torch.pow(parts, level - whole) - 1) / (parts - 1) * _CHANCES
        following = answers.index_select(1, whole.clamp(max=self._hashes - 1).view(1)).squeeze(1)
        return keys + torch.where(cuts, following, 0)


def owners(counts: Tensor, total: int) -> Tensor:
    """Which of ``counts`` each of ``total`` things is of, [total], where they lie in order; no host sync."""
    return torch.repeat_interleave(torch.arange(counts.shape[0], device=counts.device), counts, output_size=total)


@torch.no_grad()
def cluster(keys: Tensor, rows_per_expert: Tensor, chunks: int = 1) -> Clusters:
    """Find the clusters of n rows.

    Args:
        keys: of the rows, [n].
        rows_per_expert: rows are in the order of their experts, these many for each, [e].
        chunks: that the clusters of every expert are spread over, evenly and in order.
    """
    num_rows, num_experts = keys.shape[0], rows_per_expert.shape[0]
    places = torch.arange(num_rows, device=keys.device)
    experts = owners(rows_per_expert, num_rows)
    # The sort is stable and rows are in the order of their experts, so rows of one cluster come to lie side by side.
    keys, order = keys.sort(stable=True)
    sorted_experts = experts[order]
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = (keys[1:] != keys[:-1]) | (sorted_experts[1:] != sorted_experts[:-1])
    begin = torch.where(begins, places, 0).cummax(dim=0).values
    first_row = torch.empty_like(order)
    first_row[order] = order[begin]
    is_first = first_row == places
    ids = (is_first.cumsum(dim=0) - 1)[first_row]
    sizes = torch.zeros_like(ids).index_add_(0, ids, torch.ones_like(ids))
    per_expert = torch.zeros_like(rows_per_expert).index_add_(0, experts, is_first.to(rows_per_expert.dtype))
    if chunks == 1:
        return Clusters(ids, sizes, per_expert.unsqueeze(0))

    expert = torch.zeros_like(ids).index_put_((ids,), experts)  # of each cluster
    place_in_expert = places - (per_expert.cumsum(dim=0) - per_expert)[expert]
    chunk = place_in_expert * chunks // per_expert[expert].clamp(min=1)
    chunk = torch.where(sizes > 0, chunk, chunks)  # what is no cluster comes last
    order = chunk.argsort(stable=True)
    number = torch.empty_like(order).index_put_((order,), places)
    counts = rows_per_expert.new_zeros((chunks + 1) * num_experts)
    counts.index_add_(0, chunk * num_experts + expert, torch.ones_like(counts[:1]).expand(num_rows))
    return Clusters(number[ids], sizes[order], counts.view(chunks + 1, num_experts)[:chunks])


def means(rows: Tensor, clusters: Clusters, num_clusters: int) -> Tensor:
    """The mean of each cluster, [m, h], from rows [n, h]; summed in fp32 or wider; zeros where there are no rows."""
    return _Means.apply(rows, clusters.ids, clusters.sizes[:num_clusters, None].clamp(min=1))


class _Means(torch.autograd.Function):
    """Torch's own sum by index would keep all rows until backward, in fp32, to know their number."""

    @staticmethod
    def forward(ctx, rows, ids, sizes):
        ctx.save_for_backward(ids, sizes)
        wide = torch.promote_types(rows.dtype, torch.float32)
        sums = rows.new_zeros(sizes.shape[0], rows.shape[1], dtype=wide).index_add_(0, ids, rows.to(wide))
        return sums.div_(sizes).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, sizes = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad.to(wide).div(sizes).to(grad.dtype).index_select(0, ids), None, None


def restore(
    outputs: Tensor, clusters: Clusters, weights: Tensor, residual: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Each row's weighted output, ``weight (output of its centroid + row - centroid)``, [n, h].

    Args:
        outputs: of the centroids, [m, h].
        clusters: whose rows they are.
        weights: of the rows, [n].
        residual: the rows, [n, h], and the centroids, [m, h], their means; None to leave the difference out.
    """
    if residual is None:
        return _Restore.apply(clusters.ids, outputs, weights)
    return _Restore.apply(clusters.ids, outputs, weights, *residual, clusters.sizes[: outputs.shape[0]] > 1)


class _Restore(torch.autograd.Function):
    """One node for what would be four, each with a tensor of all rows to keep until backward."""

    @staticmethod
    def forward(ctx, ids, outputs, weights, *residual):
        ctx.save_for_backward(ids, outputs, weights, *residual)
        return _weighted(ids, outputs, weights, *residual).to(outputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ids, outputs, weights, *residual = ctx.saved_tensors
        row_grad = (grad * weights.unsqueeze(-1)).to(outputs.dtype)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        sums = torch.zeros_like(outputs, dtype=wide).index_add_(0, ids, row_grad.to(wide)).to(outputs.dtype)
        weight_grad = None
        if ctx.needs_input_grad[2]:
            weight_grad = (_weighted(ids, outputs, None, *residual) * grad).sum(dim=-1, dtype=weights.dtype)
        # Of a row that is its own centroid, what comes by way of the row and by way of the centroid adds up to zero.
        return None, sums, weight_grad, *((row_grad, -sums, None) if residual else ())


def _weighted(ids: Tensor, outputs: Tensor, weights: Tensor | None, *residual: Tensor) -> Tensor:
    if not residual:
        chosen = outputs.index_select(0, ids)
        return chosen if weights is None else chosen.mul_(weights.unsqueeze(-1))
    rows, centroids, shared = residual
    wide = torch.promote_types(outputs.dtype, torch.float32)
    shared = shared.to(wide)
    weights = shared.new_ones(ids.shape) if weights is None else weights.to(wide)
    # output - centroid takes a pass over the centroids, where row - centroid would take three over all rows. A row that
    # has its cluster to itself gets the output bit for bit: nothing is subtracted there, and nothing is added.
    differences = torch.addcmul(outputs.to(wide), centroids.to(wide), shared.unsqueeze(-1), value=-1)
    # A bag of one row each: gathered and weighted in one pass.
    result = embedding_bag(ids.unsqueeze(-1), differences, mode="sum", per_sample_weights=weights.unsqueeze(-1))
    return result.addcmul_(rows, (weights * shared[ids]).unsqueeze(-1))
