"""RSNA 2019 intracranial hemorrhage and CQ500: zero-shot detection on head CT, each series in three HU windows.

    python3 zero_shot_rsna.py --resume epoch_24.pt --data-dir DIR --use-serienames
    python3 zero_shot_rsna.py --resume epoch_24.pt --data-dir DIR --labels RSNA.csv --study-lists test.txt val.txt
    python3 zero_shot_cq500.py --resume epoch_24.pt --data-dir DIR --use-serienames
    torchrun --nproc_per_node 8 -- zero_shot_rsna.py …          the same numbers

A series is a folder with img_blood.pt, img_bone.pt, img_brain.pt; the three windows are three series of the model.

Axes: N studies, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import open_csv
from itemizedclip_radiology.benchmarks.labelled_studies import (
    LabelledStudies,
    Protocol,
    assemble,
    find_labels,
    visible_entries,
)
from itemizedclip_radiology.benchmarks.zero_shot import Measures, StudyOptions, finding_measures
from itemizedclip_radiology.data.label_table import LabelTable, has_column, header_of, read_label_csv
from itemizedclip_radiology.data.studies import SeriesFile, Study

WINDOWS = {"img_blood.pt": "BloodWindow", "img_bone.pt": "BoneWindow", "img_brain.pt": "BrainWindow"}
"""File → last part of its series name, in the order in which the model sees them."""

# --- RSNA ------------------------------------------------------------------------------------------------------------

RSNA_COLUMNS = ("Any", "Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
"""Columns of the label file, after `study`."""

RSNA_PROMPTS = {
    "Any": "Intracranial hemorrhage",
    "Intraparenchymal": "Intracranial hemorrhage with intraparenchymal hemorrhage",
    "Intraventricular": "Intracranial hemorrhage with intraventricular hemorrhage",
    "Subarachnoid": "Intracranial hemorrhage with subarachnoid hemorrhage",
    "Subdural": "Intracranial hemorrhage with subdural hemorrhage",
}
"""Scored classes → text, in the published order; epidural is not scored."""

_RSNA_ID = re.compile(r"(RSNA_)?(ID_)?([0-9a-f]{10})", re.IGNORECASE)


def rsna_id(text: str) -> str:
    """ID_<10 hex digits> from a study id with or without RSNA_ in front.

    Raises:
        ValueError: no such id.
    """
    match = _RSNA_ID.fullmatch(text.strip())
    if not match:
        raise UserError(f"{text!r}; expected a study id such as ID_00aa11bb22 or RSNA_ID_00aa11bb22")
    return f"ID_{match[3].lower()}"


def read_rsna_labels(path: str | Path) -> LabelTable:
    """Labels of the five scored classes, one row per study, from columns named as in `RSNA_COLUMNS`.

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`.
    """
    return read_label_csv(
        path,
        id_columns=["study", "subject"],
        class_columns={name: name for name in RSNA_PROMPTS},
        normalise_id=rsna_id,
    )


def read_study_list(paths: Sequence[str | Path]) -> list[str]:
    """RSNA study ids from text files with one id per line, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no id, an id that stands twice, or no id at all.
    """
    ids: dict[str, None] = {}
    for path in paths:
        with open_csv(path, holding="one RSNA study id per line") as reader:
            for row in reader:
                line = ",".join(row)
                if not line.strip():
                    continue
                where = f"{path}: line {reader.line_num}"
                try:
                    study = rsna_id(line)
                except ValueError as error:
                    raise UserError(f"{where}: {error}") from None
                if study in ids:
                    raise UserError(f"{where}: {study!r} stands twice in {', '.join(map(str, paths))}")
                ids[study] = None
    if not ids:
        raise UserError(f"{', '.join(map(str, paths))}: no study id; expected one per line")
    return list(ids)


def open_rsna(
    labels_csv: str | Path,
    data_dir: str | Path,
    *,
    studies: Sequence[str] | None = None,
    protocol: Protocol = "corrected",
    allow_missing: bool = False,
) -> LabelledStudies:
    """RSNA studies: <data>/<study>/<series>/img_*.pt, folder names with or without RSNA_.

    Of several series of a study the first by name is used (the published code takes whichever the file system lists
    first). "published" with allow_missing marks missing studies to be counted with score 0.

    Args:
        labels_csv: columns study and `RSNA_COLUMNS` (epidural may be absent); see `itemizedclip_radiology.prepare`.
        data_dir: folder of studies.
        studies: score only these (see `read_study_list`); default all rows of the label file.
        protocol: see `Protocol`.
        allow_missing: go on without listed studies that are not on disk.

    Raises:
        FileNotFoundError: no label file, or missing studies without allow_missing.
        ValueError: a label file that is none, or a study of `studies` without labels.
    """
    table = read_rsna_labels(labels_csv)
    if studies is not None:
        row_of = {name: row for row, name in enumerate(table.ids)}
        unlabelled = [study for study in studies if study not in row_of]
        if unlabelled:
            raise UserError(
                f"{labels_csv}: no labels for {len(unlabelled):,} of {len(studies):,} listed studies, such as "
                f"{unlabelled[0]}; give the label file of these studies"
            )
        table = table.rows([row_of[study] for study in studies])
    root = Path(data_dir).expanduser()
    folders = _folders_by_id(root, rsna_id)
    found: list[Study | None] = []
    several = 0
    incomplete: list[str] = []
    for study in table.ids:
        series_folders = window_folders(folders.get(study))
        several += len(series_folders) > 1
        files = rsna_window_files(series_folders[0]) if series_folders else []
        if 0 < len(files) < len(WINDOWS):
            incomplete.append(study)
        found.append(Study(study, tuple(files)) if files else None)
    benchmark = assemble(
        name="rsna",
        protocol=protocol,
        table=table,
        prompts=tuple(RSNA_PROMPTS.values()),
        found=found,
        allow_missing=allow_missing,
        looked_in=root,
        on_disk=list(folders),
    )
    benchmark.missing_score_zero = protocol == "published"
    if several:
        benchmark.notes.append(f"{several:,} studies have several series; the first by name is used")
    _note_incomplete(benchmark, incomplete)
    return benchmark


# --- CQ500 -----------------------------------------------------------------------------------------------------------

CQ500_COLUMNS = (
    "ICH", "IPH", "IVH", "SDH", "EDH", "SAH", "BleedLocation-Left", "BleedLocation-Right", "ChronicBleed", "Fracture",
    "CalvarialFracture", "OtherFracture", "MassEffect", "MidlineShift",
)  # fmt: skip
"""Findings of the official reads, in its order."""

CQ500_PROMPTS = {
    "ICH": "Intracranial hemorrhage",
    "IPH": "Intracranial hemorrhage with intraparenchymal hemorrhage",
    "IVH": "Intracranial hemorrhage with intraventricular hemorrhage",
    "SDH": "Intracranial hemorrhage with subdural hemorrhage",
    "EDH": "Intracranial hemorrhage with epidural hemorrhage",
    "SAH": "Intracranial hemorrhage with subarachnoid hemorrhage",
    "BleedLocation-Left": "Bleeding in left side",
    "BleedLocation-Right": "Bleeding in right side",
    "MidlineShift": "Midline shift",
    "MassEffect": "Mass Effect",
}
"""Scored findings → text, in the published order of the texts."""

CQ500_EXCLUDED = {"CQ500CT163": "its only series could not be converted (bad_img_dims)"}

CQ500_POSITIVES = dict(zip(CQ500_COLUMNS, (205, 134, 28, 53, 13, 60, 131, 129, 19, 39, 34, 12, 127, 65)))
"""Consensus positives among the 490 studies of the published table."""

_CQ500_ID = re.compile(r"CQ500-?CT-?(\d{1,4})( CQ500-?CT-?\d{1,4})?", re.IGNORECASE)


def cq500_id(text: str) -> str:
    """CQ500CT<three digits> from any spelling: CQ500CT7, CQ500-CT-7, "CQ500CT7 CQ500CT7".

    Raises:
        ValueError: no such id.
    """
    match = _CQ500_ID.fullmatch(text.strip())
    if not match:
        raise UserError(f"{text!r}; expected a study id such as CQ500CT007 or CQ500-CT-7")
    return f"CQ500CT{int(match[1]):03d}"


def read_cq500_labels(path: str | Path, *, findings: Sequence[str] = CQ500_COLUMNS) -> LabelTable:
    """Consensus labels by study, from a table with a row per study (ICH, IPH, …) or per series (consensus_ICH, …).

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`; rows of one study with different labels.
    """
    prefix = "consensus_" if has_column(header_of(path), f"consensus_{findings[0]}") else ""
    return read_label_csv(
        path,
        id_columns=["study", "subject", "name"],
        class_columns={name: prefix + name for name in findings},
        normalise_id=cq500_id,
        rows_may_repeat=bool(prefix),
    )


def open_cq500(
    labels_csv: str | Path, data_dir: str | Path, *, protocol: Protocol = "corrected", allow_missing: bool = False
) -> LabelledStudies:
    """CQ500 studies: <data>/<study>/<series>/img_*.pt; every series in every window, sorted by name.

    "published" scores the text "Midline shift" against the labels of mass effect and the reverse, as the published
    evaluation does; "corrected" scores each against its own. Study CQ500CT163 is left out in both.

    Raises:
        FileNotFoundError: no label file, or missing studies without allow_missing.
        ValueError: a label file that is none.
    """
    # The swap is one of labels: the texts, and with them the classes, keep their order.
    labels_of = {name: name for name in CQ500_PROMPTS}
    if protocol == "published":
        labels_of |= {"MidlineShift": "MassEffect", "MassEffect": "MidlineShift"}
    table = read_cq500_labels(labels_csv, findings=list(labels_of.values()))
    kept = [row for row, study in enumerate(table.ids) if study not in CQ500_EXCLUDED]
    excluded = {study: reason for study, reason in CQ500_EXCLUDED.items() if study in table.ids}
    table = LabelTable(table.source, table.ids, tuple(labels_of), table.labels_NC).rows(kept)
    root = Path(data_dir).expanduser()
    folders = _folders_by_id(root, cq500_id)
    found: list[Study | None] = []
    incomplete: list[str] = []
    for study in table.ids:
        series_folders = window_folders(folders.get(study))
        files = [file for folder in series_folders for file in cq500_window_files(folder)]
        if files and len(files) < len(WINDOWS) * len(series_folders):
            incomplete.append(study)
        found.append(Study(study, tuple(files)) if files else None)
    benchmark = assemble(
        name="cq500",
        protocol=protocol,
        table=table,
        prompts=tuple(CQ500_PROMPTS.values()),
        found=found,
        allow_missing=allow_missing,
        looked_in=root,
        on_disk=[study for study in folders if study not in CQ500_EXCLUDED],
    )
    benchmark.excluded = excluded
    if protocol == "published":
        benchmark.notes.append("published protocol: the labels of midline shift and mass effect are swapped")
    _note_incomplete(benchmark, incomplete)
    return benchmark


# --- folders ---------------------------------------------------------------------------------------------------------


def _folders_by_id(root: Path, normalise_id: Callable[[str], str]) -> dict[str, Path]:
    """Study folders by id; entries whose name is no id are left alone.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: two folders of one study.
    """
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder; expected the folder that holds the studies (--data-dir)")
    folders: dict[str, Path] = {}
    for entry in visible_entries(root):
        try:
            study = normalise_id(entry.name)
        except ValueError:
            continue
        if study in folders:
            raise UserError(f"{root}: {folders[study].name} and {entry.name} are the same study; remove one")
        folders[study] = entry
    return folders


def window_folders(study_folder: Path | None) -> list[Path]:
    """Folders of a study that hold at least one window."""
    if study_folder is None:
        return []
    return [entry for entry in visible_entries(study_folder) if any((entry / name).is_file() for name in WINDOWS)]


def rsna_window_files(folder: Path) -> list[SeriesFile]:
    """The windows of a series folder, named as RSNA's are."""
    return _window_files(folder, "MPR-AX_HEAD-protocol")


def cq500_window_files(folder: Path) -> list[SeriesFile]:
    """The windows of a series folder, named after it as CQ500's are."""
    return _window_files(folder, f"{folder.name}_AX")


def _window_files(folder: Path, prefix: str) -> list[SeriesFile]:
    present = [(window, folder / name) for name, window in WINDOWS.items() if (folder / name).is_file()]
    return [SeriesFile(f"{prefix}_{window}", path) for window, path in present]


def _note_incomplete(benchmark: LabelledStudies, studies: Sequence[str]) -> None:
    if studies:
        shown = ", ".join(studies[:5]) + (", …" if len(studies) > 5 else "")
        benchmark.notes.append(f"{len(studies):,} studies lack a window of a series, scored without it: {shown}")


# --- the benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RsnaOptions(StudyOptions):
    """Zero-shot detection of intracranial hemorrhage and four of its kinds on RSNA: AUC of each, mean."""

    study_lists: tuple[Path, ...] = ()
    """Text files of study ids, one per line: score only these; default: all of the label file."""

    family: ClassVar[str] = "rsna"

    def read(self) -> LabelledStudies:
        """RSNA's studies, every one once."""
        labels = find_labels(self.labels, ("RSNA.csv", "rsna.csv"), self.data_dir)
        return open_rsna(
            labels,
            self.data_dir,
            studies=read_study_list(self.study_lists) if self.study_lists else None,
            protocol=self.protocol,
            allow_missing=self.allow_missing,
        )

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """AUC of each finding and their mean."""
        return finding_measures("RSNA", scores_NC, labels_NC, classes)


@dataclass(frozen=True, kw_only=True)
class Cq500Options(StudyOptions):
    """Zero-shot detection of ten findings on CQ500: AUC of each and their mean."""

    family: ClassVar[str] = "cq500"

    def read(self) -> LabelledStudies:
        """CQ500's studies, every series in every window."""
        labels = find_labels(self.labels, ("CQ500.csv", "cq500.csv"), self.data_dir)
        return open_cq500(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """AUC of each finding and their mean."""
        return finding_measures("CQ500", scores_NC, labels_NC, classes)
