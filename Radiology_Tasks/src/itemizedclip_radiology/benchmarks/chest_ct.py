"""CT-RATE validation and Rad-ChestCT: zero-shot detection of findings on chest CT.

    python3 zeroshot_ct_rate.py --resume epoch_80.pt --data-root DIR
    python3 zeroshot_rad_chestct.py --resume epoch_80.pt --data-root DIR
    torchrun --nproc_per_node 8 -- zeroshot_ct_rate.py …          the same numbers

CT-RATE: DIR holds valid/valid_1/valid_1_a/valid_1_a_1.pt; one label row per reconstruction (VolumeName and 18
findings), every one scored and counted on its own, as published; scan/… averages those of a scan. Labels are
valid_predicted_labels.csv or valid_labels.csv, in DIR, in the folder above, or in multi_abnormality_labels/ or
dataset/multi_abnormality_labels/ there; --labels gives another place.

Rad-ChestCT: DIR holds <id>/<id>.pt or <id>.pt; one label row per scan (NoteAcc_DEID and 15 or 16 columns), train,
validation and test scans together. Labels are rad_chestct_labels.csv in DIR or the folder above, made by
`python -m itemizedclip_radiology.prepare.labels rad-chestct`. One calcification label stands under two columns. The
mean over 14 findings counts it once, with the larger of its two scores; the published code averages all 15 columns.
Both are reported; unprefixed means are those of 14, with --protocol published those of 15.

Axes: N volumes, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import tyro

from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.benchmarks.chest_measures import Averages, Findings, chest_measures
from itemizedclip_radiology.benchmarks.labelled_studies import LabelledStudies, Protocol, assemble, find_labels
from itemizedclip_radiology.benchmarks.zero_shot import Measures, StudyOptions
from itemizedclip_radiology.data.chest import ChestReader, ChestSettings
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

CT_RATE_GRID, RAD_CHESTCT_GRID = 1000, 4000
"""Thresholds that the published evaluations try."""

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
) -> LabelledStudies:
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
) -> LabelledStudies:
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


# --- the benchmarks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChestOptions(StudyOptions):
    """What the two evaluations are asked for."""

    model: str | None = "CTRATE_HLIP_BiomedBERT_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    input: Annotated[ChestSettings, tyro.conf.arg(name="")] = field(default_factory=ChestSettings)

    def fit_to_model(self, studies: LabelledStudies, loaded: LoadedModel) -> LabelledStudies:
        """Volumes as the checkpoint was trained with, unless --input-info says otherwise.

        Raises:
            ValueError: a model of brain studies.
        """
        studies = super().fit_to_model(studies, loaded)
        if studies.series_names:
            raise UserError(
                f"{self.checkpoint}: its model reads series names of brain studies; give a checkpoint of "
                "train_ctrate.sh"
            )
        options = self.input.chest_input(studies.size, loaded.meta.get("transform"))
        root = self.data_dir.expanduser()
        return replace(studies, reader=ChestReader(root, options, self.input.cache(options.window)))


@dataclass(frozen=True, kw_only=True)
class CtRateOptions(ChestOptions):
    """Zero-shot detection of 16 findings on CT-RATE: AUC, and accuracy, F1, recall, precision at thresholds."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename", "--zeroshot-ct-rate"))] = None
    """CSV of labels; default: valid_predicted_labels.csv or valid_labels.csv in --data-root or the folder above."""

    family: ClassVar[str] = "ct_rate"

    def read(self) -> LabelledStudies:
        """CT-RATE's labelled reconstructions."""
        labels = find_labels(self.labels, CT_RATE_VALID_LABELS, self.data_dir)
        return open_ct_rate(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def patient_of(self, study_id: str) -> str:
        """The patient in a reconstruction's name."""
        volume = parse_volume_name(study_id)
        return f"{volume.split}_{volume.patient}"

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """Measures of the 16 findings, with the reconstructions of a patient in one fold."""
        volumes = [parse_volume_name(study) for study in studies]
        findings = Findings(
            classes,
            scores_NC,
            labels_NC,
            groups_N=[self.patient_of(study) for study in studies],
            scans_N=[volume.scan for volume in volumes],
        )
        averages = Averages(f"mean over the {len(classes)} findings, one row per reconstruction", {"": classes})
        return chest_measures("CT-RATE", findings, averages, protocol=self.protocol, grid_size=CT_RATE_GRID)


@dataclass(frozen=True, kw_only=True)
class RadChestCtOptions(ChestOptions):
    """Zero-shot detection of 14 findings on Rad-ChestCT: AUC, and accuracy, F1, recall, precision."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = None
    """CSV of labels; default: rad_chestct_labels.csv in --data-root or the folder above."""

    family: ClassVar[str] = "rad_chestct"

    def read(self) -> LabelledStudies:
        """Rad-ChestCT's scans, all three splits."""
        labels = find_labels(self.labels, RAD_CHESTCT_LABELS, self.data_dir)
        return open_rad_chestct(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """Measures of the 15 columns and of the merged calcification; the label file names no patients."""
        merged_scores, merged = merge_calcification(scores_NC, classes)
        merged_labels, _ = merge_calcification(labels_NC, classes)
        findings = Findings(
            (*classes, CALCIFICATION),
            np.concatenate([scores_NC, merged_scores[:, -1:]], axis=1),
            np.concatenate([labels_NC, merged_labels[:, -1:]], axis=1),
            groups_N=studies,
        )
        if self.protocol == "published":
            headline = f"mean over the {len(classes)} label columns, calcification counted twice, as published"
            averages = Averages(headline, {"": classes, f"classes_{len(merged)}": merged})
        else:
            headline = f"mean over {len(merged)} findings, the two calcification columns merged into one"
            averages = Averages(headline, {"": merged, f"columns_{len(classes)}": classes})
        return chest_measures("Rad-ChestCT", findings, averages, protocol=self.protocol, grid_size=RAD_CHESTCT_GRID)
