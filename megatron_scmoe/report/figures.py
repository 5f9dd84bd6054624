"""What every step's communication cost, and how much of it was hidden: as JSON lines and as a few scalars.

Exposed time is the time in which a collective was under way and nothing was computed, of each group, forward and
backward (``spans.py``). On a GPU an op lasts until the next one begins, waiting for the host included: beside it stands
for how long the compute lane may have had nothing enqueued. One file for each rank holds all its groups. The log gets
the sum over the groups of each pipeline stage, of its slowest rank; TensorBoard and W&B get that of the last stage,
where Megatron's writers are, and of a codec what it did in each group of the model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch

from megatron_scmoe.config import CodecConfig
from megatron_scmoe.contracts import Launch, Plan, TransferName
from megatron_scmoe.overlap.costs import GroupPass
from megatron_scmoe.overlap.recording import Compression, Load, Recording
from megatron_scmoe.overlap.spans import communication_s, exposed_s, hidden_share, length

MARGIN = 0.10
"""The measured hidden share may be this far below the predicted one before a warning says so."""

IMBALANCE = 1.5
"""Tokens of the busiest expert over the mean from which imbalance is the likelier cause."""

ONE_QUEUE = (
    "CUDA_DEVICE_MAX_CONNECTIONS is 1: all streams share a queue, in which a collective that waits for another one "
    "holds up what is launched behind both; set it to 32 (up to Hopper, Megatron insists on 1 with tensor or context "
    "parallelism)"
)
"""What to say where CUDA was told to launch in one queue, and collectives fly side by side; no error, since Megatron
asks for that, too."""


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One span, one step, one rank.

    Attributes:
        group: index of its first group over the whole model.
        slots: of its plan, for each call and chunk.
        launch: of its dispatches, where that can be: before, within or behind the op at the tap.
        blocking: whether its plan waits for each collective where it starts.
        communication_ms: time in which a collective was under way, all micro-batches, without hops inside a node.
        exposed_ms: the part of it beside which nothing was computed.
        hidden_share: 1 - exposed / communication.
        sent_bytes: what this rank sent to other ranks.
        sent_by: the same of each transfer, without hops inside a node.
        plain_by: what these would be if no codec rounded.
        tokens_per_expert: this rank's tokens for each expert of the model, after capacity, one group after the other.
        tokens_max_over_mean: of these, the largest over the mean.
        dropped_share: part of the tokens' choices that capacity dropped.
        sent_rate: rows that travelled over rows that were routed; 1 without a codec.
        largest_cluster: tokens that the largest centroid stood for.
        residual: mean over tokens of what did not travel, relative to the token (norms).
        idle_at_most_ms: for how long the compute lane may have had nothing enqueued, all micro-batches; None without a
            GPU.
    """

    group: int
    slots: tuple[tuple[int, ...], ...]
    launch: Launch
    blocking: bool
    communication_ms: float
    exposed_ms: float
    hidden_share: float
    sent_bytes: int
    tokens_per_expert: tuple[int, ...]
    tokens_max_over_mean: float
    dropped_share: float
    sent_rate: float = 1.0
    largest_cluster: int = 1
    residual: float = 0.0
    idle_at_most_ms: float | None = None
    sent_by: Mapping[str, int] = field(default_factory=dict)
    plain_by: Mapping[str, int] = field(default_factory=dict)


def rows_of(passes: Sequence[GroupPass], recording: Recording, plans: Mapping[int, Plan]) -> list[GroupRow]:
    """The step of this rank, span by span."""
    return [
        _row(
            group,
            plan,
            [one for one in passes if one.group == group],
            [one for one in recording.loads if one.group == group],
            [one for one in recording.compressions if one.group == group],
        )
        for group, plan in sorted(plans.items())
    ]


def _row(
    group: int,
    plan: Plan,
    passes: Sequence[GroupPass],
    loads: Sequence[Load],
    compressions: Sequence[Compression],
) -> GroupRow:
    communication = sum(communication_s(one.spans) for one in passes)
    exposed = sum(exposed_s(one.spans) for one in passes)
    # Summed on the device: each number that the host asks for is a copy, and a wait.
    parts = [[one.tokens_per_expert for one in loads if one.part == part] for part in sorted({o.part for o in loads})]
    tokens = torch.cat([torch.stack(part).sum(dim=0) for part in parts]).tolist() if loads else []
    dropped = int(sum(one.dropped for one in loads))
    kept = sum(tokens)
    routed = sum(one.rows for one in compressions)
    return GroupRow(
        group=group,
        slots=plan.slots,
        launch=plan.launch,
        blocking=plan.blocking,
        communication_ms=communication * 1e3,
        exposed_ms=exposed * 1e3,
        hidden_share=hidden_share(exposed, communication),
        sent_bytes=sum(one.sent_bytes for one in passes),
        tokens_per_expert=tuple(tokens),
        tokens_max_over_mean=max(tokens) * len(tokens) / kept if kept else 0.0,
        dropped_share=dropped / (kept + dropped) if kept + dropped else 0.0,
        sent_rate=sum(one.clusters for one in compressions) / routed if routed else 1.0,
        largest_cluster=int(torch.stack([one.largest for one in compressions]).max()) if compressions else 1,
        residual=float(sum(one.rows * one.residual.double() for one in compressions)) / (routed or 1),
        idle_at_most_ms=_sum(None if one.idle is None else length(one.idle) * 1e3 for one in passes),
        sent_by=_added(one.sent_by for one in passes),
        plain_by=_added(one.plain_by for one in passes),
    )


def _added(by_transfer: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Bytes of each transfer, in their order."""
    total: Counter[str] = Counter()
    for one in by_transfer:
        total.update(one)
    return {name.value: total[name] for name in TransferName if name in total}


@dataclass(frozen=True, slots=True)
class Summary:
    """All groups of a stage, one step: the slowest rank's times, all ranks' tokens. Field names are scalar names.

    ``sent_rate`` and ``residual`` are of centroids, ``sent_by`` and ``plain_by`` (bytes of the rank that sends most) of
    a codec that rounds and ``idle_at_most_ms`` of a GPU; without one they are not written.
    """

    communication_ms: float
    exposed_ms: float
    hidden_share: float
    sent_mib: float
    tokens_max_over_mean: float
    dropped_share: float
    sent_rate: float = 1.0
    residual: float = 0.0
    idle_at_most_ms: float | None = None
    sent_by: Mapping[str, int] = field(default_factory=dict)
    plain_by: Mapping[str, int] = field(default_factory=dict)

    def scalars(self, scmoe: CodecConfig) -> dict[str, float]:
        """What TensorBoard and W&B get, with or without what only a codec changes."""
        left_out = {"sent_by", "plain_by"} | (set() if scmoe.sends_centroids else {"sent_rate", "residual"})
        found = {name: value for name, value in asdict(self).items() if value is not None and name not in left_out}
        if scmoe.rounds:
            found |= {f"sent_mib/{name}": nbytes / 2**20 for name, nbytes in self.sent_by.items()}
        return found

    def words(self, scmoe: CodecConfig) -> str:
        """The log's line, with or without what only a codec changes."""
        of_codec = ""
        if scmoe.sends_centroids:
            of_codec = f", {self.sent_rate:.1%} of the rows sent, residual {self.residual:.2f} of a token"
        if scmoe.rounds:
            of_codec = "".join(f", {name} {_mib(sent, self.plain_by[name])}" for name, sent in self.sent_by.items())
            hops = round(self.sent_mib * 2**20) - sum(self.sent_by.values())
            of_codec += f", inside nodes {_mib(hops, 0)}" * (hops > 0)
        idle = "unknown" if self.idle_at_most_ms is None else f"{self.idle_at_most_ms:.1f} ms at most"
        return (
            f"{self.communication_ms:.1f} ms of communication, {self.exposed_ms:.1f} ms exposed, "
            f"{self.hidden_share:.0%} hidden, idle {idle}, {self.sent_mib:.3g} MiB sent, busiest expert "
            f"{self.tokens_max_over_mean:.2f} x mean, {self.dropped_share:.1%} dropped{of_codec}"
        )


def _mib(sent: int, plain: int) -> str:
    return f"{sent / 2**20:.3g} MiB" + (f" ({sent / plain:.1%} of what it was)" if plain else "")


def summarize(rows_of_ranks: Sequence[Sequence[GroupRow]]) -> Summary:
    """Put the rows of all ranks of a stage together."""
    slowest = max(rows_of_ranks, key=lambda rows: sum(row.exposed_ms for row in rows))
    communication = sum(row.communication_ms for row in slowest)
    exposed = sum(row.exposed_ms for row in slowest)
    imbalances = []
    for rows in _by_group(rows_of_ranks).values():
        tokens = [sum(counts) for counts in zip(*(row.tokens_per_expert for row in rows), strict=True)]
        imbalances.append(max(tokens) * len(tokens) / sum(tokens) if sum(tokens) else 0.0)
    most = max(rows_of_ranks, key=lambda rows: sum(row.sent_bytes for row in rows))
    every_row = [row for rows in rows_of_ranks for row in rows]
    return Summary(
        communication_ms=communication,
        exposed_ms=exposed,
        hidden_share=hidden_share(exposed, communication),
        sent_mib=sum(row.sent_bytes for row in most) / 2**20,
        tokens_max_over_mean=max(imbalances, default=0.0),
        dropped_share=max((row.dropped_share for row in every_row), default=0.0),
        sent_rate=fmean(row.sent_rate for row in every_row) if every_row else 1.0,
        residual=fmean(row.residual for row in every_row) if every_row else 0.0,
        idle_at_most_ms=_sum(row.idle_at_most_ms for row in slowest),
        sent_by=_added(row.sent_by for row in most),
        plain_by=_added(row.plain_by for row in most),
    )


def _sum(milliseconds: Iterable[float | None]) -> float | None:
    """None where one of them is not known."""
    total = 0.0
    for value in milliseconds:
        if value is None:
            return None
        total += value
    return total


def codec_scalars(rows_of_ranks: Sequence[Sequence[GroupRow]]) -> dict[str, float]:
    """What became of tokens in each group, by scalar name: means over the ranks, and the largest of all clusters.

    A cluster's mean size is one over the rate.
    """
    scalars: dict[str, float] = {}
    for group, rows in _by_group(rows_of_ranks).items():
        scalars[f"sent_rate/group{group}"] = fmean(row.sent_rate for row in rows)
        scalars[f"largest_cluster/group{group}"] = max(row.largest_cluster for row in rows)
        scalars[f"residual/group{group}"] = fmean(row.residual for row in rows)
    return scalars


def _by_group(rows_of_ranks: Sequence[Sequence[GroupRow]]) -> dict[int, list[GroupRow]]:
    by_group: dict[int, list[GroupRow]] = defaultdict(list)
    for rows in rows_of_ranks:
        for row in rows:
            by_group[row.group].append(row)
    return by_group


def warning(summary: Summary, predicted_share: float, *, one_queue: bool) -> str | None:
    """What to say where less is hidden than was predicted; None where it is as it should be.

    Args:
        summary: what was measured.
        predicted_share: hidden share by the solver.
        one_queue: whether collectives fly side by side on a GPU that is launched on in one queue.
    """
    if summary.hidden_share >= predicted_share - MARGIN:
        return None
    if one_queue:
        cause = ONE_QUEUE
    elif summary.tokens_max_over_mean > IMBALANCE:
        cause = (
            f"the busiest expert gets {summary.tokens_max_over_mean:.1f} times the mean, so ranks wait for one "
            "another; raise --moe-aux-loss-coeff"
        )
    else:
        cause = "the plan was made for other times; let --overlap-interval measure again sooner"
    return f"{summary.hidden_share:.0%} of the communication is hidden, {predicted_share:.0%} was predicted: {cause}"
