"""What settings may be: the same rules for config.json of any model and for the arguments that Megatron saves.

Settings come from outside and decide how much work there is, so they are checked before anything is computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

from checkpoints.tensors import CheckpointError, TensorInfo

_LARGEST = 2**31 - 1
_FIX = "correct it, or get it anew"


class Rule(NamedTuple):
    """What the value of a setting may be: in words, for a message, and whether a value is that."""

    words: str
    holds: Callable[[object], bool]


def whole(low: int, high: int = _LARGEST) -> Rule:
    """A whole number; neither a float nor a bool is one."""
    return Rule(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def one_of(*choices: str | int | None) -> Rule:
    """One of these, of the same type."""
    kinds = {(type(choice), choice) for choice in choices}
    return Rule(
        f"one of {', '.join(map(repr, choices))}",
        lambda value: isinstance(value, str | int | None) and (type(value), value) in kinds,
    )


def optional(rule: Rule) -> Rule:
    """Nothing, or what ``rule`` says."""
    return Rule(f"{rule.words}, or nothing", lambda value: value is None or rule.holds(value))


def each(rule: Rule) -> Rule:
    """A list, of which each member is what ``rule`` says."""
    return Rule(
        f"a list, each {rule.words}",
        lambda value: isinstance(value, list | tuple) and all(map(rule.holds, value)),
    )


def either(one: Rule, other: Rule) -> Rule:
    """What one of the two says."""
    return Rule(f"{one.words}, or {other.words}", lambda value: one.holds(value) or other.holds(value))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


SIZE, COUNT = whole(1), whole(0)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
WORD = Rule("a word", lambda value: isinstance(value, str))
TABLE = Rule("a table of names and values", lambda value: isinstance(value, Mapping))
# Comparisons that NaN and what is beyond float32 do not pass.
POSITIVE = Rule("a number above 0", lambda value: _is_number(value) and 0 < value < 1e38)
NUMBER = Rule("a number from 0", lambda value: _is_number(value) and 0 <= value < 1e38)
SHARE = Rule("a number above 0, up to 1", lambda value: _is_number(value) and 0 < value <= 1)


def by_name(*rows: tuple[Rule, str]) -> dict[str, Rule]:
    """Rules by the names, separated by spaces, that stand beside each."""
    return {name: rule for rule, names in rows for name in names.split()}


def check(
    origin: str, settings: Mapping[str, object], rules: Mapping[str, Rule], *, needed: tuple[str, ...] = ()
) -> None:
    """Refuse the first setting that breaks its rule; one that is not there passes, unless it is ``needed``."""
    for name in needed:
        if name not in settings:
            raise CheckpointError(f"{name} is missing in {origin}; {_FIX}")
    for name, rule in rules.items():
        if name in settings and not rule.holds(settings[name]):
            raise CheckpointError(f"{name} is {_shown(settings[name])} in {origin}, and should be {rule.words}; {_FIX}")


def _shown(value: object) -> str:
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, lists in themselves
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_multiple(origin: str, settings: Mapping[str, Any], whole_name: str, part_name: str) -> None:
    """Refuse a setting ``whole_name`` that is no multiple of ``part_name``."""
    if settings[whole_name] % settings[part_name]:
        raise CheckpointError(
            f"{whole_name} is {settings[whole_name]} in {origin}, and should be a multiple of {part_name}, "
            f"{settings[part_name]}; {_FIX}"
        )


def check_layers(origin: str, settings: Mapping[str, Any], name: str, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse more layers than there are tensors: nobody should count up to them."""
    if (settings[name] or 0) > len(infos):
        raise CheckpointError(
            f"{name} is {settings[name]} in {origin}, and with {len(infos)} tensors in all there are too few; {_FIX}"
        )


def check_experts(
    origin: str, settings: Mapping[str, Any], name: str, infos: Mapping[str, TensorInfo], *, num_moes: int
) -> None:
    """Refuse ``num_moes`` layers of so many experts where there are fewer tensors of experts.

    Megatron saves experts as rows of a tensor of three dimensions, Hugging Face as tensors of their own.
    """
    shapes = [info.shape for tensor, info in infos.items() if ".experts." in tensor]
    there = sum(shape[0] if len(shape) == 3 else 1 for shape in shapes)
    if settings[name] * num_moes > there:
        raise CheckpointError(
            f"{name} is {settings[name]} in {origin}, for {num_moes} layers, and with {there} tensors of experts in "
            f"all there are too few; {_FIX}"
        )


ROPE = {name: optional(TABLE) for name in ("rope_scaling", "rope_parameters")}


def rotary_base(
    origin: str, config: Mapping[str, Any], default: int | None = None, kinds: tuple[str, ...] = ("default",)
) -> int:
    """The base of rotary positions of a config.json, held against ``ROPE``; ``default`` is that where nothing is said.

    transformers takes their older names first. Other ``kinds`` of positions, which are stretched, are refused.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in kinds:
        raise CheckpointError(
            f"rotary positions are not stretched here: rope_type is {_shown(kind)} in {origin}; no way known"
        )
    base: Any = found.get("rope_theta", config.get("rope_theta", default))
    check(origin, {"rope_theta": base}, {"rope_theta": POSITIVE})
    if base != int(base):
        raise CheckpointError(
            f"the rotary base is a whole number in Megatron: rope_theta is {base} in {origin}; no way known"
        )
    return int(base)
