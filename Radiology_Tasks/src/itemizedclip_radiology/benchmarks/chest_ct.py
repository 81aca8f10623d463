"""CT-RATE validation and Rad-ChestCT: label files, volumes, classes and texts of the chest CT evaluations.

CT-RATE: one row per reconstruction (VolumeName and 18 findings), every one scored on its own.
Rad-ChestCT: one row per scan (NoteAcc_DEID and 15 or 16 columns), train, validation and test scans together.

Axes: N volumes, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.benchmarks.benchmark import Benchmark, Protocol, assemble
from itemizedclip_radiology.data.chest import ChestReader
from itemizedclip_radiology.data.ct_rate_tree import EXCLUDED_RECONSTRUCTIONS, parse_volume_name
from itemizedclip_radiology.data.label_table import LabelTable, read_label_csv
from itemizedclip_radiology.data.studies import SeriesFile, Study

CT_RATE_COLUMNS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
"""Findings of the official label files, in their order."""

CHEST_CLASSES = (
    "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
    "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening", "Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification",
    "Hiatal hernia", "Arterial wall calcification",
)  # fmt: skip
"""The 16 scored findings of CT-RATE, in the published order (no medical material, no lymphadenopathy)."""

RAD_CHESTCT_CLASSES = tuple(name for name in CHEST_CLASSES if name != "Mosaic attenuation pattern")
"""The 15 scored columns of Rad-ChestCT."""

CALCIFICATION = "Calcification"
CALCIFICATION_CLASSES = ("Coronary artery wall calcification", "Arterial wall calcification")
"""Rad-ChestCT has one calcification label, published twice under these names; merged it counts once (14 classes)."""

CT_RATE_VALID_POSITIVES = dict(
    zip(
        CT_RATE_COLUMNS,
        (313, 867, 325, 226, 765, 417, 789, 600, 713, 1361, 1184, 831, 376, 253, 355, 581, 330, 249),
    )
)
"""Positives among the 3,039 reconstructions of the validation split."""

CT_RATE_VALID_LABELS = tuple(
    f"{folder}{name}"
    for folder in ("", "multi_abnormality_labels/", "dataset/multi_abnormality_labels/")
    for name in ("valid_predicted_labels.csv", "valid_labels.csv")
)
"""Names of the validation labels, official and as the authors renamed them, and where the data set keeps them."""

RAD_CHESTCT_LABELS = ("rad_chestct_labels.csv",)

RAD_CHESTCT_COLUMNS = (
    "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening", "Cardiomegaly",
    "Pericardial effusion", "Hiatal hernia", "Coronary artery wall calcification", "Arterial wall calcification",
)  # fmt: skip
"""Findings of the label file, in its order."""

RAD_CHESTCT_POSITIVES = dict(
    zip(RAD_CHESTCT_COLUMNS, (992, 1082, 2874, 1955, 478, 727, 308, 505, 575, 252, 394, 563, 425, 2562, 2562))
)
"""Positives among all 3,630 scans."""

_WORDINGS = {
    "Lung nodule": "nodules or nodular density",
    "Lung opacity": "opacity",
    "Bronchiectasis": "bronchiectasis or bronchiectatic changes",
}
_RAD_CHESTCT_ID = re.compile(r"(trn|val|tst)\d+")


def chest_prompt(name: str) -> str:
    """The published text of a class, such as "findings consistent with emphysema"."""
    return f"findings consistent with {_WORDINGS.get(name, name.lower())}"


# --- CT-RATE ---------------------------------------------------------------------------------------------------------


def ct_rate_volume(text: str) -> str:
    """A volume's stem, valid_1_a_2, from its name with or without .nii.gz or .pt."""
    return parse_volume_name(text).stem


def read_ct_rate_labels(path: str | Path, *, classes: Sequence[str] = CHEST_CLASSES) -> LabelTable:
    """Labels by reconstruction.

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`.
    """
    return read_label_csv(
        path,
        id_columns=["VolumeName"],
        class_columns={name: name for name in classes},
        normalise_id=ct_rate_volume,
    )


def open_ct_rate(
    labels_csv: str | Path, data_root: str | Path, *, protocol: Protocol = "corrected", allow_missing: bool = False
) -> Benchmark:
    """CT-RATE volumes of a label file (normally the validation split): ROOT/valid/valid_1/valid_1_a/valid_1_a_1.pt.

    Raises:
        FileNotFoundError: no label file, or missing volumes without allow_missing.
        ValueError: a label file that is none.
    """
    table = read_ct_rate_labels(labels_csv)
    excluded = {name: "left out by the published code" for name in table.ids if name in EXCLUDED_RECONSTRUCTIONS}
    table = table.rows([row for row, name in enumerate(table.ids) if name not in excluded])
    root = Path(data_root).expanduser()
    paths = [root / parse_volume_name(name).path for name in table.ids]
    benchmark = assemble(
        name="ct_rate",
        protocol=protocol,
        table=table,
        prompts=[chest_prompt(name) for name in table.classes],
        found=[_single(name, path) for name, path in zip(table.ids, paths)],
        allow_missing=allow_missing,
        looked_in=root,
    )
    benchmark.excluded = excluded
    benchmark.reader = ChestReader(root)
    return benchmark


# --- Rad-ChestCT -----------------------------------------------------------------------------------------------------


def rad_chestct_id(text: str) -> str:
    """A scan id such as trn00001, with or without .npz or .pt.

    Raises:
        ValueError: no such id.
    """
    name = text.strip().removesuffix(".pt").removesuffix(".npz")
    if not _RAD_CHESTCT_ID.fullmatch(name):
        raise UserError(f"{text!r}; expected a scan id such as trn00001, val00001 or tst00001")
    return name


def read_rad_chestct_labels(path: str | Path, *, classes: Sequence[str] = RAD_CHESTCT_CLASSES) -> LabelTable:
    """Labels by scan.

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`.
    """
    return read_label_csv(
        path,
        id_columns=["NoteAcc_DEID"],
        class_columns={name: name for name in classes},
        normalise_id=rad_chestct_id,
    )


def open_rad_chestct(
    labels_csv: str | Path, data_dir: str | Path, *, protocol: Protocol = "corrected", allow_missing: bool = False
) -> Benchmark:
    """Rad-ChestCT volumes, all splits: ROOT/<id>/<id>.pt or ROOT/<id>.pt, with the 15 published classes.

    Both protocols score 15 columns; `merge_calcification` turns the result into the 14 classes in which the one
    calcification label counts once.

    Raises:
        FileNotFoundError: no label file, or missing volumes without allow_missing.
        ValueError: a label file that is none.
    """
    table = read_rad_chestct_labels(labels_csv)
    root = Path(data_dir).expanduser()
    found = [_single(name, root / name / f"{name}.pt") or _single(name, root / f"{name}.pt") for name in table.ids]
    benchmark = assemble(
        name="rad_chestct",
        protocol=protocol,
        table=table,
        prompts=[chest_prompt(name) for name in table.classes],
        found=found,
        allow_missing=allow_missing,
        looked_in=root,
    )
    benchmark.reader = ChestReader(root)
    benchmark.notes.append(
        "one calcification label stands under two of the 15 columns; merged, 14 classes count it once"
    )
    return benchmark


def merge_calcification(values_NC: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Scores or labels (N, C) with the two calcification columns replaced by one, their larger value, at the end.

    Raises:
        ValueError: a calcification column is missing.
    """
    absent = [name for name in CALCIFICATION_CLASSES if name not in classes]
    if absent:
        raise UserError(f"no column {absent[0]!r} among {', '.join(classes)}; expected both calcification columns")
    kept = [c for c, name in enumerate(classes) if name not in CALCIFICATION_CLASSES]
    merged = [classes.index(name) for name in CALCIFICATION_CLASSES]
    larger = values_NC[:, merged].max(1, keepdims=True)
    return np.concatenate((values_NC[:, kept], larger), axis=1), (*(classes[c] for c in kept), CALCIFICATION)


def _single(name: str, path: Path) -> Study | None:
    """A study of one volume, or None when there is no such file."""
    return Study(name, (SeriesFile(name, path),)) if path.is_file() else None
