"""Judge the model of time by what others published and what this project measured; write docs/planner.md.

``run`` is what the planner's ``--check`` calls. Constants are fitted to published steps once without each family of
models, to predict that family, and once to all, for users: the latter are written to ``constants.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import atomic

from planning import layers, scmoe, scmoe_bounds, slow_links
from planning.fit import MOST_ITERATIONS, Fit, fitted, predicted_s
from planning.hardware import CONSTANTS_FILE, HARDWARE, NEAREST, Constants, Machine
from planning.judging import Goal, Judged
from planning.page import Section, page
from planning.published import steps

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "planner.md"
ARMS = tuple(sorted(found.parent for found in (ROOT / "docs" / "results").glob("*/result.json")))
"""Kept results of the ablation."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found.

    Attributes:
        sections: one for each goal.
        constants: fitted to all published steps, by GPU and release.
    """

    sections: tuple[Section, ...]
    constants: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the goals that are not met."""
        return tuple(section.goal.name for section in self.sections if not section.goal.met(section.figures))


def iterations() -> int:
    """Most that ``run`` will tell ``advance`` of."""
    return MOST_ITERATIONS * (1 + len({step.family for step in steps()}))


def run(target: Path = PAGE, constants: Path = CONSTANTS_FILE, advance: Advance = lambda _: None) -> Outcome:
    """Fit, judge, and write the page and the constants.

    Args:
        target: the page.
        constants: the file of constants.
        advance: is told of each iteration of a fit.

    Raises:
        OSError, ValueError: where what is published or kept cannot be read.
    """
    everything = fitted(steps(), advance=advance)
    table = _constants(everything)
    nearest = Constants(**next(iter(table["A30-PCIe"].values())))
    alone = Machine(hardware=HARDWARE["H100"], constants=Constants())
    layer = layers.judged(alone)
    fitted_layer = layers.judged(replace(alone, constants=Constants(**table["H100"][max(table["H100"])])))
    outcome = Outcome(
        (
            Section(Goal(name="published steps", each=0.30, part=0.9, middle=0.15, unit="s"), held_out(advance)),
            Section(
                Goal(name="one layer on H100", each=0.20, unit="s"),
                tuple(layer),
                (*layers.causes(layer), layers.by_others(fitted_layer)),
            ),
            Section(
                Goal(name="ScMoE's speed-ups", each=0.10),
                scmoe.judged(nearest),
                tuple(scmoe_bounds.causes(nearest)),
            ),
            Section(
                Goal(name="arms on the slow link", each=0.10, unit="s"),
                tuple(figure for folder in ARMS for figure in slow_links.judged(folder)),
                tuple(cause for folder in ARMS for cause in slow_links.causes(folder)),
            ),
        ),
        table,
    )
    atomic.write_text(target, page(outcome.sections, table))
    atomic.write_text(constants, json.dumps(table, indent=1) + "\n")
    return outcome


def held_out(advance: Advance = lambda _: None) -> tuple[Judged, ...]:
    """Each published step, by constants that were fitted without its family."""
    told = steps()
    fits = {
        family: fitted([step for step in told if step.family != family], advance)
        for family in dict.fromkeys(step.family for step in told)
    }
    return tuple(
        Judged(
            what=step.words,
            measured=step.step_s,
            predicted=predicted_s(step, fits[step.family]),
            group=step.family,
        )
        for step in told
    )


def _constants(fit: Fit) -> dict[str, dict[str, dict[str, float]]]:
    """Of each GPU and release that has published steps; of other GPUs those of the nearest one's newest release."""
    told: dict[str, dict[str, dict[str, float]]] = {}
    for gpu, release in sorted({(step.gpu, step.release) for step in steps()}):
        told.setdefault(gpu, {})[release] = asdict(fit.constants(gpu, release))
    for gpu, nearest in NEAREST.items():
        told[gpu] = {f"{max(told[nearest])} of {nearest}": told[nearest][max(told[nearest])]}
    return told
