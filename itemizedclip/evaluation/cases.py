"""Scores and labels of every case of an evaluation: what intervals, paired tests and calibration are made of.

Axes: N cases (images, studies), C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from itemizedclip.runtime.errors import UserError, about
from itemizedclip.runtime.fields import (
    check_fields,
    either,
    nothing,
    number,
    one_of,
    plain_object,
    several,
    text,
    true_or_false,
)
from itemizedclip.runtime.files import read_json, write_json

HOLDING = "the cases of an evaluation: classes, and of each case id, patient, scores and labels"
_LARGEST_SCORE = 1e6


@dataclass(frozen=True)
class CaseScores:
    """What a model says of N cases, and what is true of them.

    Attributes:
        ids: N names, all different.
        patients: N names; cases of one patient are never taken for independent. The case itself where nobody is known.
        classes: C names.
        scores_NC: float64, larger is more likely.
        labels_NC: float64, 1, 0, or NaN where unknown.
        one_each: every case has exactly one class (top-1 is meaningful).
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    classes: tuple[str, ...]
    scores_NC: np.ndarray
    labels_NC: np.ndarray
    one_each: bool = False

    def __post_init__(self) -> None:
        expected = (len(self.ids), len(self.classes))
        shapes = (self.scores_NC.shape, self.labels_NC.shape)
        if shapes != (expected, expected) or len(self.patients) != len(self.ids):
            raise UserError(
                f"cases: scores and labels are {shapes}, {len(self.patients)} patients; expected {expected}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise UserError("cases: two have the same id; give each a name of its own")

    def __len__(self) -> int:
        return len(self.ids)

    def rated(self, column: int) -> np.ndarray:
        """bool (N,): cases whose label of this class is known."""
        return ~np.isnan(self.labels_NC[:, column])

    def rows(self, keep: Sequence[int]) -> CaseScores:
        """Some of the cases, in the given order."""
        at = list(keep)
        return CaseScores(
            tuple(self.ids[row] for row in at),
            tuple(self.patients[row] for row in at),
            self.classes,
            self.scores_NC[at],
            self.labels_NC[at],
            self.one_each,
        )


def write_cases(path: Path, cases: CaseScores) -> None:
    """Write cases as JSON; the file appears whole or not at all."""
    labels = [[None if np.isnan(value) else int(value) for value in row] for row in cases.labels_NC]
    entries = [
        {"id": name, "patient": patient, "scores": scores, "labels": own}
        for name, patient, scores, own in zip(cases.ids, cases.patients, cases.scores_NC.tolist(), labels)
    ]
    write_json(path, {"classes": list(cases.classes), "one_each": cases.one_each, "cases": entries}, indent=None)


def read_cases(path: str | Path) -> CaseScores:
    """Cases that `write_cases` wrote.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file; says where and what was expected.
    """
    values = read_json(path, holding=HOLDING)
    with about(path):
        check_fields(
            values,
            {"classes": several(text()), "one_each": true_or_false(), "cases": several(plain_object())},
            required=("classes", "cases"),
        )
        C = len(values["classes"])
        rules = {
            "id": text(),
            "patient": text(),
            "scores": several(number(-_LARGEST_SCORE, _LARGEST_SCORE), C),
            "labels": several(either(one_of([0, 1]), nothing()), C),
        }
        entries: list[Any] = values["cases"]
        for row, entry in enumerate(entries):
            check_fields(entry, rules, place=f"cases[{row}]", required=rules)
        labels = [[np.nan if value is None else float(value) for value in entry["labels"]] for entry in entries]
        return CaseScores(
            tuple(entry["id"] for entry in entries),
            tuple(entry["patient"] for entry in entries),
            tuple(values["classes"]),
            np.asarray([entry["scores"] for entry in entries], dtype=np.float64),
            np.asarray(labels),
            values.get("one_each", False),
        )
