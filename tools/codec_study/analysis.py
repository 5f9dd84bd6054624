"""From runs to medians over seeds and paired differences. Reports need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.figures import Figure, ranged, spread

from codec_study.arms import CONTROL, NONE, NONE_TWO_RANKS, REORDERED, UNCOMPRESSED, all_arms

type RunResult = Mapping[str, Any]
"""What a run's result.json holds."""

NONE_OF = {arm.name: NONE_TWO_RANKS for arm in all_arms() if arm.ranks > 1}
"""What an arm is compared with in the place of none: on two ranks another balance loss is trained, each rank's own."""
LOSS, TOKENS_LOSS = "final_validation", "final_validation_of_tokens"
"""What a run ended at, evaluated as it was trained, and with tokens in the place of centroids."""


@dataclass(frozen=True, slots=True)
class Row:
    """One arm of one model, over its seeds.

    Attributes:
        model, arm: which.
        seeds: that were trained.
        loss: validation loss at the end, nats per token.
        to_none, to_control: how much higher it is than that arm's of the same seed, in percent; None where no seed has
            both. None has as many ranks, and the control one.
        with_tokens: how much higher the same model's loss is where tokens travel in the evaluation, in percent; None
            where tokens travel anyway, or where no seed was evaluated so, as none of the study's first runs was.
        with_tokens_to_none: how much higher that loss is than that of none, in percent; None where either is missing.
        seeds_with_tokens: that were evaluated so.
        rate: rows sent over rows routed, in the last tenth of the steps; all, where a row is for a rank.
        bytes: sent over those that none sends on as many ranks, there; None on one rank, which sends none.
        residual: what did not travel, relative to a token, there.
        seconds: of a step, on one rank without any network.
    """

    model: str
    arm: str
    seeds: tuple[int, ...]
    loss: Figure
    to_none: Figure | None
    to_control: Figure | None
    with_tokens: Figure | None
    with_tokens_to_none: Figure | None
    seeds_with_tokens: int
    rate: Figure
    bytes: Figure | None
    residual: Figure
    seconds: Figure


def rows(runs: Sequence[RunResult]) -> list[Row]:
    """A row for each arm of each model, in the order in which they first appear."""
    keys = dict.fromkeys((run["model"], run["arm"]) for run in runs)
    return [_row(runs, model, arm) for model, arm in keys]


def models_of(runs: Sequence[RunResult]) -> list[str]:
    """The models, in the order in which they first appear."""
    return list(dict.fromkeys(run["model"] for run in runs))


def arms_of(runs: Sequence[RunResult], model: str) -> list[str]:
    """The arms of a model, in the order in which they first appear."""
    return list(dict.fromkeys(run["arm"] for run in runs if run["model"] == model))


def by_seed(runs: Sequence[RunResult], model: str, arm: str) -> dict[int, RunResult]:
    """The runs of one arm."""
    return {run["seed"]: run for run in runs if (run["model"], run["arm"]) == (model, arm)}


def percent_above(runs: Sequence[RunResult], model: str, arm: str, against: str, loss: str = LOSS) -> list[float]:
    """How much higher a loss is than the final one of ``against``, in percent, for each seed that has both."""
    mine, others = by_seed(runs, model, arm), by_seed(runs, model, against)
    return [
        100 * (mine[seed][loss] / others[seed][LOSS] - 1)
        for seed in sorted(mine.keys() & others.keys())
        if loss in mine[seed]
    ]


def over_steps(runs: Sequence[RunResult], model: str, arm: str, curve: str) -> dict[int, Figure]:
    """A curve's spread over seeds at every step that all seeds have."""
    return _spreads([dict(run[curve]) for run in by_seed(runs, model, arm).values()])


def percent_above_none(runs: Sequence[RunResult], model: str, arm: str) -> list[float]:
    """How much higher the final loss is than that of none on as many ranks."""
    return percent_above(runs, model, arm, NONE_OF.get(arm, NONE))


def noise(runs: Sequence[RunResult], model: str) -> Figure | None:
    """How much higher the loss is where sums have another order and nothing else changes, in percent, over the seeds.

    Trainings that differ in the last bit go apart, so that none can be told from what changes as much.
    """
    return spread(percent_above(runs, model, REORDERED, NONE))


def is_noise(runs: Sequence[RunResult], model: str, arm: str, above: Figure) -> bool:
    """Whether rounding alone does as much at each seed as an arm does, in percent.

    The whole range of the arm has to lie in that of ``noise``, signs and all, or between that and zero. One seed of
    noise says nothing of three: there are as many as of the arm, or it is none.
    """
    found = noise(runs, model)
    seeds = by_seed(runs, model, REORDERED).keys() & by_seed(runs, model, NONE).keys()
    if found is None or len(seeds) < len(by_seed(runs, model, arm)):
        return False
    return min(found.low, 0.0) <= above.low and above.high <= max(found.high, 0.0)


def percent_above_none_over_steps(runs: Sequence[RunResult], model: str, arm: str) -> dict[int, Figure]:
    """As ``percent_above_none``, at every evaluation."""
    mine, others = by_seed(runs, model, arm), by_seed(runs, model, NONE_OF.get(arm, NONE))
    curves = []
    for seed in sorted(mine.keys() & others.keys()):
        base = dict(others[seed]["validation"])
        curves.append({step: 100 * (loss / base[step] - 1) for step, loss in mine[seed]["validation"] if step in base})
    return _spreads(curves)


def _bytes_over_none(runs: Sequence[RunResult], model: str, arm: str) -> list[float]:
    mine, others = by_seed(runs, model, arm), by_seed(runs, model, NONE_OF.get(arm, NONE))
    both = sorted(mine.keys() & others.keys())
    pairs = [(mine[seed].get("final_bytes"), others[seed].get("final_bytes")) for seed in both]
    return [sent / of_none for sent, of_none in pairs if sent and of_none]  # the study's first runs did not count them


def _spreads(curves: Sequence[Mapping[int, float]]) -> dict[int, Figure]:
    common = set.intersection(*map(set, curves)) if curves else set[int]()
    return {step: ranged(curve[step] for curve in curves) for step in sorted(common)}


def _row(runs: Sequence[RunResult], model: str, arm: str) -> Row:
    mine = by_seed(runs, model, arm)

    def of(name: str) -> Figure:
        return ranged(run[name] for run in mine.values())

    def of_tokens(against: str) -> list[float]:
        return [] if arm in UNCOMPRESSED else percent_above(runs, model, arm, against, TOKENS_LOSS)

    with_tokens = of_tokens(arm)
    return Row(
        model=model,
        arm=arm,
        seeds=tuple(sorted(mine)),
        loss=of(LOSS),
        to_none=spread(percent_above_none(runs, model, arm)),
        to_control=spread(() if arm in NONE_OF else percent_above(runs, model, arm, CONTROL)),
        with_tokens=spread(with_tokens),
        with_tokens_to_none=spread(of_tokens(NONE)),
        seeds_with_tokens=len(with_tokens),
        rate=of("final_rate"),
        bytes=spread(_bytes_over_none(runs, model, arm)),
        residual=of("final_residual"),
        seconds=of("seconds_per_step"),
    )
