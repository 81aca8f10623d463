"""Study index files: {"STUDY": {…, "report": ["item", …]}, …}, numbered report texts, compact storage.

Shared by MRI, head CT (`series`) and chest CT (`recons`).

Axes: N studies.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.items import check_id
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import open_csv, read_json

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"\s*\d+\s*[.)]\s+(\S.*)")
_MAX_LISTED = 5


def numbered_items(text: str) -> list[str]:
    """Items of a numbered text, one item per number at the start of a line; other lines continue their item.

    "1. Old infarct.\\n2. No mass\\nor shift." → ["Old infarct.", "No mass or shift."]. What stands before the first
    number is left out; no number at all gives no item.
    """
    items: list[str] = []
    for line in text.splitlines():
        match = _NUMBERED.fullmatch(line.rstrip())
        if match:
            items.append(match[1])
        elif items and line.strip():
            items[-1] += " " + line.strip()
    return items


def report_items(report: object) -> list[str]:
    """Items of a `report` field: a list of strings, or one numbered text; blank items are left out.

    Raises:
        ValueError: anything else, or no item; the message begins with what was expected.
    """
    expected = 'a list of texts, or one numbered text ("1. …", a line each)'
    if isinstance(report, str):
        items = numbered_items(report)
    elif isinstance(report, list) and all(isinstance(item, str) for item in report):
        items = [item.strip() for item in report if item.strip()]
    else:
        raise UserError(f"expected {expected}, found {json.dumps(report)[:60]}")
    if not items:
        raise UserError(f"expected {expected} with at least one item, found {json.dumps(report)[:60]}")
    return items


def read_report_table(path: str | Path) -> dict[str, list[str]]:
    """Items by study from a CSV of two columns, study and numbered text; a first line "study,report" is no row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row of another width, a study that stands twice, a text without numbered lines, or a quote that
            never closes.
    """
    reports: dict[str, list[str]] = {}
    with open_csv(path, holding="two columns, study and numbered report text") as rows:
        for row in rows:
            where = f"{path}: line {rows.line}"
            if not row or (rows.line == 1 and [name.strip().lower() for name in row] == ["study", "report"]):
                continue
            if len(row) != 2:
                raise UserError(f"{where}: {len(row)} columns; expected 2, study and numbered report text")
            if check_id(row[0], where) in reports:
                raise UserError(f"{where}: study {row[0]!r} stands twice; keep one of the rows")
            try:
                reports[row[0]] = report_items(row[1])
            except ValueError as error:
                raise UserError(f"{where}: study {row[0]!r}: {error}") from None
    if not reports:
        raise UserError(f"{path}: holds no row; expected study and numbered report text")
    return reports


class StudyIndex:
    """N studies with their entries, checked once, kept as JSON bytes in one array.

    Half a million Python strings would be copied into every loader worker as their reference counts change; one array
    is shared.

    Attributes:
        path: the JSON file.
        skipped: messages of the entries left out.
    """

    def __init__(
        self,
        path: str | Path,
        check_entry: Callable[[str, Mapping[str, Any]], dict[str, Any]],
        *,
        on_bad_sample: Literal["skip", "stop"],
        studies: Iterable[str] | None = None,
        entries: Mapping[str, Any] | None = None,
    ) -> None:
        """Read a JSON object of studies.

        Args:
            path: JSON file; with `entries` only where they come from.
            check_entry: study id, its object → what to keep of it (JSON-able); raises ValueError naming the field.
            on_bad_sample: "stop" raises for the first entry that cannot be used, "skip" leaves such entries out and
                logs them.
            studies: keep only these.
            entries: the object itself, where it was read from another kind of file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a JSON object of objects, or no usable study.
            BadSampleError: an entry that cannot be used, with "stop".
        """
        self.path = Path(path)
        if entries is None:
            entries = read_json(path, holding='studies {"STUDY": {…, "report": […]}, …}')
        if not isinstance(entries, dict):
            raise UserError(f'{path}: expected an object {{"STUDY": {{…}}, …}}, found a {type(entries).__name__}')
        wanted = None if studies is None else set(studies)
        self.skipped: list[str] = []
        kept: list[bytes] = []
        for study, entry in entries.items():
            if wanted is not None and study not in wanted:
                continue
            try:
                if not isinstance(entry, dict):
                    raise UserError(f"expected an object, found {json.dumps(entry)[:60]}")
                checked = check_entry(check_id(study, "key"), entry)
            except ValueError as error:
                message = f"{path}: study {study!r}: {error}"
                if on_bad_sample == "stop":
                    raise BadSampleError(f"{message}. Fix it (--on-bad-sample skip goes on without it)") from None
                self.skipped.append(message)
                continue
            kept.append(json.dumps({"study": study, **checked}, ensure_ascii=False).encode())
        if not kept:
            reason = f"; the first of {len(self.skipped)} skipped: {self.skipped[0]}" if self.skipped else ""
            raise UserError(f"{path}: no usable study{reason}")
        if self.skipped:
            listed = "\n  ".join(self.skipped[:_MAX_LISTED])
            logger.warning("%s: %d studies left out:\n  %s", path, len(self.skipped), listed)
        self._ends = np.cumsum([len(text) for text in kept])
        self._text = np.frombuffer(b"".join(kept), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """What `check_entry` kept, and the study id under "study"."""
        if not 0 <= index < len(self):
            raise IndexError(f"study {index} of {self.path}, which has {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(self._text[start : int(self._ends[index])].tobytes())


def check_names(names: Sequence[object], field: str) -> list[str]:
    """Names that are file or folder names below a study, so that no entry leads out of the data folder.

    Raises:
        ValueError: naming the field.
    """
    for name in names:
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise UserError(f"field {field!r}: {name!r}; expected plain names without / or \\")
    return [str(name) for name in names]
