"""Label CSVs of the zero-shot benchmarks, read by column name.

Values: 1 present, 0 absent, −1 not rated (uncertain or not examined: the row does not count for that class).

Axes: N rows (studies or volumes), C classes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from itemizedclip.data.items import check_id
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.files import column_key, open_table, written_whole

_VALUES = {"0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1}


@dataclass(frozen=True)
class LabelTable:
    """Labels of N rows for C classes.

    Attributes:
        source: the CSV.
        ids: N row names, all different, in the file's order.
        classes: C class names, in the order asked for.
        labels_NC: int8 (N, C): 1, 0 or −1.
    """

    source: Path
    ids: list[str]
    classes: tuple[str, ...]
    labels_NC: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> np.ndarray:
        """int8 (N,): labels of one class."""
        return self.labels_NC[:, self.classes.index(name)]

    def positives(self) -> dict[str, int]:
        """Rows with a 1, by class."""
        return {name: int((self.labels_NC[:, c] == 1).sum()) for c, name in enumerate(self.classes)}

    def rows(self, keep: Sequence[int]) -> LabelTable:
        """The given rows, in the given order."""
        return replace(self, ids=[self.ids[i] for i in keep], labels_NC=self.labels_NC[list(keep)])

    def select(self, classes: Sequence[str]) -> LabelTable:
        """The given classes, in the given order."""
        columns = [self.classes.index(name) for name in classes]
        return replace(self, classes=tuple(classes), labels_NC=self.labels_NC[:, columns])


def same_id(text: str) -> str:
    """A row name as it stands, without outer white space."""
    return text.strip()


def read_label_csv(
    path: str | Path,
    *,
    id_columns: Sequence[str],
    class_columns: Mapping[str, str],
    normalise_id: Callable[[str], str] = same_id,
    rows_may_repeat: bool = False,
) -> LabelTable:
    """Labels from the named columns of a CSV; other columns are not looked at.

    Args:
        path: CSV with a header line. Names match without regard to case, blanks and punctuation.
        id_columns: accepted names of the column with the row names; the first that exists is used.
        class_columns: class name → name of its column.
        normalise_id: spelling in the file → row name; raises ValueError for what is no such name.
        rows_may_repeat: several rows per id (one per series) are taken as one when their labels agree.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing or doubled column, a value other than 0, 1, −1, an id that is none or stands twice, no
            row; names file, line and column.
    """
    path = Path(path)
    with open_table(path, holding=f"the columns {id_columns[0]}, …") as table:
        header = table.header
        id_at = table.place(*id_columns)
        class_at = {name: table.place(column) for name, column in class_columns.items()}
        labels: dict[str, tuple[int, ...]] = {}
        for where, row in table.rows():
            given = check_id(row[id_at], where)
            try:
                name = normalise_id(given)
            except ValueError as error:
                raise UserError(f"{where}: column {header[id_at]!r}: {error}") from None
            values = tuple(_value(where, header[at], row[at]) for at in class_at.values())
            if name in labels and not (rows_may_repeat and labels[name] == values):
                detail = "with different labels; expected the same on all its rows" if rows_may_repeat else ""
                raise UserError(f"{where}: {name!r} stands twice {detail}; keep one row".replace(" ;", ";"))
            labels[name] = values
    if not labels:
        raise UserError(f"{path}: no row below the header; expected one per study")
    return LabelTable(path, list(labels), tuple(class_columns), np.array(list(labels.values()), dtype=np.int8))


def header_of(path: str | Path) -> list[str]:
    """Column names of a CSV.

    Raises:
        FileNotFoundError, ValueError: see `itemizedclip.runtime.files.open_table`.
    """
    with open_table(path, holding="labels") as table:
        return table.header


def has_column(header: Sequence[str], name: str) -> bool:
    """Whether a header has a column of that name, however spelt."""
    return column_key(name) in map(column_key, header)


def _value(where: str, column: str, text: str) -> int:
    value = _VALUES.get(text.strip())
    if value is None:
        raise UserError(f"{where}: column {column!r}: {text!r}; expected 0, 1 or -1 (not rated)")
    return value


def write_label_csv(path: str | Path, table: LabelTable, *, id_column: str) -> None:
    """Write a table as id_column, class, class, …; the file appears whole or not at all."""
    with written_whole(path, text=True) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([id_column, *table.classes])
        writer.writerows([name, *row] for name, row in zip(table.ids, table.labels_NC.tolist()))


def count_differences(table: LabelTable, *, rows: int, positives: Mapping[str, int]) -> list[str]:
    """What differs from published counts, one sentence each; empty when everything agrees."""
    found = table.positives()
    messages = [] if len(table) == rows else [f"{len(table):,} rows, published {rows:,}"]
    messages += [
        f"{name}: {found[name]:,} positive, published {count:,}"
        for name, count in positives.items()
        if name in found and found[name] != count
    ]
    return messages
