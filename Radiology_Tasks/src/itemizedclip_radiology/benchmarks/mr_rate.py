"""MR-RATE: zero-shot detection of the findings of brain and spine MRI that its label file holds, 37 of them.

    itemizedclip prepare studies /data/MR-RATE --from mr-rate --to /data/mr
    itemizedclip evaluate mr-rate --data-dir /data/mr --labels mrrate_labels.csv --checkpoint epoch_24.pt

DIR holds test.json (valid.json, train.json), which names studies and patients, and STUDY/SERIES/img.pt. Labels:
study_uid and a column of 0 and 1 per finding, made from the reports by a language model; a file with fewer of the
findings scores those. The texts are ours, or those of the data set's own pathologies.json (--prompts).

Axes: N studies, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.files import read_json
from itemizedclip_radiology.benchmarks.labelled_studies import (
    BrainReader,
    LabelledStudies,
    assemble,
    find_labels,
    visible_entries,
)
from itemizedclip_radiology.benchmarks.zero_shot import Measures, StudyOptions, finding_measures
from itemizedclip_radiology.data.brain import VOLUME_FILE
from itemizedclip_radiology.data.label_table import has_column, header_of, read_label_csv
from itemizedclip_radiology.data.studies import SeriesFile, Study

MrRateSplit = Literal["test", "valid", "train", "all"]

MR_RATE_PROMPTS: Mapping[str, str] = {
    "Cerebral infarction": "There is an infarct",
    "Cerebral hemorrhage": "There is hemorrhage",
    "Metastatic malignant neoplasm to brain": "There is brain metastasis",
    "Intracranial meningioma": "There is a meningioma",
    "Demyelinating disease of central nervous system": "There is demyelinating disease",
    "Herniation of nucleus pulposus": "There is a disc herniation",
    "Spinal cord compression": "There is compression of the spinal cord",
    "Lacunar infarct": "There is a lacunar infarct",
    "Silent micro-hemorrhage of brain": "There is microhemorrhage",
    "Cavernous hemangioma": "There is a cavernoma",
    "Subdural intracranial hemorrhage": "There is subdural hemorrhage",
    "Gliosis": "There is gliosis",
    "Cerebral atrophy": "There is cerebral atrophy",
    "Encephalomalacia": "There is encephalomalacia",
    "Arachnoid cyst": "There is an arachnoid cyst",
    "Empty sella syndrome": "There is an empty sella",
    "Intracranial aneurysm": "There is an intracranial aneurysm",
    "Chiari malformation": "There is Chiari malformation",
    "Schwannoma": "There is a schwannoma",
    "Cyst of pineal gland": "There is a pineal cyst",
    "Hemangioma of vertebral column": "There is a vertebral hemangioma",
    "Rathke's pouch cyst": "There is a Rathke cleft cyst",
    "Cerebral edema": "There is cerebral edema",
    "Spinal stenosis": "There is spinal canal stenosis",
    "Mastoiditis": "There is mastoiditis",
    "Chronic mastoiditis": "There is chronic mastoiditis",
    "Ventriculomegaly": "There is ventriculomegaly",
    "Cerebellar degeneration": "There is cerebellar atrophy",
    "Mega cisterna magna": "There is a mega cisterna magna",
    "Structure of cave of septum pellucidum": "There is a cavum septum pellucidum",
    "Hyperostosis of skull": "There is hyperostosis of the skull",
    "Watershed infarct": "There is a watershed infarct",
    "Choroid plexus cyst": "There is a choroid plexus cyst",
    "Foraminal Spinal Stenosis": "There is foraminal stenosis",
    "Lipoma of brain": "There is an intracranial lipoma",
    "Glioma": "There is a glioma",
    "Pituitary adenoma": "There is a pituitary adenoma",
}
"""Column of the label file → text, in the file's order."""

MR_RATE_LABELS = ("mrrate_labels.csv", "pathology_labels/mrrate_labels.csv")


def read_prompts(path: Path | None) -> dict[str, str]:
    """Finding → text, from the data set's pathologies.json: {"pathologies": {"NAME": {"positive": "…"}}}, or a list.

    Raises:
        MissingFileError: no such file.
        UserError: another kind of file.
    """
    if path is None:
        return dict(MR_RATE_PROMPTS)
    holding = '{"pathologies": {"NAME": {"positive": "text", …}, …}}'
    content = read_json(path.expanduser(), holding=holding)
    found = content.get("pathologies", content) if isinstance(content, dict) else content
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return {name: f"There is {name}" for name in found}
    texts = {}
    for name, entry in found.items() if isinstance(found, dict) else ():
        text = entry.get("positive") if isinstance(entry, dict) else entry
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {name!r} has no positive text; expected {holding}")
        texts[name] = text
    if not texts:
        raise UserError(f"{path}: names no finding; expected {holding}")
    return texts


def read_patients(data_dir: Path, split: MrRateSplit) -> dict[str, str]:
    """Study → patient of a split, from the index that `prepare studies --from mr-rate` wrote.

    Raises:
        MissingFileError: no such index.
        UserError: another kind of file.
    """
    names = ("train", "valid", "test") if split == "all" else (split,)
    paths = [path for name in names if (path := data_dir / f"{name}.json").is_file()]
    if not paths:
        raise MissingFileError(
            f"{data_dir / names[-1]}.json: no such file; expected what `itemizedclip prepare studies MR-RATE --from "
            "mr-rate --to DIR` writes (--data-dir DIR)"
        )
    patients: dict[str, str] = {}
    for path in paths:
        content = read_json(path, holding='studies {"STUDY": {"patient": …}}')
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected an object of studies, found a {type(content).__name__}")
        for study, entry in content.items():
            patient = entry.get("patient") if isinstance(entry, dict) else None
            patients[study] = patient if isinstance(patient, str) and patient else study
    return patients


def open_mr_rate(
    labels_csv: str | Path,
    data_dir: str | Path,
    *,
    split: MrRateSplit = "test",
    prompts: Path | None = None,
    allow_missing: bool = False,
) -> LabelledStudies:
    """The labelled studies of a split: ROOT/STUDY/SERIES/img.pt, every series, by name.

    Raises:
        MissingFileError: no label file, no index, or missing studies without allow_missing.
        UserError: a label file with none of the findings, or none of the split's studies.
    """
    root = Path(data_dir).expanduser()
    texts = read_prompts(prompts)
    header = header_of(labels_csv)
    classes = [name for name in texts if has_column(header, name)]
    if not classes:
        raise UserError(
            f"{labels_csv}: no column of a finding such as {next(iter(texts))!r}; found {', '.join(header)}"
        )
    table = read_label_csv(
        labels_csv, id_columns=["study_uid", "study"], class_columns={name: name for name in classes}
    )
    patients = read_patients(root, split)
    kept = [row for row, study in enumerate(table.ids) if study in patients]
    if not kept:
        raise UserError(f"{labels_csv}: labels none of the {len(patients):,} studies of --split {split} in {root}")
    table = table.rows(kept)
    found: list[Study | None] = []
    for study in table.ids:
        folders = visible_entries(root / study) or visible_entries(root / split / study)
        series = [SeriesFile(one.name, one / VOLUME_FILE) for one in folders if (one / VOLUME_FILE).is_file()]
        found.append(Study(study, tuple(series)) if series else None)
    benchmark = assemble(
        name="mr_rate" if split == "test" else f"mr_rate_{split}",
        protocol="corrected",
        table=table,
        prompts=[texts[name] for name in classes],
        found=found,
        allow_missing=allow_missing,
        looked_in=root,
        on_disk=list(patients),
    )
    benchmark.reader = BrainReader()
    absent = [name for name in texts if name not in classes]
    if absent:
        benchmark.notes.append(f"the label file has no column for {len(absent)} findings: {', '.join(absent)}")
    return benchmark


@dataclass(frozen=True, kw_only=True)
class MrRateOptions(StudyOptions):
    """Zero-shot detection of 37 findings on MR-RATE: AUC of each, their mean, intervals by patient."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = None
    """CSV of labels; default: mrrate_labels.csv in --data-dir or the folder above, or in pathology_labels/ there."""

    split: MrRateSplit = "test"
    """Which studies are scored."""

    prompts: Path | None = None
    """The data set's pathologies.json, whose positive texts are scored; default: texts of ours."""

    family: ClassVar[str] = "mr_rate"

    def read(self) -> LabelledStudies:
        """MR-RATE's labelled studies of a split."""
        return open_mr_rate(
            find_labels(self.labels, MR_RATE_LABELS, self.data_dir),
            self.data_dir,
            split=self.split,
            prompts=self.prompts,
            allow_missing=self.allow_missing,
        )

    def fit_to_model(self, studies: LabelledStudies, loaded: LoadedModel) -> LabelledStudies:
        """Files of another size are resampled where training did so."""
        studies = super().fit_to_model(studies, loaded)
        prepare = (loaded.meta.get("transform") or {}).get("prepare", "crop")
        return replace(studies, reader=BrainReader("resample" if prepare == "resample" else "crop"))

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """AUC of each finding and their mean, with intervals over resampled patients."""
        patients: dict[str, Any] = read_patients(self.data_dir.expanduser(), self.split)
        groups = [patients[study] for study in studies]
        return finding_measures("MR-RATE", scores_NC, labels_NC, classes, groups=groups)
