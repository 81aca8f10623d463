"""The tables of docs/results.md, from the JSON files beside this program:

itemizedclip compare --level LEVEL --output DIR …; cp DIR/compare.json benchmarks/compare_LEVEL.json
python benchmarks/results.py                       writes each table between its two marks in docs/results.md
"""

from __future__ import annotations

import re
from pathlib import Path

from itemizedclip.commands.compare import markdown
from itemizedclip.runtime.files import read_json, read_text, write_text

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
MARKS = re.compile(r"(<!-- table of benchmarks/(compare_\w+\.json) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table as its JSON has it."""

    def table(match: re.Match[str]) -> str:
        found = read_json(HERE / match[2], holding="a comparison")
        return f"{match[1]}\n{markdown(found)}\n{match[3]}"

    return MARKS.sub(table, text)


if __name__ == "__main__":
    write_text(PAGE, filled(read_text(PAGE, holding="the page of results")))
    print(PAGE)
