"""The speeds to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ablation.arms import BASELINE, EXACT_OR_ROUNDED
from megatron_scmoe.config import expected_unique_share


class Measure(StrEnum):
    """What a goal is about."""

    PART_OF_LIMIT = "part of the limit"
    SPEEDUP = "speed-up"
    HIDDEN_SHARE = "hidden share"
    TIME_RATIO = "time ratio"
    BYTES = "bytes"
    BYTES_RATIO = "bytes ratio"


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the goals.

    Attributes:
        text: what it is.
        measure: of what.
        arms: each of which is shown.
        training, forward: thresholds; None: the figure is shown and not judged.
        sign: how a figure must stand to its threshold: ``>=``, ``<=`` or ``>``.
        against: the arm that speed-ups and time ratios are relative to; "best fixed" is the fastest fixed slot of pos2.
        shares: of the link rates that count; empty: all of them.
        step_share: only the link rate counts where the all-to-all takes about this part of top-2's whole training step.
        unlimited: only links without a limit count.
        published: what others give.
    """

    text: str
    measure: Measure
    arms: tuple[str, ...]
    training: float
    forward: float | None
    sign: str = ">="
    against: str = BASELINE
    shares: tuple[float, ...] = ()
    step_share: float | None = None
    unlimited: bool = False
    published: str = "not given"


def _at_most(text: str, measure: Measure, arms: tuple[str, ...], threshold: float, **more: Any) -> Goal:
    return Goal(text, measure, arms, threshold, threshold, "<=", **more)


def _faster(text: str, arms: tuple[str, ...], share: float, forward: float | None = 1.0, **more: Any) -> Goal:
    return Goal(text, Measure.SPEEDUP, arms, 1.0, forward, ">", shares=(share,), **more)


ONE_CHUNK, CHUNKS, LSH, BOTH = "pos2 adaptive", "pos2 adaptive chunks", "top-2 lsh off", "pos2 lsh adaptive chunks"
ADAPTIVE, PIPELINED, RECORDED = (ONE_CHUNK, CHUNKS), ("top-2 2 chunks", "top-2 4 chunks"), "pos2 adaptive (recorded)"
PART, SPEEDUP, HIDDEN, RATIO, BYTES, BYTES_RATIO = Measure
AT_60, FITTING = "1.43x and 1.66x (8 GPUs, SwinV2)", "0.70 to 1.0; 0.82 to 0.95"
NOBODY = "nobody combines them"
UNIQUE = expected_unique_share(8, 2, 2)
"""Part of the rows of top-2 that travels once, of 8 experts on 2 ranks."""
LATE = ("pos2", "pos2 top-2", "dgmoe", "every-block pos1")
GOALS = (
    Goal("speed-up over top-2, as a part of the limit", PART, ADAPTIVE, 0.95, 0.95, shares=(0.15, 0.45, 0.6, 0.8, 0.9)),
    Goal("speed-up over top-2", SPEEDUP, ADAPTIVE, 1.40, 1.60, shares=(0.6,), published=AT_60),
    Goal("speed-up over top-2", SPEEDUP, ADAPTIVE, 2.0, 2.5, shares=(0.8,)),
    Goal("hidden share, where communication fits the window", HIDDEN, ADAPTIVE, 0.95, 0.95, published=FITTING),
    _at_most("time of adaptive over that of the best fixed slot", RATIO, (ONE_CHUNK,), 1.02, against="best fixed"),
    _faster(
        "communication larger than the window: speed-up of adaptive chunks over one chunk",
        arms=(CHUNKS,),
        share=0.9,
        against=ONE_CHUNK,
    ),
    _at_most(
        "time of ScMoE over that of shared-expert, with nothing to hide",
        RATIO,
        (ONE_CHUNK,),
        1.02,
        against="shared-expert",
        unlimited=True,
    ),
    _faster("honest baseline: speed-up of pipelined top-2 over sequential top-2", PIPELINED, 0.6, published="faster"),
    _at_most(
        "what recording marks costs: time of recorded over not recorded", RATIO, (RECORDED,), 1.01, against=ONE_CHUNK
    ),
    Goal(
        "LSH-MoE at a rate of 0.2: speed-up of top-2 lsh over top-2, all-to-all 0.45 of the step",
        SPEEDUP,
        (LSH,),
        1.6,
        None,
        step_share=0.45,
        published="1.28x to 2.2x",
    ),
    Goal("both at once: speed-up over top-2", SPEEDUP, (BOTH,), 4.0, None, shares=(0.9,), published=NOBODY),
    *(
        _faster(f"both at once: speed-up over {one}", (BOTH,), 0.9, forward=None, against=one, published=NOBODY)
        for one in (CHUNKS, LSH)
    ),
    _at_most(
        "bytes by the interface counters: difference from the sizes of the tensors, as a part of these",
        BYTES,
        (LSH, CHUNKS, BOTH),
        0.05,
    ),
    *(
        _at_most(
            f"unique tokens: bytes by the interface counters over those of all rows; predicted {UNIQUE:.3f}",
            BYTES_RATIO,
            (f"{unique} off",),
            1.02 * UNIQUE,
            against=all_rows,
        )
        for unique, all_rows in (("top-2 unique", BASELINE), ("pos2 top-2 unique", "pos2 top-2 off"))
    ),
    *(
        _faster(f"{name}: speed-up over the same model without a codec", (arm,), share, against=base)
        for name in EXACT_OR_ROUNDED
        for arm, base in (
            (f"top-2 {name} off", BASELINE),
            (f"pos2 top-2 {name} adaptive chunks", "pos2 top-2 adaptive chunks"),
        )
        for share in (0.6, 0.8, 0.9)
    ),
    *(
        goal
        for model in LATE
        for goal in (
            Goal(
                f"spans of two groups, the first one landing one op late: speed-up over {model} without them",
                SPEEDUP,
                (f"{model} span 2 adaptive chunks",),
                1.10,
                1.10,
                against=f"{model} adaptive chunks",
                shares=(0.8,),
            ),
            *(
                _faster(
                    f"the same, speed-up over {model}",
                    (f"{model} span 2 adaptive chunks",),
                    share,
                    against=f"{model} adaptive chunks",
                )
                for share in (0.6, 0.9)
            ),
            Goal(
                "the same, part of its own limit", PART, (f"{model} span 2 adaptive chunks",), 0.95, 0.95, shares=(0.8,)
            ),
        )
    ),
)
"""What the speeds are judged by."""
