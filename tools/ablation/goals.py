"""The speeds to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ablation.arms import BASELINE


class Measure(StrEnum):
    """What a goal is about."""

    PART_OF_LIMIT = "part of the limit"
    SPEEDUP = "speed-up"
    HIDDEN_SHARE = "hidden share"
    TIME_RATIO = "time ratio"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """One line of the goals.

    Attributes:
        text: what it is.
        measure: of what.
        arms: each of which is shown.
        against: the arm that speed-ups and time ratios are relative to; "best fixed" is the fastest fixed slot of pos2.
        sign: how a figure must stand to its threshold: ``>=``, ``<=`` or ``>``.
        training, forward: thresholds; None: the figure is shown and not judged.
        shares: of the link rates that count; empty: all of them.
        step_share: only the link rate counts where the all-to-all takes about this part of top-2's whole training step.
        unlimited: only links without a limit count.
        published: what others give.
    """

    text: str
    measure: Measure
    arms: tuple[str, ...]
    against: str = BASELINE
    sign: str = ">="
    training: float
    forward: float | None
    shares: tuple[float, ...] = ()
    step_share: float | None = None
    unlimited: bool = False
    published: str = "not given"


ADAPTIVE = ("pos2 adaptive", "pos2 adaptive chunks")
GOALS = (
    Goal(
        text="speed-up over top-2, as a part of the limit",
        measure=Measure.PART_OF_LIMIT,
        arms=ADAPTIVE,
        training=0.95,
        forward=0.95,
        shares=(0.15, 0.45, 0.6, 0.8, 0.9),
    ),
    Goal(
        text="speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=ADAPTIVE,
        training=1.40,
        forward=1.60,
        shares=(0.6,),
        published="1.43x and 1.66x (8 GPUs, SwinV2)",
    ),
    Goal(
        text="speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=ADAPTIVE,
        training=2.0,
        forward=2.5,
        shares=(0.8,),
    ),
    Goal(
        text="hidden share, where communication fits the window",
        measure=Measure.HIDDEN_SHARE,
        arms=ADAPTIVE,
        training=0.95,
        forward=0.95,
        published="0.70 to 1.0; 0.82 to 0.95",
    ),
    Goal(
        text="time of adaptive over that of the best fixed slot",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive",),
        against="best fixed",
        sign="<=",
        training=1.02,
        forward=1.02,
    ),
    Goal(
        text="communication larger than the window: speed-up of adaptive chunks over one chunk",
        measure=Measure.SPEEDUP,
        arms=("pos2 adaptive chunks",),
        against="pos2 adaptive",
        sign=">",
        training=1.0,
        forward=1.0,
        shares=(0.9,),
    ),
    Goal(
        text="time of ScMoE over that of shared-expert, with nothing to hide",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive",),
        against="shared-expert",
        sign="<=",
        training=1.02,
        forward=1.02,
        unlimited=True,
    ),
    Goal(
        text="honest baseline: speed-up of pipelined top-2 over sequential top-2",
        measure=Measure.SPEEDUP,
        arms=("top-2 2 chunks", "top-2 4 chunks"),
        sign=">",
        training=1.0,
        forward=1.0,
        shares=(0.6,),
        published="faster",
    ),
    Goal(
        text="what recording marks costs: time of recorded over not recorded",
        measure=Measure.TIME_RATIO,
        arms=("pos2 adaptive (recorded)",),
        against="pos2 adaptive",
        sign="<=",
        training=1.01,
        forward=1.01,
    ),
    Goal(
        text="LSH-MoE at a rate of 0.2: speed-up of top-2 lsh over top-2, all-to-all 0.45 of the step",
        measure=Measure.SPEEDUP,
        arms=("top-2 lsh off",),
        training=1.6,
        forward=None,
        step_share=0.45,
        published="1.28x to 2.2x",
    ),
    Goal(
        text="both at once: speed-up over top-2",
        measure=Measure.SPEEDUP,
        arms=("pos2 lsh adaptive chunks",),
        training=4.0,
        forward=None,
        shares=(0.9,),
        published="nobody combines them",
    ),
    *(
        Goal(
            text=f"both at once: speed-up over {alone}",
            measure=Measure.SPEEDUP,
            arms=("pos2 lsh adaptive chunks",),
            against=alone,
            sign=">",
            training=1.0,
            forward=None,
            shares=(0.9,),
            published="nobody combines them",
        )
        for alone in ("pos2 adaptive chunks", "top-2 lsh off")
    ),
    Goal(
        text="bytes by the interface counters: difference from the sizes of the tensors, as a part of these",
        measure=Measure.BYTES,
        arms=("top-2 lsh off", "pos2 adaptive chunks", "pos2 lsh adaptive chunks"),
        sign="<=",
        training=0.05,
        forward=0.05,
    ),
)
"""Issue 4, "Speed to reach", and of issue 5 what is about time and bytes."""
