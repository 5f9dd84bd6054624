"""What people read of a study: files of its folder, a table on the terminal, an HTML report, a section of Markdown.

A result is what ``folder.read`` says, with ``encoding`` and maybe ``step_times`` beside.
Every figure is one of it, or of ``analysis`` made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import one_line
from rich.console import Console
from studies import kept, report, tables

from codec_study import analysis, cost, folder, goals, plots, wall_time, words
from codec_study.arms import CONTROL, NONE

HERE = Path(__file__).parent
ALL, FEW = len(words.HEADINGS), 4
SHAPES = ((ALL, " ", ","), (ALL, "\n", ",\n "), (FEW, "\n", ",\n "))
"""Of the table on the terminal."""


def write_results(study: Path, result: Mapping[str, Any]) -> None:
    """Write meta.json, result.csv and report.html into the folder that has the runs, and print the table."""
    kept.write(study / folder.META, result["meta"])
    report.write(study, [csv_row(result, run) for run in result["runs"]], html(result))
    print_table(result)


def csv_row(result: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """One run; its differences are those to the same seed of none and of the control, where these were trained."""
    above = {}
    control = "" if run["arm"] in analysis.NONE_OF else CONTROL
    for name, against in ((NONE, analysis.NONE_OF.get(run["arm"], NONE)), (CONTROL, control)):
        twins = [one for one in result["runs"] if (one["arm"], one["seed"]) == (against, run["seed"])]
        found = analysis.percent_above([run, *twins], run["model"], run["arm"], against)
        above[f"percent_above_{name}"] = found[0] if found else None
    names = ("model", "arm", "seed", "final_validation", "final_rate", "final_residual", "seconds_per_step")
    steps, _ = run["validation"][-1]
    return {
        **{name: run[name] for name in names},
        **above,
        "final_validation_of_tokens": run.get("final_validation_of_tokens"),
        "steps": steps,
        "tokens": steps * run["tokens_per_step"],
        "commit": run["commit"],
    }


def print_table(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the figures of all arms, as many and as wide as the terminal has room for; on ``console`` if given."""
    console = console or Console(highlight=False)
    rows = analysis.rows(result["runs"])
    for model in analysis.models_of(result["runs"]):
        lines = [(row.arm, *words.cells(row)) for row in rows if row.model == model]
        title = f"{model}; medians over seeds, and their range"
        tables.show(console, title, ("arm", *words.HEADINGS), lines, SHAPES)
    for text in _said(result):
        console.print(one_line(text), markup=False)


def html(result: Mapping[str, Any]) -> str:
    """The report: one page that loads nothing from anywhere."""
    runs, times = result["runs"], result.get("step_times")
    return report.rendered(
        HERE / "template.html",
        **_shared(result),
        machine=result["meta"],
        said=_said(result),
        runs=runs,
        figures={
            "Validation loss against tokens": plots.losses(runs),
            "Validation loss relative to none": plots.differences(runs),
            "Loss against the rows that are sent": plots.differences_and_rates(runs),
            "Rows sent": plots.rates(runs),
            "Residual": plots.residuals(runs),
            **({"Validation loss against wall time": plots.over_time(runs, times)} if times else {}),
        },
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The claim, the goals and all arms."""
    return report.rendered(
        HERE / "section.md",
        **_shared(result),
        claims=_claims(result),
        shortness=goals.shortness(result["meta"]),
        over_time=wall_time.lines(result),
    )


def _shared(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "meta": {**words.machine(result["meta"]), "processors": words.processors(result["runs"])},
        "goals": goals.lines(result),
        "encoding": cost.described(result["encoding"]) if result["encoding"] else "",
        "rows": analysis.rows(result["runs"]),
        "words": words,
    }


def _claims(result: Mapping[str, Any]) -> list[str]:
    """What can be said of the paper's claim, a text for each model."""
    return [goals.claim(result["runs"], model) for model in analysis.models_of(result["runs"])]


def _said(result: Mapping[str, Any]) -> list[str]:
    """The claims, and what makes them say less; without Markdown."""
    texts = [*_claims(result), goals.shortness(result["meta"]), *wall_time.lines(result)]
    return [text.replace("`", "").replace("**", "") for text in texts if text]
