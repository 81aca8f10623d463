"""Precision and recall of items cut from invented reports whose items are known, beside two simpler ways.

    python benchmarks/items.py [FILE]

FILE: a JSON list of {"report": …, "items": […], "normal": …}; default: the invented reports of the tests. An item
counts when an item of the other side says the same but for case, punctuation and white space.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from itemizedclip.data.itemize import itemize
from itemizedclip.data.items import split_captions
from itemizedclip.runtime.files import read_json

REPORTS = Path(__file__).parents[1] / "tests" / "fixtures" / "itemized_reports.json"


def plain(item: str) -> str:
    """An item without case, punctuation and white space; numbers keep their points."""
    return re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w.]", "", item.lower())


def counts(found: Sequence[str], known: Sequence[str]) -> tuple[int, int, int]:
    """(right, found, known)"""
    one, other = [plain(item) for item in found], [plain(item) for item in known]
    return len(set(one) & set(other)), len(one), len(other)


def measured(cases: Sequence[dict], cut: Callable[[str], list[str]]) -> tuple[float, float]:
    """Precision and recall over all items of all reports."""
    totals = [sum(column) for column in zip(*(counts(cut(case["report"]), case["items"]) for case in cases))]
    return totals[0] / max(1, totals[1]), totals[0] / totals[2]


def numbered_only(report: str) -> list[str]:
    """Items as a numbered report table has them: one per number at the start of a line."""
    return re.findall(r"^\s*\d+\s*[.)]\s+(\S.*)", report, re.MULTILINE)


def main() -> None:
    """Print the table."""
    cases = read_json(Path(sys.argv[1]) if len(sys.argv) > 1 else REPORTS, holding="reports with known items")
    ways: dict[str, Callable[[str], list[str]]] = {
        "itemize": lambda report: itemize(report).items,
        "split at full stops": split_captions,
        "numbered lines": numbered_only,
    }
    print(f"{len(cases)} reports, {sum(len(case['items']) for case in cases)} items\n")
    print(f"{'':<22}precision  recall")
    for name, cut in ways.items():
        precision, recall = measured(cases, cut)
        print(f"{name:<22}{precision:9.3f}{recall:8.3f}")
    right = sum(itemize(case["report"]).normal == case["normal"] for case in cases)
    print(f"\nnormal or not: {right} of {len(cases)} right")


if __name__ == "__main__":
    main()
