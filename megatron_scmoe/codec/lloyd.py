"""One step of Lloyd's algorithm on the clusters that hashing found (not in LSH-MoE).

Hashing cuts the space by planes that know nothing of the rows, so that many a row lies nearer to the mean of another
cluster than to that of its own. Here it joins the nearest one of its expert. Distances are those of sketches, a few
random coordinates of every row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_scmoe.codec.lsh import Clusters, means, owners

_STAYS = 1e-3
"""Of a row's squared length: what a move has to gain. Above rounding, so that a row that is its own mean stays."""
_ALIGNMENT = 4  # grouped matrix products want rows of 16 bytes


@torch.no_grad()
def refined(clusters: Clusters, sketches: Tensor, rows_per_expert: Tensor, num_clusters: int) -> Clusters:
    """Let every row join the nearest mean of its expert.

    Clusters keep their numbers, since other ranks know by now how many to expect; of some, no row is left. A row that
    is a cluster of its own stays. Takes rows x most clusters of an expert x 4 bytes.

    Args:
        clusters: of n rows.
        sketches: of the rows, fp32, [n, w].
        rows_per_expert: rows are in the order of their experts, these many for each, [e].
        num_clusters: m. The host has waited for it. On a GPU it waits again in here: for the largest number of clusters
            of an expert, and for the grouped products, which CUDA computes expert by expert in fp32.
    """
    if not num_clusters:
        return clusters
    seating = _seating(clusters, num_clusters)
    scores = _scores(sketches, rows_per_expert, means(sketches, clusters, num_clusters), seating)
    best, place = scores.max(dim=-1)
    own = scores.gather(1, (seating.of_cluster % seating.seats)[clusters.ids].unsqueeze(-1)).squeeze(-1)
    moves = 2 * (best - own) > _STAYS * sketches.square().sum(dim=-1)
    experts = owners(rows_per_expert, sketches.shape[0])
    ids = torch.where(moves, seating.cluster[experts * seating.seats + place], clusters.ids)
    sizes = torch.zeros_like(clusters.sizes).index_add_(0, ids, torch.ones_like(ids))
    return Clusters(ids, sizes, clusters.per_expert)


@dataclass(frozen=True, slots=True)
class _Seating:
    """Clusters of one expert side by side, whatever chunks they travel in; every expert has as many seats.

    Attributes:
        seats: of each expert.
        of_cluster: seat of each cluster, [m].
        cluster: that has each seat, [e * seats]; any where it is empty.
    """

    seats: int
    of_cluster: Tensor
    cluster: Tensor


def _seating(clusters: Clusters, num_clusters: int) -> _Seating:
    num_experts = clusters.per_expert.shape[1]
    per_expert = clusters.per_expert.sum(dim=0)
    seats = -(-int(per_expert.max()) // _ALIGNMENT) * _ALIGNMENT
    experts = owners(clusters.per_expert.flatten(), num_clusters) % num_experts
    by_expert = experts.argsort(stable=True)
    experts = experts[by_expert]
    places = torch.arange(num_clusters, device=experts.device)
    taken = experts * seats + places - (per_expert.cumsum(dim=0) - per_expert)[experts]
    cluster = places.new_zeros(num_experts * seats).index_put_((taken,), by_expert)
    return _Seating(seats, torch.empty_like(taken).index_put_((by_expert,), taken), cluster)


def _scores(rows: Tensor, rows_per_expert: Tensor, centres: Tensor, seating: _Seating) -> Tensor:
    """Of each row x and each centre c of its expert, x c - |c|^2 / 2, [n, seats]: the nearest one has the largest.

    One more column of both factors makes the second term, and keeps rows off empty seats.
    """
    width, num_experts = rows.shape[1], rows_per_expert.shape[0]
    columns = -(-(width + 1) // _ALIGNMENT) * _ALIGNMENT
    left = rows.new_zeros(rows.shape[0], columns)
    left[:, :width] = rows
    left[:, width] = 1
    right = rows.new_zeros(num_experts * seating.seats, columns)
    right[:, width] = torch.finfo(rows.dtype).min
    right[seating.of_cluster, :width] = centres
    right[seating.of_cluster, width] = centres.square().sum(dim=-1) / -2
    right = right.view(num_experts, seating.seats, columns).transpose(1, 2)
    ends = rows_per_expert.cumsum(dim=0).to(torch.int32)
    return torch.nn.functional.grouped_mm(left, right, offs=ends)
