"""Files of reports or captions → reports by key, and items back into the files that training reads.

A source is one of
    studies   .json   {"STUDY": {"series" or "recons": …, "report": "text" or ["text", …]}}
    lists     .json   {"KEY": "text" or ["text", …]}
    lines     .jsonl  {"image" or "series" or "id": …, "report" or "captions" or "items": "text" or ["text", …]}
    table     .csv    a header with a column of names and columns of text (findings, impression, report, caption, …),
                      or two columns without a header: name and text
    folder            one .txt per study, its stem the name, or such tables
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from itemizedclip.data.itemize import Itemized, section_role
from itemizedclip.data.items import is_normal_study
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import (
    check_readable,
    column_key,
    open_table,
    parse_json,
    read_json,
    read_text,
    write_json,
    write_text,
)

SourceKind = Literal["studies", "lists", "lines", "table", "folder"]

TEXT_FIELDS = ("report", "captions", "caption", "items", "sentences", "text", "extractedsentences")
"""Where a line of a .jsonl, or a column of a table, may hold its text; the first that is there is taken."""

NAME_FIELDS = ("id", "study", "studyid", "studyuid", "volumename", "image", "filename", "name", "key", "accession")
"""Columns of a table, and fields of a line, that may hold the name."""

HOLDING = "reports: a .json, .jsonl or .csv file, or a folder of .txt or .csv files"


@dataclass(frozen=True)
class Report:
    """One report, or the captions of one image.

    Attributes:
        key: its name in the source.
        texts: the texts, in order.
        entry: what else the source says of it.
    """

    key: str
    texts: list[str]
    entry: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportSource:
    """Reports of a file or folder, in its order, each key once."""

    path: Path
    kind: SourceKind
    reports: list[Report]


def read_reports(path: str | Path, *, name_column: str | None = None, text_columns: Sequence[str] = ()) -> ReportSource:
    """Reports by key.

    Args:
        path: see above.
        name_column: of a table, the column with the names; None: the first of the usual ones.
        text_columns: of a table, the columns with text, in order; none: every one that is called like a section or a
            text.

    Raises:
        MissingFileError: no such file or folder.
        UserError: not such a file, a key that stands twice, or no report.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        check_readable(path, holding=HOLDING)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        tables = [file for file in files if file.suffix.lower() == ".csv"]
        if texts or not tables:
            reports = [Report(file.stem, [read_text(file, holding="a report")]) for file in texts]
            source = ReportSource(path, "folder", reports)
        else:
            rows = [report for file in tables for report in _read_table(file, name_column, text_columns)]
            source = ReportSource(path, "table", rows)
    elif path.suffix.lower() == ".csv":
        source = ReportSource(path, "table", _read_table(path, name_column, text_columns))
    elif path.suffix.lower() == ".jsonl":
        source = ReportSource(path, "lines", _read_lines(path))
    elif path.suffix.lower() == ".json":
        source = _read_object(path)
    else:
        raise UserError(f"{path}: expected {HOLDING}")
    if not source.reports:
        raise UserError(f"{path}: holds no report; expected {HOLDING}")
    seen: set[str] = set()
    for report in source.reports:
        if report.key in seen:
            raise UserError(f"{path}: {report.key!r} stands twice; keep one of them")
        seen.add(report.key)
    return source


def _texts(value: object, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected a text or a list of texts, found {json.dumps(value)[:60]}")
    return [text for text in texts if text.strip()]


def _read_object(path: Path) -> ReportSource:
    entries = read_json(path, holding="reports by study")
    if not isinstance(entries, dict):
        raise UserError(f'{path}: expected an object {{"STUDY": …}}, found a {type(entries).__name__}')
    studies = all(isinstance(entry, dict) for entry in entries.values())
    reports = []
    for key, entry in entries.items():
        where = f"{path}: key {key!r}"
        if studies and "report" not in entry:
            raise UserError(f"{where}: field 'report' is missing; expected a text or a list of texts")
        reports.append(Report(key, _texts(entry["report"] if studies else entry, where), entry if studies else {}))
    return ReportSource(path, "studies" if studies else "lists", reports)


def _read_lines(path: Path) -> list[Report]:
    reports = []
    for number, line in enumerate(read_text(path, holding=HOLDING).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        entry = parse_json(line, source=where, holding=HOLDING)
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with one of {', '.join(TEXT_FIELDS)}")
        fields = {column_key(name): name for name in entry}
        found = [fields[name] for name in TEXT_FIELDS if name in fields]
        if not found:
            raise UserError(f"{where}: none of the fields {', '.join(TEXT_FIELDS)}; one must hold the text")
        if entry.get("valid_json") is False:  # MR-RATE: what a language model wrote and nobody could read
            continue
        named = (entry[fields[key]] for key in NAME_FIELDS if key in fields)
        name = next((value for value in named if isinstance(value, str)), f"line {number}")
        reports.append(Report(name, _texts(entry[found[0]], f"{where}: field {found[0]!r}"), entry))
    return reports


def _section_of_column(column: str) -> str:
    """ "Findings_EN" → "findings"; other columns stay as they are, in lower case."""
    return column.lower().replace("_", " ").strip().removesuffix(" en").strip()


def _read_table(path: Path, name_column: str | None, text_columns: Sequence[str]) -> list[Report]:
    with open_table(path, holding=HOLDING) as table:
        header = table.header
        rows = [row for _, row in table.rows()]
        if not header:
            return []
        name = table.place(name_column) if name_column else table.find(*NAME_FIELDS)
        texts = [table.place(column) for column in text_columns] or [
            place
            for place, column in enumerate(header)
            if section_role(_section_of_column(column)) in ("findings", "impression")
            or column_key(column) in TEXT_FIELDS
        ]
    if name is None or not texts:
        if len(header) == 2 and name_column is None and not text_columns:  # no header, names and texts alone
            return [_row_report(row, 0, [1], [""]) for row in [header, *rows]]
        missing = "a column of names (--name-column)" if name is None else "a column of text (--text-columns)"
        raise UserError(f"{path}: found no {missing[2:]}; its columns are {', '.join(header)}")
    return [_row_report(row, name, texts, header) for row in rows]


def _row_report(row: Sequence[str], name: int, texts: Sequence[int], header: Sequence[str]) -> Report:
    parts = []
    for place in texts:
        column = _section_of_column(header[place]) if place < len(header) else ""
        # A column called like a section is that section: its text may have no heading of its own.
        named = section_role(column) in ("findings", "impression") and column not in TEXT_FIELDS
        heading = f"{column.upper()}:\n" if named else ""
        if row[place].strip():
            parts.append(heading + row[place])
    entry = {header[place]: row[place] for place in range(min(len(header), len(row))) if len(header) > 1}
    return Report(row[name].strip(), parts, entry)


# --- items back into files -------------------------------------------------------------------------------------------


def with_normal_marker(items: Sequence[str], *, chest_ct: bool) -> list[str]:
    """The items of a study without findings as the normal check of training recognises it (`is_normal_study`).

    MRI and head CT: "no significant abnormalities." comes first. Chest CT: "No significant abnormalities" is the only
    item.
    """
    if is_normal_study(items, chest_ct=chest_ct):
        return list(items)
    return ["No significant abnormalities"] if chest_ct else ["no significant abnormalities.", *items]


def numbered_text(items: Sequence[str]) -> str:
    """ "1. …" per line: the text of a report table (`--reports` of the recipes mri and ct)."""
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def write_item_files(
    source: ReportSource,
    results: Mapping[str, Itemized],
    folder: Path,
    *,
    mark_normal: bool = True,
    image_pattern: str = "",
) -> list[Path]:
    """Write the items in every layout that the source has the facts for; reports without items are left out.

    Args:
        source: the reports.
        results: key → items.
        folder: where to.
        mark_normal: see `with_normal_marker`; in the study and report files alone.
        image_pattern: path of an image, {key} for its name, such as "images/{key}.jpg", where the source names none.

    Returns:
        `items.json` (key → items), `reports.csv` (study, numbered text), `items.jsonl` (one image or study a line, when
        images are named), and for studies a file of the source's own name.
    """
    kept = [report for report in source.reports if results[report.key].items]
    written = [folder / "items.json", folder / "reports.csv"]
    write_json(written[0], {report.key: results[report.key].items for report in kept})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    for report in kept:
        items = results[report.key].items
        if mark_normal and results[report.key].normal:
            items = with_normal_marker(items, chest_ct=False)
        writer.writerow([report.key, numbered_text(items)])
    write_text(written[1], table.getvalue())
    # The source's paths are relative to its own folder, those of items.jsonl to the new one.
    base = source.path if source.kind == "folder" else source.path.parent
    there = os.path.relpath(base.resolve(), folder.resolve())
    own = (_own_line(report, results[report.key], image_pattern, there) for report in kept)
    lines = [line for line in own if line is not None]
    if lines:
        written.append(folder / "items.jsonl")
        write_text(written[-1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if source.kind == "studies":
        studies = {}
        for report in kept:
            items = results[report.key].items
            if mark_normal and results[report.key].normal:
                items = with_normal_marker(items, chest_ct="recons" in report.entry)
            studies[report.key] = {**report.entry, "report": items}
        written.append(folder / source.path.name)
        write_json(written[-1], studies)
    return written


def _own_line(report: Report, result: Itemized, image_pattern: str, there: str) -> dict[str, Any] | None:
    """A line of the file of the recipe `own`, or None where no image is named; `there` is the folder of its paths."""

    def moved(path: str) -> str:
        return Path(os.path.normpath(os.path.join(there, path))).as_posix()

    entry = {key: value for key, value in report.entry.items() if key not in TEXT_FIELDS}
    if image_pattern:
        where: dict[str, Any] = {"image": moved(image_pattern.replace("{key}", report.key))}
    elif isinstance(entry.get("series"), dict) and all(isinstance(path, str) for path in entry["series"].values()):
        where = {"series": {name: moved(path) for name, path in entry["series"].items()}}
    elif isinstance(entry.get("image"), str):
        where = {"image": moved(entry["image"])}
    else:
        return None
    more: dict[str, Any] = {key: entry[key] for key in ("split", "labels") if key in entry}
    return {**where, "items": result.items, "normal": result.normal, **more}


# --- review ----------------------------------------------------------------------------------------------------------


def write_review(
    source: ReportSource, results: Mapping[str, Itemized], folder: Path, *, pages_of: int = 200
) -> list[Path]:
    """Before and after for people: review.csv with every report, review.html with the first `pages_of`."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["key", "normal", "number_of_items", "before", "items", "left_out"])
    for report in source.reports:
        result = results[report.key]
        left_out = "\n".join(_left_out_line(entry) for entry in result.left_out)
        before = "\n---\n".join(report.texts)
        writer.writerow([report.key, result.normal, len(result.items), before, numbered_text(result.items), left_out])
    paths = [folder / "review.csv", folder / "review.html"]
    write_text(paths[0], table.getvalue())
    rows = []
    for report in source.reports[:pages_of]:
        result = results[report.key]
        items = "".join(f"<li>{html.escape(item)}</li>" for item in result.items)
        left_out = "".join(f"<li>{html.escape(_left_out_line(entry))}</li>" for entry in result.left_out)
        normal = " <em>no finding</em>" if result.normal else ""
        rows.append(
            f"<section><h2>{html.escape(report.key)}{normal}</h2><div><pre>"
            f"{html.escape(chr(10).join(report.texts))}</pre><div><ol>{items}</ol>"
            f"<details open><summary>left out</summary><ul>{left_out}</ul></details></div></div></section>"
        )
    shown = f"{min(pages_of, len(source.reports)):,} of {len(source.reports):,} reports; review.csv has all"
    write_text(paths[1], _PAGE.replace("{shown}", shown).replace("{rows}", "\n".join(rows)))
    return paths


def _left_out_line(entry: Any) -> str:
    same = f" (same as: {entry.same_as})" if entry.same_as else ""
    return f"{entry.reason}: {entry.text}{same}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Items: before and after</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a }
section { border-top: 1px solid #ccc; padding: .6rem 0 }
h2 { font-size: 1rem; margin: .2rem 0 .5rem } h2 em { font-weight: normal; color: #2a7a3a }
section > div { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; background: #f6f6f6;
      margin: 0; padding: .6rem }
ol { margin: 0; padding-left: 1.6rem } details { margin-top: .6rem; color: #666; font-size: 13px }
@media (max-width: 50rem) { section > div { grid-template-columns: 1fr } }
</style></head><body>
<h1>Items: before and after</h1><p>{shown}.</p>
{rows}
</body></html>
"""
