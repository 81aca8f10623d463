"""Label CSVs of the radiology benchmarks from their official files.

    python -m itemizedclip_radiology.prepare.labels COMMAND …, where COMMAND is one of

    rsna-images --dicom-dir stage_2_train --output rsna_images.csv
    rsna --labels stage_2_train.csv --images rsna_images.csv --output RSNA.csv
    cq500 --reads reads.csv --output CQ500.csv
    ct-rate --labels valid_predicted_labels.csv --output valid_labels.csv
    rad-chestct --labels imgtrain_*.csv imgvalid_*.csv imgtest_*.csv --output rad.csv

Each output has one id column and one column per finding, values 0 and 1. Row units: RSNA and CQ500 one study, CT-RATE
one reconstruction, Rad-ChestCT one scan.

Axes: N rows, C classes.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import numpy as np
import pandas as pd
import tyro

from itemizedclip.runtime.errors import MissingFileError, UserError, reported_errors
from itemizedclip.runtime.files import column_key, open_csv, written_whole
from itemizedclip.runtime.flags import at_least, loader_processes, read_flags
from itemizedclip.runtime.logs import shown
from itemizedclip_radiology.benchmarks.chest_ct import (
    CT_RATE_COLUMNS,
    CT_RATE_VALID_POSITIVES,
    RAD_CHESTCT_COLUMNS,
    RAD_CHESTCT_POSITIVES,
    rad_chestct_id,
    read_ct_rate_labels,
)
from itemizedclip_radiology.benchmarks.head_ct import CQ500_COLUMNS, CQ500_POSITIVES, RSNA_COLUMNS, cq500_id
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.data.label_table import LabelTable, count_differences, write_label_csv

# --- RSNA ------------------------------------------------------------------------------------------------------------

_IMAGE_ID_COLUMNS = ("ImageID", "SOPInstanceUID", "ID", "image", "image_id")
_STUDY_ID_COLUMNS = ("StudyInstanceUID", "study", "study_id")


def build_rsna(labels_csv: Path, images_csv: Path, *, allow_unknown_images: bool = False) -> LabelTable:
    """RSNA study labels: a study has a finding when any of its slices has it.

    Args:
        labels_csv: stage_2_train.csv, columns ID (ID_<image>_<type>) and Label; repeated rows count once.
        images_csv: which study an image belongs to, which the labels do not say: columns ImageID (ID_<image>, in
            DICOM headers the SOPInstanceUID) and StudyInstanceUID. Images without labels are not used.
        allow_unknown_images: go on without labelled images that the table does not list.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a column is missing, an id or a value is none, an image lacks its six rows, or images without study.
    """
    labels_of_image = _slice_labels(labels_csv)
    study_of_image = _image_table(images_csv)
    unknown = [image for image in labels_of_image if image not in study_of_image]
    if len(unknown) == len(labels_of_image):
        raise UserError(f"{images_csv}: lists none of the {len(labels_of_image):,} images of {labels_csv}")
    if unknown and not allow_unknown_images:
        raise UserError(
            f"{images_csv}: no study for {len(unknown):,} of {len(labels_of_image):,} images of {labels_csv}, such as "
            f"{unknown[0]}; complete the table, or leave these images out with --allow-unknown-images"
        )
    studies: dict[str, np.ndarray] = {}
    for image, labels in labels_of_image.items():
        if image in study_of_image:
            study = studies.setdefault(study_of_image[image], np.zeros(len(RSNA_COLUMNS), dtype=np.int8))
            np.maximum(study, np.frombuffer(labels, dtype=np.int8), out=study)
    return LabelTable(labels_csv, list(studies), RSNA_COLUMNS, np.stack(list(studies.values())))


def _slice_labels(labels_csv: Path) -> dict[str, bytearray]:
    """Labels of each image, ID_<image>, in the order of `RSNA_COLUMNS`."""
    unset = 255
    column_of_type = {name.lower(): column for column, name in enumerate(RSNA_COLUMNS)}
    value_of = {"0": 0, "1": 1}
    images: dict[str, bytearray] = {}
    # Four and a half million rows: a plain loop over the file needs a tenth of a data frame's memory.
    with open_csv(labels_csv, holding="RSNA's slice labels (stage_2_train.csv)") as rows:
        header = next(rows, [])
        if [name.strip() for name in header] != ["ID", "Label"]:
            raise UserError(f"{labels_csv}: columns {', '.join(header) or 'none'}; expected ID, Label")
        for row in rows:
            image, _, kind = row[0].rpartition("_") if len(row) == 2 else ("", "", "")
            column, value = column_of_type.get(kind), value_of.get(row[-1]) if row else None
            if column is None or value is None or not image.startswith("ID_"):
                raise UserError(
                    f"{labels_csv}: line {rows.line}: {','.join(row)}; expected ID_<image>_<type>,0 or 1 with a "
                    f"type of {', '.join(column_of_type)}"
                )
            labels = images.setdefault(image, bytearray([unset] * len(RSNA_COLUMNS)))
            if labels[column] not in (unset, value):
                raise UserError(f"{labels_csv}: line {rows.line}: {image}, {kind}: has rows with 0 and with 1")
            labels[column] = value
    incomplete = [image for image, labels in images.items() if unset in labels]
    if incomplete or not images:
        name = incomplete[0] if incomplete else "no image"
        raise UserError(f"{labels_csv}: {name}: rows are missing; expected one for each of {', '.join(RSNA_COLUMNS)}")
    return images


def _image_table(images_csv: Path) -> dict[str, str]:
    header = list(_read_csv(images_csv, [], header_only=True).columns)
    image_column = _named(images_csv, header, _IMAGE_ID_COLUMNS)
    study_column = _named(images_csv, header, _STUDY_ID_COLUMNS)
    table = _read_csv(images_csv, [image_column, study_column]).drop_duplicates()
    images = table[image_column]
    repeated = images[images.duplicated()]
    if len(repeated):
        raise UserError(f"{images_csv}: image {repeated.iloc[0]} belongs to two studies; keep one row")
    return dict(zip(images, table[study_column]))


def list_rsna_images(dicom_dir: Path, *, workers: int | None = None) -> list[tuple[str, str]]:
    """(image id, study id) of every DICOM file below a folder, from the headers.

    Raises:
        FileNotFoundError: no such folder, or no .dcm file in it.
        ValueError: files whose header cannot be read or lacks an id; the first is named.
    """
    files = sorted(str(path) for path in dicom_dir.rglob("*.dcm"))
    if not files:
        raise MissingFileError(f"{dicom_dir}: no .dcm file; expected RSNA's stage_2_train folder")
    with ProcessPoolExecutor(loader_processes(workers)) as pool:
        rows = list(pool.map(_dicom_ids, files, chunksize=256))
    bad = [path for path, row in zip(files, rows) if row is None]
    if bad:
        raise UserError(
            f"{len(bad):,} of {len(files):,} files have no readable SOPInstanceUID and StudyInstanceUID, such as "
            f"{bad[0]}; download or remove them"
        )
    return [row for row in rows if row is not None]


def write_image_table(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write (image id, study id) as `build_rsna` and `prepare studies --from rsna` read them."""
    with written_whole(path, text=True) as file:
        csv.writer(file, lineterminator="\n").writerows([("ImageID", "StudyInstanceUID"), *rows])


def _dicom_ids(path: str) -> tuple[str, str] | None:
    import pydicom  # here, because only this command needs it

    # RSNA's ids are no valid UIDs, which pydicom would say for each of 750,000 files.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID", "StudyInstanceUID"])
        return str(header.SOPInstanceUID), str(header.StudyInstanceUID)
    except (pydicom.errors.InvalidDicomError, AttributeError, OSError, ValueError, KeyError):
        return None


# --- CQ500 -----------------------------------------------------------------------------------------------------------


def build_cq500(reads_csv: Path) -> LabelTable:
    """CQ500 study labels: a finding is present when at least two of the three readers saw it.

    Args:
        reads_csv: reads.csv, columns name (CQ500-CT-<n>) and R1:<finding>, R2:<finding>, R3:<finding>.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a value other than 0 and 1, an id that is none or stands twice.
    """
    header = list(_read_csv(reads_csv, [], header_only=True).columns)
    name_column = _named(reads_csv, header, ("name", "study", "subject"))
    readers = [f"R{number}:{finding}" for finding in CQ500_COLUMNS for number in (1, 2, 3)]
    columns = [_named(reads_csv, header, (reader,)) for reader in readers]
    frame = _read_csv(reads_csv, [name_column, *columns])
    votes = _binary(reads_csv, frame, columns).reshape(len(frame), len(CQ500_COLUMNS), 3).sum(2)
    ids = _ids(reads_csv, frame[name_column], cq500_id)
    return LabelTable(reads_csv, ids, CQ500_COLUMNS, (votes >= 2).astype(np.int8))


# --- CT-RATE ---------------------------------------------------------------------------------------------------------


def build_ct_rate(labels_csv: Path, *, first_reconstruction_only: bool = False) -> LabelTable:
    """CT-RATE labels with all 18 findings, checked, one row per reconstruction.

    Args:
        labels_csv: train_predicted_labels.csv or valid_predicted_labels.csv.
        first_reconstruction_only: keep one row per scan, that of its first listed reconstruction; labels come from the
            report, which all reconstructions of a scan share.

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`.
    """
    table = read_ct_rate_labels(labels_csv, classes=CT_RATE_COLUMNS)
    if first_reconstruction_only:
        first: dict[str, int] = {}
        for row, name in enumerate(table.ids):
            first.setdefault(parse_volume_name(name).scan, row)
        table = table.rows(list(first.values()))
    return LabelTable(table.source, [f"{name}.nii.gz" for name in table.ids], table.classes, table.labels_NC)


# --- Rad-ChestCT -----------------------------------------------------------------------------------------------------

RAD_CHESTCT_SOURCES: Mapping[str, str] = {
    "Emphysema": "emphysema",
    "Atelectasis": "atelectasis",
    "Lung nodule": "nodule",
    "Lung opacity": "opacity",
    "Pulmonary fibrotic sequela": "fibrosis",
    "Pleural effusion": "pleural_effusion",
    "Peribronchial thickening": "bronchial_wall_thickening",
    "Consolidation": "consolidation",
    "Bronchiectasis": "bronchiectasis",
    "Interlobular septal thickening": "septal_thickening",
    "Cardiomegaly": "cardiomegaly",
    "Pericardial effusion": "pericardial_effusion",
    "Hiatal hernia": "hernia",
    "Coronary artery wall calcification": "calcification",
    "Arterial wall calcification": "calcification",
}
"""Finding → abnormality of the official files. Any hernia counts; the one calcification stands for both kinds."""


def build_rad_chestct(label_csvs: Sequence[Path]) -> LabelTable:
    """Rad-ChestCT scan labels: an abnormality is present when it is at any location; files are put one after another.

    Args:
        label_csvs: img{train,valid,test}_Abnormality_and_Location_Labels.csv, columns NoteAcc_DEID and
            <abnormality>*<location>.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a missing abnormality, a value other than 0 and 1, an id that is none or stands twice.
    """
    ids: list[str] = []
    blocks: list[np.ndarray] = []
    for path in label_csvs:
        header = list(_read_csv(path, [], header_only=True).columns)
        name_column = _named(path, header, ("NoteAcc_DEID",))
        locations: dict[str, list[str]] = {}
        for column in header:
            if "*" in column:
                locations.setdefault(column.split("*", 1)[0].strip().lower(), []).append(column)
        for finding, source in RAD_CHESTCT_SOURCES.items():
            if source not in locations:
                raise UserError(f"{path}: no column {source}*<location> for {finding}; found {', '.join(locations)}")
        used = [column for source in RAD_CHESTCT_SOURCES.values() for column in locations[source]]
        frame = _read_csv(path, [name_column, *used])
        present = {
            source: _binary(path, frame, locations[source]).max(1) for source in set(RAD_CHESTCT_SOURCES.values())
        }
        blocks.append(np.stack([present[RAD_CHESTCT_SOURCES[name]] for name in RAD_CHESTCT_COLUMNS], axis=1))
        ids += _ids(path, frame[name_column], rad_chestct_id, seen=ids)
    return LabelTable(Path(label_csvs[0]), ids, RAD_CHESTCT_COLUMNS, np.concatenate(blocks).astype(np.int8))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, columns: Sequence[str], *, header_only: bool = False) -> pd.DataFrame:
    """The named columns as text; all columns when none is named."""
    with open_csv(path, holding=f"the columns {', '.join(list(columns)[:6])}" if columns else "labels") as rows:
        header = next(rows, [])
        wanted = [*dict.fromkeys(columns)] or header
        doubled = [name for name in wanted if header.count(name) > 1]
        if doubled:
            raise UserError(f"{path}: {header.count(doubled[0])} columns are called {doubled[0]!r}; keep one")
        at = [header.index(name) for name in wanted]
        found = []
        for row in [] if header_only else rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{path}: line {rows.line}: {len(row)} values for {len(header)} columns; expected one per column"
                )
            if row:
                found.append([row[column] for column in at])
    if not (found or header_only):
        raise UserError(f"{path}: no row below the header; expected the official CSV")
    return pd.DataFrame(found, columns=wanted, dtype=str)


def _named(path: Path, header: Sequence[str], names: Sequence[str]) -> str:
    """The first of several column names that the header has, however spelt."""
    keys = {column_key(column): column for column in header}
    for name in names:
        if column_key(name) in keys:
            return keys[column_key(name)]
    raise UserError(f"{path}: no column {' or '.join(map(repr, names))}; found {', '.join(header[:12])}")


def _binary(path: Path, frame: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """int8 (N, columns) of values written as 0, 1, 0.0 or 1.0."""
    text = frame[list(columns)].to_numpy(dtype=str)
    is_one = np.isin(text, ("1", "1.0"))
    wrong = ~is_one & ~np.isin(text, ("0", "0.0"))
    if wrong.any():
        row, column = (int(at[0]) for at in np.nonzero(wrong))
        found = str(text[row, column])
        raise UserError(f"{path}: line {row + 2}: column {columns[column]!r}: {found!r}; expected 0 or 1")
    return is_one.astype(np.int8)


def _ids(path: Path, texts: pd.Series, normalise: Callable[[str], str], *, seen: Sequence[str] = ()) -> list[str]:
    """Row names; `seen` are those of earlier files."""
    known = set(seen)
    ids = []
    for row, text in enumerate(texts):
        try:
            name = normalise(text)
        except ValueError as error:
            raise UserError(f"{path}: line {row + 2}: {error}") from None
        if name in known:
            raise UserError(f"{path}: line {row + 2}: {name!r} stands twice; keep one row")
        known.add(name)
        ids.append(name)
    return ids


# --- command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RsnaImages:
    """Table of RSNA images and their studies from the DICOM headers (750,000 files: minutes to hours)."""

    dicom_dir: Path
    """Folder of .dcm files, such as stage_2_train."""

    output: Path
    """CSV to write: ImageID, StudyInstanceUID."""

    workers: int | None = None
    """Processes that read headers; None: one per core, at most 8."""

    def run(self) -> Iterator[str]:
        at_least(self, workers=1)
        rows = list_rsna_images(self.dicom_dir, workers=self.workers)
        write_image_table(self.output, rows)
        yield f"{self.output}: {len(rows):,} images of {len({study for _, study in rows}):,} studies"


@dataclass(frozen=True)
class Rsna:
    """RSNA study labels (study, Any, Epidural, …) from the slice labels and a table of images and studies."""

    labels: Path
    """Official stage_2_train.csv (ID, Label)."""

    images: Path
    """CSV with ImageID and StudyInstanceUID, see rsna-images."""

    output: Path
    """CSV to write."""

    allow_unknown_images: bool = False
    """Leave out labelled images that the table does not list."""

    def run(self) -> Iterator[str]:
        table = build_rsna(self.labels, self.images, allow_unknown_images=self.allow_unknown_images)
        yield from _write(self.output, table, "study")


@dataclass(frozen=True)
class Cq500:
    """CQ500 study labels (study, ICH, IPH, …): at least two of three readers."""

    reads: Path
    """Official reads.csv (name, Category, R1:ICH, …)."""

    output: Path
    """CSV to write."""

    def run(self) -> Iterator[str]:
        table = build_cq500(self.reads)
        yield from _write(self.output, table, "study")
        # The published table, whose counts these are, has every study but this one.
        listed = table.rows([row for row, study in enumerate(table.ids) if study != "CQ500CT120"])
        yield from _compare(listed, 490, CQ500_POSITIVES)


@dataclass(frozen=True)
class CtRate:
    """CT-RATE labels (VolumeName and 18 findings), one row per reconstruction."""

    labels: Path
    """Official train_predicted_labels.csv or valid_predicted_labels.csv."""

    output: Path
    """CSV to write."""

    first_reconstruction_only: bool = False
    """One row per scan: its first listed reconstruction."""

    def run(self) -> Iterator[str]:
        table = build_ct_rate(self.labels, first_reconstruction_only=self.first_reconstruction_only)
        yield from _write(self.output, table, "VolumeName")
        if not self.first_reconstruction_only and table.ids[0].startswith("valid"):
            yield from _compare(table, 3039, CT_RATE_VALID_POSITIVES)


@dataclass(frozen=True)
class RadChestct:
    """Rad-ChestCT scan labels (NoteAcc_DEID and 15 findings): present at any location."""

    labels: tuple[Path, ...]
    """Official imgtrain_, imgvalid_ and imgtest_Abnormality_and_Location_Labels.csv."""

    output: Path
    """CSV to write."""

    def run(self) -> Iterator[str]:
        if not self.labels:
            raise UserError("--labels names no file; expected the three official CSVs")
        table = build_rad_chestct(self.labels)
        yield from _write(self.output, table, "NoteAcc_DEID")
        yield from _compare(table, 3630, RAD_CHESTCT_POSITIVES)


def _write(path: Path, table: LabelTable, id_column: str) -> Iterator[str]:
    write_label_csv(path, table, id_column=id_column)
    yield f"{path}: {len(table):,} rows"
    for name, count in table.positives().items():
        yield f"  {name}: {count:,} positive"


def _compare(table: LabelTable, rows: int, positives: Mapping[str, int]) -> Iterator[str]:
    differences = count_differences(table, rows=rows, positives=positives)
    yield (
        "  differs from the published counts: " + "; ".join(differences)
        if differences
        else ("  rows and positives agree with the published counts")
    )


Command = Union[  # noqa: UP007 (tyro's subcommand annotations)
    Annotated[RsnaImages, tyro.conf.subcommand("rsna-images")],
    Annotated[Rsna, tyro.conf.subcommand("rsna")],
    Annotated[Cq500, tyro.conf.subcommand("cq500")],
    Annotated[CtRate, tyro.conf.subcommand("ct-rate")],
    Annotated[RadChestct, tyro.conf.subcommand("rad-chestct")],
]


PROG = "python -m itemizedclip_radiology.prepare.labels"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, and ends with 1 for a file that cannot be used, 2 for a flag that cannot be."""
    kind: Any = Command  # a union is no class
    command: RsnaImages | Rsna | Cq500 | CtRate | RadChestct = read_flags(
        kind, argv, prog=PROG, description="Label CSVs of the radiology benchmarks from their official files."
    )
    with reported_errors(PROG):
        for line in command.run():
            print(shown(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
