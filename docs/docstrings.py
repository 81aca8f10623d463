"""Docstrings as they are written here, Markdown in Google's sections, for Sphinx, which reads reStructuredText."""

from __future__ import annotations

import re

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")


def to_rst(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place (event autodoc-process-docstring)."""
    if not any(lines):
        return
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    section = False
    written: list[str] = []
    for block in blocks:
        first = block.splitlines()[0] if block else ""
        if first and not first.startswith(" "):
            section = first in SECTIONS
        if first.lstrip().startswith(">>>"):
            written.append(block)
        elif _is_laid_out(block, section=section):
            text = "\n".join(f"    {line}" for line in block.splitlines())
            follows = written and written[-1].startswith("::") and block.startswith("    ")
            written.append(text if follows else f"::\n\n{text}")
        else:
            written.append(_with_room_for_lists(_inline(block)))
    lines[:] = [*"\n\n".join(written).splitlines(), ""]


def _is_laid_out(block: str, *, section: bool) -> bool:
    """Whether the line breaks of a block mean something: indented code, or columns."""
    rows = block.splitlines()
    columns = len(rows) > 1 and any(re.search(r"\S {3,}\S", row) for row in rows)
    indented = any(row.startswith("    ") for row in rows) and not any(row.lstrip().startswith("- ") for row in rows)
    return not section and (columns or indented)


def _inline(block: str) -> str:
    """`code` becomes ``code``; outside of it nothing is markup."""
    parts = re.split(r"(`+[^`]+`+)", block)
    written = []
    for part, after in zip(parts, [*parts[1:], ""]):
        if part.startswith("`"):
            # `size`s: markup ends before a letter by a backslash alone
            written.append(f"``{part.strip('`')}``" + ("\\ " if re.match(r"\w", after) else ""))
        else:
            written.append(_escaped(part))
    return "".join(written)


def _escaped(text: str) -> str:
    text = re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", text)
    return re.sub(r"(?<!\S)(--[a-z][\w-]*)", r"``\1``", text)  # flags keep both of their dashes


def _with_room_for_lists(block: str) -> str:
    """A blank line before the first point of a list, and after its last."""
    rows: list[str] = []
    in_list = False
    for row in block.splitlines():
        point = row.lstrip().startswith("- ")
        if rows and rows[-1] and ((point and not in_list) or (in_list and not point and not row.startswith(" "))):
            rows.append("")
        in_list = point or (in_list and row.startswith(" "))
        rows.append(row)
    return "\n".join(rows)
