"""How figures are written, alike on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies import report
from studies.figures import Figure

from codec_study.analysis import Row

WRITE: dict[str, Callable[[float], str]] = {
    "loss": "{:.4f}".format,
    "percent": "{:+.2f}%".format,
    "fine percent": "{:.5f}%".format,
    "rate": "{:.3f}".format,
    "share": "{:.2%}".format,
    "seconds": "{:.3f}".format,
}
"""By unit."""

HEADINGS = (
    *("validation loss", "above none", "above the control", "rows sent", "bytes", "residual"),
    *("evaluated with tokens", "that above none", "s/step"),
)
"""Of ``cells``."""


def figure(one: Figure | None, unit: str) -> str:
    """Median and range; one seed has no range."""
    if one is None:
        return "-"
    return WRITE[unit](one.value) if one.low == one.high else one.text(WRITE[unit])


def cells(row: Row) -> tuple[str, ...]:
    """The figures of a row, in the order of ``HEADINGS``."""
    few = f" ({row.seeds_with_tokens} of {len(row.seeds)} seeds)" if 0 < row.seeds_with_tokens < len(row.seeds) else ""
    return (
        figure(row.loss, "loss"),
        figure(row.to_none, "percent"),
        figure(row.to_control, "percent"),
        figure(row.rate, "rate"),
        figure(row.bytes, "rate"),
        figure(row.residual, "rate"),
        figure(row.with_tokens, "percent") + few,
        figure(row.with_tokens_to_none, "percent") + few,
        figure(row.seconds, "seconds"),
    )


def processors(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which ones the runs were trained on: on one of another kind the same training may round otherwise."""
    counted = Counter(run.get("processor", "not noted") for run in runs)
    return "; ".join(f"{name} ({number} runs)" for name, number in counted.items())


def machine(meta: Mapping[str, Any]) -> dict[str, str]:
    """What was trained, with what, and where, by heading."""
    data, runs = meta["data"], sorted(meta["commits_of_runs"])
    also = f"; the runs are of {', '.join(runs)}" if runs != [meta["commit"]] else ""
    return {
        **report.origin(meta, also=also, computing="; one rank, one thread and one core for each run"),
        "model": ", ".join(f"{name} {size}" for name, size in meta["sizes"].items()),
        "training": (
            f"{meta['iterations']} steps, {meta['tokens_per_expert']} tokens for each expert in one; "
            f"at least {meta['seeds']} seeds, of parameters, order of the data and hash functions alike"
        ),
        "data": f"{data['tokens']} tokens, vocabulary {data['vocabulary']}, one in 20 documents held back",
        "evaluation": (
            f"{meta['eval_sequences']} held-back sequences every {meta['eval_every']} steps and twice at the end, the "
            "same ones for all arms of a seed, with the codec as in training"
        ),
    }
