"""Which plan every group of a pipeline stage runs, step by step: measure, solve, check, settle. No clock, no rank.

::

    warm up -> measure 1, 2, 4 chunks, each sequentially -> solve -> check: old and new plan in turns -> settled
                        ^                                                                                  |
                        +------------------------------- every --overlap-interval steps -------------------+

All ranks of a stage count the same steps, so they are in the same phase without a word; only what they measured has to
be put together (``session.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from megatron_scmoe.contracts import SpanShape
from megatron_scmoe.overlap.costs import GroupPass, costs_of, mean_costs
from megatron_scmoe.overlap.kept import Plans, described
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.solver import SpanCosts, predicted_hidden_share, solve

WARM_UP_STEPS = 3
MEASURE_STEPS = 3
CHECK_STEPS = 6
"""Steps of a phase; measuring takes that many for each number of chunks, checking half of them for each plan."""


class Phase(StrEnum):
    """What the steps are for."""

    WARM_UP = "warm up"
    MEASURE = "measure"
    CHECK = "check"
    SETTLED = "settled"


@dataclass(frozen=True, slots=True)
class Decision:
    """What one rank decided for all ranks of its stage.

    Attributes:
        plans: by group.
        predicted_s: time of one micro-batch through all groups of the stage, forward and backward, by the solver.
        hidden_share: smallest of the groups', by the solver.
        text: for the log.
        share_before: ``hidden_share`` of the plans that these would replace.
    """

    plans: Mapping[int, Plans]
    predicted_s: float
    hidden_share: float
    text: str
    share_before: float = 0.0


type Evidence = Mapping[int, Mapping[int, SpanCosts | None]] | tuple[float, float]
"""What one rank measured: costs by number of chunks and group, or seconds of a micro-batch under old and new plans."""


def chunk_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``most``."""
    return tuple(2**power for power in range(most.bit_length()))


class Tuner:
    """The plans of one stage.

    Args:
        shapes: of the stage's groups, by their index over the whole model.
        plans: what they start with.
        counts: numbers of chunks to choose from.
        interval: steps after which to measure again; 0: never.
        settled_for: steps for which ``plans`` of a checkpoint have been settled; None where they are not from one.
        hidden_share: what was predicted for them; None where nothing was.

    Attributes:
        hidden_share: predicted for what was decided last, or for the plans of the checkpoint; None before that.
    """

    def __init__(
        self,
        shapes: Mapping[int, SpanShape],
        plans: Mapping[int, Plans],
        *,
        counts: Sequence[int],
        interval: int,
        settled_for: int | None = None,
        hidden_share: float | None = None,
    ) -> None:
        self.phase = Phase.WARM_UP if settled_for is None else Phase.SETTLED
        self.decision: Decision | None = None
        self.hidden_share = hidden_share
        self._shapes = dict(shapes)
        self._incumbent = dict(plans)
        self._counts = tuple(counts)
        self._interval = interval
        self._done = settled_for or 0
        self._measured: dict[int, dict[int, list[GroupPass]]] = defaultdict(lambda: defaultdict(list))
        self._checked: tuple[list[float], list[float]] = ([], [])

    @property
    def plans(self) -> dict[int, Plans]:
        """What each group runs in the coming step."""
        if self.sequential:
            return {
                group: Plans(sequential_plan(self._shapes[group], self._chunks_measured), plans.forward)
                for group, plans in self._incumbent.items()
            }
        if self.phase is Phase.CHECK and self._done % 2:
            assert self.decision is not None
            return dict(self.decision.plans)
        return dict(self._incumbent)

    @property
    def records(self) -> bool:
        """Whether the coming step has to be measured."""
        return self.phase in (Phase.MEASURE, Phase.CHECK)

    @property
    def sequential(self) -> bool:
        """Whether the coming step waits for every collective, so that each op is measured by itself."""
        return self.phase is Phase.MEASURE

    def take(self, passes: Sequence[GroupPass]) -> None:
        """What the step measured, before ``advance``."""
        if self.phase is Phase.MEASURE:
            for one in passes:
                self._measured[self._chunks_measured][one.group].append(one)
        if self.phase is Phase.CHECK:
            backwards = sum(one.backward for one in passes) / len(self._shapes)
            seconds = sum(one.total_s for one in passes) / backwards if backwards else float("inf")
            self._checked[self._done % 2].append(seconds)

    def advance(self) -> bool:
        """Count a step; returns whether the ranks have to put their evidence together now."""
        self._done += 1
        length = {
            Phase.WARM_UP: WARM_UP_STEPS,
            Phase.MEASURE: MEASURE_STEPS * len(self._counts),
            Phase.CHECK: CHECK_STEPS,
            Phase.SETTLED: self._interval,
        }[self.phase]
        if self._done < length or not length:
            return False
        if self.phase in (Phase.MEASURE, Phase.CHECK):
            return True
        self._enter(Phase.MEASURE)
        return False

    def evidence(self) -> Evidence:
        """What this rank measured in the phase that ends."""
        if self.phase is Phase.CHECK:
            old_s, new_s = self._checked
            return median(old_s), median(new_s)
        return {
            chunks: {
                group: costs_of(self._measured[chunks][group], shape, chunks) for group, shape in self._shapes.items()
            }
            for chunks in self._counts
        }

    def conclude(self, evidence: Sequence[Evidence]) -> Decision:
        """The decision, from what every rank of the stage measured."""
        if self.phase is Phase.CHECK:
            return self._compare([one for one in evidence if isinstance(one, tuple)])
        return self._solve([one for one in evidence if not isinstance(one, tuple)])

    def adopt(self, decision: Decision) -> None:
        """Go on with a decision that every rank of the stage has."""
        changed = any(plans.training != self._incumbent[group].training for group, plans in decision.plans.items())
        self.decision = decision
        self.hidden_share = decision.hidden_share
        if self.phase is Phase.MEASURE and changed:
            self._enter(Phase.CHECK)
            return
        self._incumbent = dict(decision.plans)
        self._enter(Phase.SETTLED)

    def _solve(self, evidence: Sequence[Mapping[int, Mapping[int, SpanCosts | None]]]) -> Decision:
        plans: dict[int, Plans] = {}
        predicted_s, share, share_before, exact = 0.0, 1.0, 1.0, True
        for group, shape in self._shapes.items():
            costs = {}
            for chunks in self._counts:
                of_ranks = [one[chunks][group] for one in evidence]
                known = [one for one in of_ranks if one is not None]
                if len(known) < len(of_ranks):
                    return self._unmeasured(group)
                costs[chunks] = mean_costs(known)
            training, forward = solve(shape, costs), solve(shape, costs, forward_only=True)
            plans[group] = Plans(training.plan, forward.plan)
            predicted_s += training.predicted_s
            exact = exact and training.exact
            share = min(share, training.hidden_share)
            before = self._incumbent[group].training
            share_before = min(share_before, predicted_hidden_share(shape, costs[before.chunks], before))
        text = f"{described(plans)}, predicted {predicted_s * 1e3:.1f} ms"
        if not exact:
            text += " (the search was cut short: there may be a better plan)"
        return Decision(plans, predicted_s, share, text, share_before)

    def _unmeasured(self, group: int) -> Decision:
        plans = dict(self._incumbent)
        text = (
            f"{described(plans)} stays: no gradient reaches the input of group {group}, so that its backward cannot be "
            "measured; set a plan with --overlap fixed"
        )
        return Decision(plans, float("inf"), 0.0, text)

    def _compare(self, evidence: Sequence[tuple[float, float]]) -> Decision:
        assert self.decision is not None
        old_s, new_s = (fmean(seconds) for seconds in zip(*evidence, strict=True))
        times = f"predicted {self.decision.predicted_s * 1e3:.1f} ms, measured {new_s * 1e3:.1f} ms"
        if new_s < old_s:
            plans, share = self.decision.plans, self.decision.hidden_share
            kept = f"{times}, before {old_s * 1e3:.1f} ms"
        else:
            # What was checked is training; evaluation's plan has nothing but its prediction to go by.
            plans = {
                group: Plans(self._incumbent[group].training, one.forward) for group, one in self.decision.plans.items()
            }
            share = self.decision.share_before
            kept = f"measured {old_s * 1e3:.1f} ms, stays: {described(self.decision.plans)} was not faster ({times})"
        return Decision(plans, self.decision.predicted_s, share, f"{described(plans)}, {kept}")

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._done = 0
        self._checked = ([], [])
        if phase is not Phase.CHECK:
            self._measured.clear()

    @property
    def _chunks_measured(self) -> int:
        return self._counts[self._done // MEASURE_STEPS]
