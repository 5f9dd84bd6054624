"""How figures are written, alike on the terminal, in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from codec_study.analysis import Row, Spread

WRITE: dict[str, Callable[[float], str]] = {
    "loss": "{:.4f}".format,
    "percent": "{:+.2f}%".format,
    "rate": "{:.3f}".format,
    "share": "{:.2%}".format,
    "seconds": "{:.3f}".format,
}
"""By unit."""

HEADINGS = (
    *("validation loss", "above none", "above the control", "rows sent", "residual"),
    *("evaluated with tokens", "that above none", "s/step"),
)
"""Of ``cells``."""

NOTES = (
    "Figures are medians over seeds, in brackets the smallest and the largest one; differences are paired by seed. "
    "A figure without brackets is of one seed or the same for all. The control has experts that compute E(x) + x "
    "and sends every row: the path that the paper's compensation adds, without the compression; control lsh q6 adds "
    "it where centroids travel, E(c) + x. Rows sent and residual are means of the last tenth of the steps. Seconds "
    "are those of one rank without a network beside other jobs: they do not say what compression saves, nor what an "
    "arm costs. A mean is of tokens that may come later in a sequence, so the losses of arms that compress are not "
    "those of a causal model. Evaluated with tokens: how much higher the loss of the same trained model is on the "
    "same text where tokens travel in the evaluation, as they will where it is used, and how much higher that is "
    "than the loss of none. The study's first runs were not evaluated so: where fewer seeds are named there, do not "
    "compare that figure with the one above none beside it."
)


def figure(one: Spread | None, unit: str) -> str:
    """Median and range; one seed has no range."""
    if one is None:
        return "-"
    write = WRITE[unit]
    if one.low == one.high:
        return write(one.value)
    return f"{write(one.value)} [{write(one.low)}, {write(one.high)}]"


def cells(row: Row) -> tuple[str, ...]:
    """The figures of a row, in the order of ``HEADINGS``."""
    few = f" ({row.seeds_with_tokens} of {len(row.seeds)} seeds)" if 0 < row.seeds_with_tokens < len(row.seeds) else ""
    return (
        figure(row.loss, "loss"),
        figure(row.to_none, "percent"),
        figure(row.to_control, "percent"),
        figure(row.rate, "rate"),
        figure(row.residual, "rate"),
        figure(row.with_tokens, "percent") + few,
        figure(row.with_tokens_to_none, "percent") + few,
        figure(row.seconds, "seconds"),
    )


def machine(meta: Mapping[str, Any]) -> dict[str, str]:
    """What was trained, with what, and where, by heading."""
    hardware, data = meta["hardware"], meta["data"]
    changed = f", with {meta['changed_files']} changed files" if meta["changed_files"] else ""
    runs = sorted(meta["commits_of_runs"])
    also = f"; the runs are of {', '.join(runs)}" if runs != [meta["commit"]] else ""
    return {
        "measured": str(meta["time"]),
        "commit": f"{meta['commit']}{changed}{also}",
        "versions": ", ".join(f"{name} {version}" for name, version in meta["versions"].items()),
        "hardware": f"{hardware['device']}, {hardware['cores']} cores; one rank, one thread and one core for each run",
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
