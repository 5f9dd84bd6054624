"""Writing a study: what it was made with, a CSV row for each run, the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies import report

from codec_study import analysis, render
from codec_study.arms import CONTROL, NONE
from codec_study.folder import META


def write_results(folder: Path, result: Mapping[str, Any]) -> None:
    """Write meta.json, result.csv and report.html into ``folder``, and print the table.

    Args:
        folder: that has the runs.
        result: what ``folder.read`` says, and ``encoding``.
    """
    rows = [csv_row(result, run) for run in result["runs"]]
    report.write(folder, (META, result["meta"]), rows, render.html(result))
    render.print_table(result)


def csv_row(result: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """One run; its differences are those to the same seed of none and of the control, where these were trained."""
    above = {}
    for against in (NONE, CONTROL):
        twins = [one for one in result["runs"] if (one["arm"], one["seed"]) == (against, run["seed"])]
        found = analysis.percent_above([run, *twins], run["model"], run["arm"], against)
        above[f"percent_above_{against}"] = found[0] if found else None
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
