"""Which plan every group of a pipeline stage runs, step by step: measure, solve, check, settle. No clock, no rank.

::

    warm up -> measure 1, 2, 4 chunks, each sequentially -> solve -> check: candidates by turns -> settled
                        ^                                                                             |
                        +----------------------------- every --overlap-interval steps ----------------+

Candidates are the plans that run already, what the solver finds for each number of chunks, for training and for
evaluation, the plan of --overlap fixed and that of off. Each runs training steps: evaluation's plan is chosen by their
forward passes. The simplest of those that are as fast as the fastest one wins (``trial.py``).

All ranks of a stage count the same steps, so they are in the same phase without a word; only what they measured has to
be put together (``session.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median

from megatron_scmoe.contracts import Plan, SpanShape
from megatron_scmoe.overlap.candidates import Candidate, candidates_of
from megatron_scmoe.overlap.costs import GroupPass, costs_of, mean_costs
from megatron_scmoe.overlap.kept import Plans, described
from megatron_scmoe.overlap.plan import sequential_plan
from megatron_scmoe.overlap.solver import SpanCosts
from megatron_scmoe.overlap.trial import TIE, TURNS, judge

WARM_UP_STEPS = 3
MEASURE_STEPS = 3
"""Steps of a phase; measuring takes that many for each number of chunks."""


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
        hidden_share: smallest of the groups' in training, by the solver.
        text: for the log.
        candidates: what is to be tried next, the simplest first; empty where there is no choice.
        left: numbers of those that need more turns; empty where ``plans`` are final.
    """

    plans: Mapping[int, Plans]
    hidden_share: float
    text: str
    candidates: tuple[Candidate, ...] = ()
    left: tuple[int, ...] = ()


type Turn = tuple[float, float]
"""Seconds of a micro-batch in one turn of a candidate: forward and backward, and forward alone."""

type Evidence = Mapping[int, Mapping[int, SpanCosts | None]] | tuple[tuple[Turn, ...], ...]
"""What one rank measured: costs by number of chunks and group, or the turns of each candidate."""


def chunk_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to ``most``."""
    return tuple(2**power for power in range(most.bit_length()))


class Tuner:
    """The plans of one stage.

    Args:
        shapes: of the stage's groups, by their index over the whole model.
        plans: what they start with.
        fixed: what they run with --overlap fixed, in one chunk.
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
        fixed: Mapping[int, Plan],
        counts: Sequence[int],
        interval: int,
        settled_for: int | None = None,
        hidden_share: float | None = None,
    ) -> None:
        self.phase = Phase.WARM_UP if settled_for is None else Phase.SETTLED
        self.decision: Decision | None = None
        self.hidden_share = hidden_share
        self._shapes = dict(shapes)
        self._incumbent, self._fixed = dict(plans), dict(fixed)
        self._counts = tuple(counts)
        self._interval = interval
        self._done = settled_for or 0
        self._measured: dict[int, dict[int, list[GroupPass]]] = defaultdict(lambda: defaultdict(list))
        self._candidates: tuple[Candidate, ...] = ()
        self._left: tuple[int, ...] = ()
        self._turns: list[list[Turn]] = []

    @property
    def plans(self) -> dict[int, Plans]:
        """What each group runs in the coming step."""
        if self.sequential:
            return {
                group: Plans(sequential_plan(self._shapes[group], self._chunks_measured), plans.forward)
                for group, plans in self._incumbent.items()
            }
        if self.phase is Phase.CHECK:
            tried = self._candidates[self._now_tried].plans
            return {group: Plans(tried[group], plans.forward) for group, plans in self._incumbent.items()}
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
            both = (
                _seconds(passes, len(self._shapes)),
                _seconds([p for p in passes if not p.backward], len(self._shapes)),
            )
            self._turns[self._now_tried].append(both)

    def advance(self) -> bool:
        """Count a step; returns whether the ranks have to put their evidence together now."""
        self._done += 1
        length = {
            Phase.WARM_UP: WARM_UP_STEPS,
            Phase.MEASURE: MEASURE_STEPS * len(self._counts),
            Phase.CHECK: TURNS * len(self._left),
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
            return tuple(map(tuple, self._turns))
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
        if decision.left:
            self._left, self._done = decision.left, 0
            return
        measured, self.decision = self.phase is Phase.MEASURE, decision
        self.hidden_share = decision.hidden_share
        if measured and decision.candidates:
            self._candidates = decision.candidates
            self._turns = [[] for _ in decision.candidates]
            self._left = tuple(range(len(decision.candidates)))
            self._enter(Phase.CHECK)
            return
        self._incumbent = dict(decision.plans)
        self._enter(Phase.SETTLED)

    def _solve(self, evidence: Sequence[Mapping[int, Mapping[int, SpanCosts | None]]]) -> Decision:
        costs: dict[int, dict[int, SpanCosts]] = defaultdict(dict)
        for group in self._shapes:
            for chunks in self._counts:
                of_ranks = [one[chunks][group] for one in evidence]
                known = [one for one in of_ranks if one is not None]
                if len(known) < len(of_ranks):
                    return self._unmeasured(group)
                costs[chunks][group] = mean_costs(known)
        solved = candidates_of(self._shapes, costs, self._incumbent, self._fixed)
        text = f"{described(solved.best)}, predicted {solved.predicted_s * 1e3:.1f} ms"
        if not solved.exact:
            text += " (the search was cut short: there may be a better plan)"
        if len(solved.candidates) > 1:
            return Decision(solved.best, solved.hidden_share, text, solved.candidates)
        return Decision(solved.best, solved.hidden_share, text)

    def _unmeasured(self, group: int) -> Decision:
        text = (
            f"{described(self._incumbent)} stays: no gradient reaches the input of group {group}, so that its backward "
            "cannot be measured; set a plan with --overlap fixed"
        )
        return Decision(dict(self._incumbent), 0.0, text)

    def _compare(self, evidence: Sequence[tuple[tuple[Turn, ...], ...]]) -> Decision:
        """Of the mean over ranks of every turn the fastest candidate, for training and for forward."""
        assert self.decision is not None
        turns = [
            [tuple(map(fmean, zip(*of_ranks, strict=True))) for of_ranks in zip(*candidate, strict=True)]
            for candidate in zip(*evidence, strict=True)
        ]
        seconds = [[turn[0] for turn in its] for its in turns]
        training, forward = judge(seconds), judge([[turn[1] for turn in its] for its in turns])
        best = self._candidates[training.best]
        plans = {group: Plans(best.plans[group], self._candidates[forward.best].plans[group]) for group in self._shapes}
        taken, known_to = max(map(len, turns)), training.known_to
        if training.left:  # training pays for the turns: what is not known of forward by then stays so
            left = tuple(sorted({*training.left, forward.best, *forward.left}))
            text = f"times scatter, and ratios are known to {known_to:.1%}: {len(left)} plans get {TURNS} turns more"
            return Decision(plans, best.hidden_share, text, left=left)
        text = self._said(plans, best, seconds)
        if taken > TURNS:
            text += f"; {taken} turns, as times scatter"
            text += f": ratios are known to {known_to:.1%}" * (known_to > 0)  # 0: no other plan is left
        return Decision(plans, best.hidden_share, text)

    def _said(self, plans: Mapping[int, Plans], best: Candidate, seconds: list[list[float]]) -> str:
        """The plans of training, with what they took beside those that ran before and those that were solved for.

        Times are medians over the turns that all three have: one that was out early has seen no later load.
        """
        assert self.decision is not None
        before = self._number_of({group: its.training for group, its in self._incumbent.items()})
        solved = self._number_of({group: its.training for group, its in self.decision.plans.items()})
        chosen = self._number_of(best.plans)
        shared = min(len(seconds[number]) for number in (before, solved, chosen))
        took = [f"{median(its[:shared]) * 1e3:.1f} ms" for its in seconds]
        times = f"predicted {best.predicted_s * 1e3:.1f} ms, measured {took[chosen]}"
        text = f"{described(plans)}, " + (f"stays: {times}" if before == chosen else f"{times}, before {took[before]}")
        if solved != chosen:
            predicted = f"predicted {self._candidates[solved].predicted_s * 1e3:.1f} ms"
            text += (
                f"; {described(self.decision.plans)} was not faster by {TIE:.0%}: {predicted}, measured {took[solved]}"
            )
        return text

    def _number_of(self, plans: Mapping[int, Plan]) -> int:
        return next(number for number, one in enumerate(self._candidates) if one.plans == plans)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._done = 0
        if phase is not Phase.CHECK:
            self._measured.clear()

    @property
    def _chunks_measured(self) -> int:
        return self._counts[self._done // MEASURE_STEPS]

    @property
    def _now_tried(self) -> int:
        return self._left[self._done % len(self._left)]


def _seconds(passes: Sequence[GroupPass], num_groups: int) -> float:
    """Of a micro-batch: all passes for each of those that run once a micro-batch."""
    once = [one for one in passes if one.backward] or passes
    return sum(one.total_s for one in passes) * num_groups / len(once) if once else float("inf")
