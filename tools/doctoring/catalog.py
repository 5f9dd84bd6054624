"""The checks by name, and which of them a command line asks for. Standard library only: --help is quick."""

from __future__ import annotations

from command_line import UserError

CATALOG = {
    "versions": "packages are those that were tested together, the same on every rank, and torch can use the GPUs",
    "environment": "no variable keeps collectives from running beside computation, or names what is not there",
    "flags": "the entry script takes the flags behind --; what Megatron makes of them is shown",
    "binding": "ranks have cores and GPUs of their own, and cores near their GPU",
    "storage": "--save and --data-cache-path have space, renames, and locks within each node; /dev/shm is large enough",
    "clocks": "wall clocks agree, no GPU is throttled, and no rank computes at less than half of the others' speed",
    "groups": "every process group of the layout is made, and all of its ranks meet in it",
    "network": "each link, and collectives of each tp, cp, ep, pp and dp group, carry at least half of what others do",
    "step": "a step of a tiny ScMoE model over the layout gives equal gradient norms where they have to be equal",
    "overlap": "a tiny group gains by overlap what the solver predicts from its measured costs",
}
"""Checks in their order, and what it proves that one finds no problem."""


def chosen(only: str | None, skip: str | None) -> list[str]:
    """Names of the checks to run, in their order.

    Args:
        only: names with commas between, or None for all.
        skip: names to leave out, or None.

    Raises:
        UserError: for a name that is none, and where none is left.
    """
    wanted = set(_names("--only", only)) if only is not None else set(CATALOG)
    left = [name for name in CATALOG if name in wanted - set(_names("--skip", skip or ""))]
    if not left:
        raise UserError("--only and --skip leave no check; --list-checks prints them")
    return left


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CATALOG:
            raise UserError(f"{option} has {name[:40]!a}, which is no check; --list-checks prints them")
    return names
