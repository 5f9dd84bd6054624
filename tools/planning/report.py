"""What people read of a plan: tables on the terminal, JSON, and an HTML page that loads nothing from anywhere.

A plan's result is a JSON object (``result``); every table and picture is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablation.timelines import bars
from command_line import one_line
from progress import in_words
from rich import box
from rich.console import Console
from rich.table import Table
from studies import report

from megatron_scmoe.contracts import Launch
from megatron_scmoe.overlap.solver import Solution, schedule
from megatron_scmoe.overlap.spans import exposed_s
from planning.dry import DryRun
from planning.hardware import Machine
from planning.prediction import Prediction, SpanTime
from planning.whatif import Variant

HERE = Path(__file__).parent
GIB = 2**30
type Row = Mapping[str, Any]

UNITS = "times in seconds, memory and what is on the wire in bytes, rates in bytes or operations a second"
"""Of what --json holds."""
SPANS = (
    "spans: ms is one span as it is planned, in sequence where everything waits for everything, limit what no plan of "
    "these ops beats; docs/overlap.md says what slots are"
)


def result(
    request: Mapping[str, Any],
    dry: DryRun,
    machine: Machine,
    *,
    usable: float,
    prediction: Prediction,
    overlaps: Sequence[tuple[Variant, Prediction]],
    what_if: Sequence[tuple[Variant, Prediction]],
) -> dict[str, Any]:
    """All that a plan says, as JSON has it.

    Args:
        request: what was asked for, by name.
        dry: parameters and memory.
        machine: on what.
        usable: bytes of a GPU's memory that a rank may use.
        prediction: of a step.
        overlaps: the same with other overlaps.
        what_if: the same with something else.
    """
    return {
        "units": UNITS,
        "request": dict(request),
        "machine": machine.as_json(),
        "memory": [
            {
                "blocks": len(stage.blocks),
                "moe_layers": stage.moe_layers,
                "dense_parameters": stage.held.dense,
                "expert_parameters": stage.held.expert,
                **stage.standing._asdict(),
                "activations": stage.activations,
                "total": stage.total,
            }
            for stage in dry.stages
        ],
        "usable_bytes": usable,
        "fits": max(stage.total for stage in dry.stages) <= usable,
        "not_priced": dry.not_priced,
        "step_s": prediction.step_s,
        "tokens_per_s": prediction.tokens_per_s,
        "model_flops": prediction.model_flops,
        "a2a_s": prediction.a2a_s,
        "a2a_share": prediction.a2a_share,
        "parts": dict(prediction.parts),
        "stages": [asdict(stage) for stage in prediction.stages],
        "wires": [asdict(wire) for wire in prediction.wires],
        "spans": [_span(one) for one in prediction.spans],
        "overlaps": [_variant(*one, prediction) for one in overlaps],
        "what_if": [_variant(*one, prediction) for one in what_if],
    }


def misfit(found: Mapping[str, Any]) -> str:
    """What a plan says that does not fit into memory; empty where it fits."""
    if found["fits"]:
        return ""
    fullest = max(stage["total"] for stage in found["memory"])
    return (
        f"DOES NOT FIT: a rank holds {in_words(fullest)} and may use {in_words(found['usable_bytes'])} of a GPU; "
        "try --search"
    )


def left_out(found: Mapping[str, Any]) -> str:
    """What a plan says of flags that it has no price for; empty where there are none."""
    return f"not priced, but predicted as if otherwise: {'; '.join(found['not_priced'])}" if found["not_priced"] else ""


def _variant(variant: Variant, its: Prediction, given: Prediction) -> dict[str, Any]:
    return {
        "name": variant.name,
        "flags": variant.flags,
        "note": variant.note,
        "step_s": its.step_s,
        "speedup": given.step_s / its.step_s,
        "a2a_s": its.a2a_s,
        "a2a_exposed_s": its.parts.get("exposed EP", 0.0),
        "a2a_bytes": sum(wire.inside + wire.between for wire in its.wires if wire.group == "EP"),
        "slots": [slots_in_words(one.solution) for one in its.spans],
    }


def slots_in_words(solution: Solution) -> str:
    """Slots of a plan: of chunks joined by +, of calls by /; ``off`` where everything is waited for."""
    plan = solution.plan
    if plan.blocking:
        return "off"
    launched = "" if plan.launch is Launch.BEFORE else f" launched {plan.launch}"
    return "/".join("+".join(map(str, call)) for call in plan.slots) + launched


def _span(one: SpanTime) -> dict[str, Any]:
    plan, shape = one.solution.plan, one.span.shape
    costs = one.costs[plan.chunks]
    forward = schedule(shape, costs.forward, plan, backward=False)
    backward = schedule(shape, costs.backward, plan, backward=True)
    return {
        "count": one.count,
        "slots": slots_in_words(one.solution),
        "exact": one.solution.exact,
        "hidden_share": one.solution.hidden_share,
        "exposed_s": costs.training_s(exposed_s(forward), exposed_s(backward)),
        "predicted_s": one.solution.predicted_s,
        "sequential_s": one.sequential_s,
        "limit_s": one.limit_s,
        "timeline": [asdict(span) for span in (*forward, *backward)],
    }


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_tables(found: Mapping[str, Any], console: Console) -> None:
    """Print what a plan says beside the dry run, as wide as the terminal is."""
    console.print(f"constants: {found['machine']['source']}", markup=False)
    for title, headings, rows in tables(found):
        console.print(title, style="bold")
        console.print(table(headings, rows))
    if found["spans"]:
        console.print(SPANS, style="dim")
    if left := left_out(found):
        console.print(left, markup=False)
    for one in found["what_if"]:
        console.print(f"{one['name']}: with {one['flags']}{one['note'] and '; '}{one['note']}", style="dim")


def tables(found: Mapping[str, Any]) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, headings and rows of each table; the first column names the rows."""
    named = found["request"]
    headings: Sequence[str]
    sent_s = sum(wire["seconds"] for wire in found["wires"])
    exposed_s = sum(wire["exposed_s"] for wire in found["wires"])
    step = (
        f"A step: {_ms(found['step_s'])} ms, {_rate(found['tokens_per_s'])} tokens/s and "
        f"{_rate(found['model_flops'] / 1e12)} TFLOP/s of a GPU. Communication is "
        f"{sent_s / found['step_s']:.1%} of it, {exposed_s / found['step_s']:.1%} exposed; "
        f"the all-to-all {found['a2a_share']:.1%}"
    )
    parts = [(name, _ms(seconds), f"{seconds / found['step_s']:.1%}") for name, seconds in found["parts"].items()]
    made: list[tuple[str, Sequence[str], list[Sequence[str]]]] = [
        (
            f"{step} ({named['gpus']} x {named['gpu']})",
            ("part", "ms", "share"),
            [row for row in parts if row[1] != "0"],
        ),
        (
            "On the wire in a step, of one rank of the busiest stage",
            ("group, kind", "MiB inside", "MiB between", "ms", "exposed ms"),
            [_wire(wire) for wire in found["wires"]],
        ),
    ]
    if found["spans"]:
        headings = ("span", "how many", "slots", "hidden", "ms", "in sequence ms", "limit ms")
        rows = [_span_row(number, one) for number, one in enumerate(found["spans"])]
        made.append(("Spans, forward and backward: where the solver puts the experts", headings, rows))
    if found["overlaps"]:
        headings = ("overlap", "step ms", "speed-up", "exposed all-to-all ms", "slots")
        made.append(("With other overlaps", headings, [_overlap(one) for one in found["overlaps"]]))
    if found["what_if"]:
        headings = ("what if", "step ms", "speed-up", "all-to-all ms", "exposed ms", "GiB sent")
        made.append(("With something else", headings, [_what_if(one) for one in found["what_if"]]))
    return made


def _wire(wire: Row) -> Sequence[str]:
    sizes = (wire["inside"] / 2**20, wire["between"] / 2**20)
    times = (_ms(wire["seconds"]), _ms(wire["exposed_s"]))
    return (f"{wire['group']}, {wire['kind']}", *(f"{size:,.1f}" for size in sizes), *times)


def _span_row(number: int, one: Row) -> Sequence[str]:
    times = (_ms(one[name]) for name in ("predicted_s", "sequential_s", "limit_s"))
    return (str(number), str(one["count"]), one["slots"], f"{one['hidden_share']:.1%}", *times)


def _overlap(one: Row) -> Sequence[str]:
    slots = " | ".join(dict.fromkeys(one["slots"]))
    return (one["name"], _ms(one["step_s"]), f"{one['speedup']:.3f}", _ms(one["a2a_exposed_s"]), slots)


def _what_if(one: Row) -> Sequence[str]:
    times = (_ms(one["a2a_s"]), _ms(one["a2a_exposed_s"]))
    sent = f"{one['a2a_bytes'] / GIB:.2f}"
    return (one["name"], _ms(one["step_s"]), f"{one['speedup']:.3f}", *times, sent)


def _ms(seconds: float) -> str:
    """Milliseconds with four digits, or all before the point; rounding is nothing."""
    value = seconds * 1e3 if seconds > 1e-12 else 0.0
    return f"{value:,.0f}" if value >= 1000 or not value else f"{value:.4g}"


def _rate(value: float) -> str:
    """Three digits, or all before the point: of a CPU no TFLOP/s are left else."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table as wide as the terminal; its first column names the rows."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        in_words = place == 0 or heading in ("slots", "shortcut", "size")
        made.add_column(heading, justify="left" if in_words else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(one_line, row))
    return made


# ---- the page -------------------------------------------------------------------------------------------------------


def html(found: Mapping[str, Any], dry_report: str) -> str:
    """The report, as a page."""
    from planning import plots  # noqa: PLC0415 - imports matplotlib, which a table need not wait for

    lanes = {
        f"span {number}, slots {one['slots']}, {one['hidden_share']:.0%} hidden": bars(one["timeline"])
        for number, one in enumerate(found["spans"])
    }
    return report.rendered(
        HERE / "template.html",
        found=found,
        dry_report=dry_report,
        misfit=misfit(found),
        left_out=left_out(found),
        tables=[*([found["search"]["table"]] if "search" in found else []), *tables(found)],
        timelines=plots.timelines(lanes, "plan timelines") if lanes else "",
        memory=plots.memory(found["memory"], found["machine"]["hardware"]["memory"]),
        times=plots.times(found["parts"], found["overlaps"]),
    )
