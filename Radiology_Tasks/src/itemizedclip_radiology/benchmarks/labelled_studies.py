"""The studies of a zero-shot benchmark on disk, their labels, the texts to score; shared by all five radiology ones.

Axes: N studies, C classes.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from itemizedclip.data.batch import ItemSample
from itemizedclip.evaluation.classification import ClassPrompts
from itemizedclip.evaluation.results import Protocol
from itemizedclip.runtime.errors import MissingFileError
from itemizedclip_radiology.data.label_table import LabelTable
from itemizedclip_radiology.data.studies import LoadedStudy, Preparation, Study, load_study
from itemizedclip_radiology.data.unprepared import hint_for_folder
from itemizedclip_radiology.data.volumes import BRAIN_SIZE, GreyRange, Size

logger = logging.getLogger(__name__)

_MAX_LISTED = 5


class StudyReader(typing.Protocol):
    """How the files of a study become what the model takes."""

    def read(self, study: Study, size: Size) -> LoadedStudy:
        """The series of one study, every one once, in order; raises BadSampleError when none can be used."""

    def facts(self) -> dict[str, Any]:
        """Plain data that scores depend on."""


@dataclass(frozen=True)
class BrainReader:
    """Brain MRI and head CT.

    Attributes:
        prepare: how files become volumes.
        grey_range: forced range of grey values; None detects it.
    """

    prepare: Preparation = "crop"
    grey_range: GreyRange | None = None

    def read(self, study: Study, size: Size) -> LoadedStudy:
        """See `StudyReader`."""
        return load_study(study.study_id, study.series, size=size, prepare=self.prepare, grey_range=self.grey_range)

    def facts(self) -> dict[str, Any]:
        """See `StudyReader`."""
        return asdict(self)


@dataclass
class LabelledStudies:
    """What one evaluation scores: a data set for evaluators, whose images are studies without items.

    Attributes:
        name: for result files.
        protocol: see `itemizedclip.evaluation.results.Protocol`.
        studies: N studies found on disk, in the order of the label file.
        classes: C names of the scored findings.
        prompts: C texts, one per class.
        labels_NC: int8 (N, C), −1 where not rated.
        missing: listed studies that are not on disk (only with allow_missing), and their labels below.
        missing_labels_MC: int8 (M, C).
        missing_score_zero: the published evaluation counts missing studies with score 0; only with "published".
        excluded: studies left out on purpose → why.
        unlisted: studies on disk without labels, not scored.
        notes: sentences about choices made, for the log and the result file.
        reader: how files become volumes.
        size: voxels (D, H, W) of a series, as the model takes it.
        series_names: whether the model reads the names of the series.
    """

    name: str
    protocol: Protocol
    studies: list[Study]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    labels_NC: np.ndarray
    missing: list[str] = field(default_factory=list)
    missing_labels_MC: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int8))
    missing_score_zero: bool = False
    excluded: dict[str, str] = field(default_factory=dict)
    unlisted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reader: StudyReader = field(default_factory=BrainReader)
    size: Size = BRAIN_SIZE
    series_names: bool = True

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, row: int) -> ItemSample:
        """A study as evaluators read it; raises BadSampleError when no series can be used."""
        loaded = self.load(row, size=self.size)
        return ItemSample(
            sample_id=self.sample_id(row),
            image=loaded.image,
            items=[],
            series_names=loaded.series_names if self.series_names else None,
            skipped=[message for _, message in loaded.skipped],
        )

    def rows(self, keep: Sequence[int]) -> LabelledStudies:
        """The given studies, in the given order."""
        return replace(self, studies=[self.studies[row] for row in keep], labels_NC=self.labels_NC[list(keep)])

    def sample_id(self, row: int) -> str:
        """The id of a study."""
        return self.studies[row].study_id

    def parts(self, row: int) -> list[str]:
        """Names of a study's series on disk."""
        return [series.name for series in self.studies[row].series]

    @property
    def class_prompts(self) -> ClassPrompts:
        """One text per class."""
        return ClassPrompts(self.classes, [[prompt] for prompt in self.prompts])

    @property
    def known_labels_NC(self) -> np.ndarray:
        """float64 (N, C): 1, 0, or NaN where not rated."""
        return np.where(self.labels_NC < 0, np.nan, self.labels_NC.astype(np.float64))

    def load(self, index: int, *, size: Size) -> LoadedStudy:
        """The series of one study, every one once, in order.

        Raises:
            BadSampleError: none can be used.
        """
        return self.reader.read(self.studies[index], size)

    def describe(self) -> str:
        """One paragraph for the log."""
        parts = [f"{self.name} ({self.protocol}): {len(self):,} studies, {len(self.classes)} classes"]
        if self.missing:
            counted = f", which {_COUNTED_ZERO}" if self.missing_score_zero else ""
            parts.append(f"{len(self.missing):,} listed studies missing{counted}")
        if self.unlisted:
            parts.append(f"{len(self.unlisted):,} on disk without labels, not scored")
        if self.excluded:
            parts.append(f"{len(self.excluded):,} left out on purpose")
        return "; ".join(parts) + "".join(f"\n  {note}" for note in self.notes)


_COUNTED_ZERO = "count with score 0, as published"


def assemble(
    *,
    name: str,
    protocol: Protocol,
    table: LabelTable,
    prompts: Sequence[str],
    found: Sequence[Study | None],
    allow_missing: bool,
    looked_in: Path,
    on_disk: Sequence[str] = (),
    missing_score_zero: bool = False,
) -> LabelledStudies:
    """Match labels with studies.

    Args:
        name, protocol, prompts: as in `LabelledStudies`.
        table: labels of the rows that should be scored; its classes are those of the prompts.
        found: for each row the study, or None when it is not on disk.
        allow_missing: go on without listed studies that are not on disk.
        looked_in: folder, for messages.
        missing_score_zero: count studies that are not on disk with score 0.
        on_disk: names of everything found there; those without labels are reported as unlisted.

    Raises:
        FileNotFoundError: a listed study is missing and allow_missing is off, or all are.
    """
    present = [row for row, study in enumerate(found) if study is not None]
    absent = [row for row, study in enumerate(found) if study is None]
    if absent:
        shown = ", ".join(table.ids[row] for row in absent[:_MAX_LISTED]) + (", …" if len(absent) > _MAX_LISTED else "")
        message = f"{len(absent):,} of {len(table):,} studies of {table.source} are not in {looked_in}: {shown}"
        if not present:
            hint = hint_for_folder(looked_in, "mri|ct|chest-ct")
            raise MissingFileError(f"{message}. Give the folder that holds them (--data-dir){hint}")
        if not allow_missing:
            raise MissingFileError(f"{message}. Add them, or score the others with --allow-missing")
        logger.warning("%s; they %s", message, _COUNTED_ZERO if missing_score_zero else "are left out")
    listed = set(table.ids)
    return LabelledStudies(
        name=name,
        protocol=protocol,
        studies=[study for study in found if study is not None],
        classes=table.classes,
        prompts=tuple(prompts),
        labels_NC=table.labels_NC[present],
        missing=[table.ids[row] for row in absent],
        missing_labels_MC=table.labels_NC[absent],
        missing_score_zero=missing_score_zero,
        unlisted=sorted(set(on_disk) - listed),
    )


def find_labels(given: Path | None, usual_names: Sequence[str], data_dir: Path) -> Path:
    """The label file: the one given, or the usual one, also looked for in the data folder and the folder above.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    names = [Path(name) for name in usual_names] if given is None else [given.expanduser()]
    folders = [data_dir.expanduser(), data_dir.expanduser().parent]
    candidates = [*names] if given is not None else []
    candidates += [folder / name for folder in folders for name in names if not name.is_absolute()]
    for path in candidates:
        if path.is_file():
            return path
    asked = " or ".join(map(str, names))
    raise MissingFileError(
        f"no label file {asked} here, in {folders[0]} or in {folders[1]}; give its path with --labels"
    )


def visible_entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted by name, without hidden ones; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda p: p.name)
