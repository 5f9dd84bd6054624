"""What a search has found: a table, JSON, and the fastest settings as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import atomic
from command_line import UserError
from rich.console import Console

from planning import recipe, settings
from planning.choosing import GIB, Choice, Choices
from planning.dry import dry_run
from planning.probing import ENVIRONMENT
from planning.report import table

OF_DATA = (
    *("--data-path", "--split", "--mock-data", "--tokenizer-type", "--tokenizer-model", "--vocab-size"),
    *("--save", "--load", "--save-interval", "--tensorboard-dir", "--exit-signal-handler", "--pretrained-checkpoint"),
)
"""Flags that the launcher makes of its own variables."""


HEADINGS = ("step ms", "over first", "GiB", "tp", "pp", "vp", "ep", "etp", "micro", "units", "recompute", "shortcut")


def print_choices(found: Mapping[str, Any]) -> None:
    """Print what ``as_json`` says: the settings, how many there were, and what was dropped."""
    console = Console(highlight=False)
    title, headings, rows = found["table"]
    console.print(title, style="bold")
    console.print(table(headings, rows))
    for reason, count in found["dropped"].items():
        console.print(f"dropped, {count}: {reason}", style="dim")
    for what in found["not_searched"]:
        console.print(f"not searched: {what}", style="dim")
    console.print(f"priced {found['priced']:,} steps; the search took {found['seconds']:,.1f} s", style="dim")


def _row(choice: Choice, first_s: float) -> list[str]:
    layout = choice.layout
    sizes = (layout.tp, layout.pp, layout.vp, layout.ep, layout.etp, layout.micro_batch)
    gib = f"{choice.nbytes / GIB:.1f}"
    again = ", ".join(layout.recompute) or "none"
    times = (f"{choice.step_s * 1e3:,.1f}", f"{choice.step_s / first_s:.3f}")
    stages = "/".join(map(str, layout.sizes)) or "even"
    return [*times, gib, *map(str, sizes), stages, again, _in_words(choice)]


def _in_words(choice: Choice) -> str:
    form = choice.form
    words = [form.position, f"span {form.span}" * (form.span > 1), form.overlap * bool(form.position)]
    return ", ".join(filter(None, [*words, f"{form.chunks} chunks" * (form.chunks > 1)])) or "none"


def as_json(choices: Choices, memory: float, seconds: float) -> dict[str, Any]:
    """What a search has found.

    Args:
        choices: settings.
        memory: bytes of a GPU that might be used.
        seconds: that it took.
    """
    title = (
        f"The fastest of {choices.layouts:,} layouts, {choices.fit:,} of which memory allows "
        f"({memory / GIB:.1f} GiB of each GPU)"
    )
    return {
        "layouts": choices.layouts,
        "fit": choices.fit,
        "dropped": dict(choices.dropped.most_common()),
        "not_searched": choices.not_searched,
        "priced": choices.priced,
        "seconds": seconds,
        "best": [{"step_s": one.step_s, "bytes": one.nbytes, "flags": one.flags} for one in choices.best],
        "table": [title, HEADINGS, [_row(choice, choices.best[0].step_s) for choice in choices.best]],
    }


def none_passes(choices: Choices) -> str:
    """Why a search has found nothing, in a line."""
    if not choices.dropped:
        return f"no form of the shortcut divides into any of {choices.fit} layouts; keep less"
    ((reason, count),) = choices.dropped.most_common(1)
    return (
        f"none of the {choices.dropped.total()} fastest settings passes; {count} of them: {reason} (N: a number); "
        "mend that, or keep less"
    )


def write_recipe(
    path: Path, base: str | None, words: Sequence[str], *, choice: Choice, gpus: int, request: Mapping[str, Any]
) -> None:
    """Write ``choice`` as a recipe, once the launcher and the entry script take it.

    Args:
        path: of the new one.
        base: the recipe that it is a layout of; None where there were flags alone.
        words: flags that came behind the recipe's own.
        choice: the settings.
        gpus: of the job.
        request: for a comment: what was asked for.

    Raises:
        UserError: where they do not, as flags of one's own may contradict those that all recipes share.
    """
    comment = (
        f"{base or 'Flags'} for {gpus} x {request['gpu']}, laid out by tools/plan.py --search: "
        f"{choice.step_s * 1e3:,.0f} ms a step predicted, {choice.nbytes / GIB:.1f} GiB on the fullest rank.\n"
        f"Constants: {request['constants']}."
    )
    environment = dict(ENVIRONMENT) if choice.layout.tp > 1 or choice.dry.args.context_parallel_size > 1 else {}
    per_node = max(size for size in range(1, 9) if gpus % size == 0)
    if per_node < 8:
        environment["GPUS_PER_NODE"] = str(per_node)
    nodes = gpus // per_node
    if base:
        text = recipe.text(comment, base, nodes, [*settings.not_chosen(words), *choice.chosen], environment)
    else:
        own = settings.without(choice.flags, OF_DATA)
        text = recipe.text_of_flags(comment, nodes, own, environment, choice.dry.args.padded_vocab_size)
    partial = path.with_name(f".{path.stem}.new.sh")
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            dry_run(recipe.flags_of(str(partial.absolute()))[1], gpus, ENVIRONMENT)
        except UserError as error:
            raise UserError(f"no recipe has these settings beside what all recipes share: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    atomic.write_text(path, text)
    print(f"wrote {path}; train with examples/launch.sh {path if '/' in str(path) else f'./{path}'}")
