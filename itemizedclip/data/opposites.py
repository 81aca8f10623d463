"""Texts that contradict an item: its denial, or the same with left and right, small and large, … exchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

OPPOSITES = (
    ("left", "right"), ("upper", "lower"), ("small", "large"), ("increased", "decreased"), ("anterior", "posterior"),
    ("superior", "inferior"), ("mild", "severe"), ("above", "below"), ("narrowed", "widened"), ("acute", "chronic"),
)  # fmt: skip
"""Words that make an item its opposite when they are exchanged."""

LEFT_RIGHT = OPPOSITES[:1]


def negated(item: str) -> str | None:
    """An item's denial, or, of a denial, what it denies: "no effusion" ↔ "effusion"; None where it is unclear."""
    text = item.strip()
    lowered = text.lower()
    if lowered.startswith(("no ", "without ")):
        return text.partition(" ")[2]
    if re.search(r"\b(no|not|without|none|absent|negative)\b", lowered):
        return None
    return f"no {re.sub(r'^(an?|the) ', '', text, flags=re.IGNORECASE)}"


def swapped(item: str, pairs: Sequence[tuple[str, str]] = OPPOSITES) -> str | None:
    """An item with the first pair of opposite words that occurs in it exchanged; None where there is none."""
    for first, second in pairs:
        words = rf"\b({first}|{second})\b"
        if re.search(words, item, flags=re.IGNORECASE):
            return re.sub(words, partial(_other, first, second), item, flags=re.IGNORECASE)
    return None


def _other(first: str, second: str, match: re.Match[str]) -> str:
    return second if match[0].lower() == first else first


def contradiction(item: str) -> str | None:
    """What an image with this item does not show: opposite words exchanged where there are some, else its denial."""
    return swapped(item) or negated(item)
