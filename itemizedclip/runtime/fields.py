"""What the fields of a JSON object may be: one table of rules per object, checked before anything is made of it.

Rules are exact about types, since JSON from strangers holds `true` for 1, "16" for 16 and objects for lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from itemizedclip.runtime.errors import UserError

MAX_DEPTH = 32
"""Levels of nesting that options, configs and indices never reach."""

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Rule:
    """What a value must be: in words, for messages, and as a test that never raises."""

    expected: str
    holds: Callable[[Any], bool]


def whole(lowest: int, highest: int) -> Rule:
    """A whole number from `lowest` to `highest`."""
    return Rule(
        f"a whole number from {lowest} to {highest:,}", lambda value: type(value) is int and lowest <= value <= highest
    )


def number(lowest: float, highest: float) -> Rule:
    """A finite number from `lowest` to `highest`, whole or not."""
    return Rule(
        f"a number from {lowest:g} to {highest:g}",
        lambda value: type(value) in (int, float) and lowest <= value <= highest and math.isfinite(value),
    )


def text(longest: int = 4096) -> Rule:
    """A text that is not blank."""
    return Rule("a text", lambda value: type(value) is str and bool(value.strip()) and len(value) <= longest)


def true_or_false() -> Rule:
    """A truth value."""
    return Rule("true or false", lambda value: type(value) is bool)


def one_of(choices: Iterable[object]) -> Rule:
    """One of some plain values, of the same type."""
    known = list(choices)
    words = ", ".join(f"{choice}" for choice in known)
    return Rule(words, lambda value: any(type(value) is type(choice) and value == choice for choice in known))


def several(of: Rule, length: int | None = None, *, longest: int = 1_000_000) -> Rule:
    """A list of values that each follow a rule: of `length` of them, or of one to `longest`."""
    count = f"{length}" if length is not None else f"1 to {longest:,}"
    return Rule(
        f"a list of {count}, each {of.expected}",
        lambda value: (
            type(value) in (list, tuple)
            and (len(value) == length if length is not None else 1 <= len(value) <= longest)
            and all(of.holds(entry) for entry in value)
        ),
    )


def either(*rules: Rule) -> Rule:
    """What follows at least one of the rules."""
    return Rule(", or ".join(rule.expected for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


def nothing() -> Rule:
    """null."""
    return Rule("null", lambda value: value is None)


def plain_object() -> Rule:
    """An object of plain data, nested no deeper than `MAX_DEPTH`."""
    return Rule("an object {…} of plain data", lambda value: type(value) is dict and is_plain(value))


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is data as JSON holds it, nested no deeper than `MAX_DEPTH`."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(entry, depth + 1) for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(entry, depth + 1) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def check_fields(
    values: Any, rules: Mapping[str, Rule], *, place: str = "", required: Iterable[str] = (), others: bool = False
) -> Mapping[str, Any]:
    """Refuse an object with a field that is missing, unknown or not as its rule says; returns the object.

    Args:
        values: the object.
        rules: field → what it must be.
        place: where the object lies, for messages, such as "vision_cfg".
        required: fields that must be there.
        others: whether fields without a rule may be there.

    Raises:
        UserError: names the place, the value and what was expected; callers add the file
            (`itemizedclip.runtime.errors.about`).
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{place or 'its content'} is {brief(values)}; expected an object {{…}}")
    missing = [key for key in required if key not in values]
    if missing:
        raise UserError(f"{place + ' ' if place else ''}lacks {', '.join(missing)}")
    for key, value in values.items():
        rule = rules.get(key)
        if rule is None and not others:
            raise UserError(f"{place or 'it'} has the unknown key {brief(key)}; known: {', '.join(sorted(rules))}")
        if rule is not None and not rule.holds(value):
            name = f"{place}.{key}" if place else f"{key}"
            raise UserError(f"{name} is {brief(value)}; expected {rule.expected}")
    return values


def brief(value: Any) -> str:
    """A value for messages, however large or deep it is."""
    if isinstance(value, (dict, list, tuple)):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}" if value else f"an empty {kind.split()[1]}"
    if type(value) is int and abs(value) >= 10**_SHOWN_CHARACTERS:
        return f"a number of {value.bit_length():,} bits"
    if value is None or type(value) is bool:
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[:_SHOWN_CHARACTERS] + "…"
