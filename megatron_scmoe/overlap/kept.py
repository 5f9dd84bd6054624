"""The plans of spans: in few words, and as builtin types for a checkpoint. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_scmoe.contracts import Launch, Plan


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans of one span: for training, and for evaluation, which has no backward."""

    training: Plan
    forward: Plan


def described(plans: Mapping[int, Plans]) -> str:
    """What every span's training runs, in few words, under its first group: neighbours with equal plans share them."""
    parts = []
    for plan, run in groupby(sorted(plans), key=lambda group: plans[group].training):
        groups = list(run)
        name = "group" if len(groups) == 1 else "groups"
        if len(groups) > 1 and groups == list(range(groups[0], groups[-1] + 1)):
            name += f" {groups[0]} to {groups[-1]}"
        else:
            name += f" {', '.join(map(str, groups))}"
        slots = " | ".join(",".join(map(str, of_call)) for of_call in plan.slots)
        launched = "" if plan.launch is Launch.BEFORE else f" (launched {plan.launch} the op at the tap)"
        waited = " (each collective waited for at once)" if plan.blocking else ""
        parts.append(f"{name} slots {slots}{launched}{waited}")
    return "; ".join(parts)


def saved_form(plans: Mapping[int, Plans], **beside: Any) -> dict[str, dict[str, Any]]:
    """Plans as builtin types, for the arguments that a checkpoint keeps.

    Args:
        plans: by group.
        beside: what is kept with the plans of each group.
    """
    return {
        str(group): {"training": _builtin(one.training), "forward": _builtin(one.forward), **beside}
        for group, one in plans.items()
    }


def from_saved_form(saved: Mapping[str, Mapping[str, Any]]) -> dict[int, Plans]:
    """The inverse of ``saved_form``, without what is beside the plans.

    Plans of versions that had fewer kinds of them to choose from are left out.
    """
    return {
        int(group): Plans(_plan(one["training"]), _plan(one["forward"]))
        for group, one in saved.items()
        if all("blocking" in one[kind] for kind in ("training", "forward"))
    }


def _builtin(plan: Plan) -> dict[str, Any]:
    slots = [list(of_call) for of_call in plan.slots]
    return {"slots": slots, "blocking": plan.blocking, "launch": str(plan.launch)}


def _plan(saved: Mapping[str, Any]) -> Plan:
    slots = tuple(tuple(of_call) for of_call in saved["slots"])
    return Plan(slots, blocking=saved["blocking"], launch=Launch(saved["launch"]))
