"""Pub-Brain-5 and Pub-Brain-5-gt: zero-shot classification of brain MRI studies of five groups.

    python3 zero_shot_pub_brain_5.py --resume epoch_24.pt --input-filename pub_brain_5.csv --data-dir DIR
    python3 zero_shot_pub_brain_5.py --resume epoch_24.pt --input-filename pub_brain_5_gt.csv --data-dir DIR
    torchrun --nproc_per_node 8 -- zero_shot_pub_brain_5.py …          the same numbers

DIR holds pub_brain_5/. Both sets share their scores: the second one evaluated with a checkpoint takes seconds.

Labels: study,Normal,Stroke,Glioma,Meningioma,Metastasis with exactly one 1 per row; a study is a rooted path that
begins with /data/pub_brain_5/. Volumes: <data>/pub_brain_5/<…>/<study>/<scan>.pt, any size, all scans are used.

Axes: N studies, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip_radiology.benchmarks.labelled_studies import (
    BrainReader,
    LabelledStudies,
    Protocol,
    assemble,
    find_labels,
    visible_entries,
)
from itemizedclip_radiology.benchmarks.zero_shot import Measures, StudyOptions
from itemizedclip_radiology.data.label_table import LabelTable, read_label_csv
from itemizedclip_radiology.data.studies import SeriesFile, Study

PROMPTS = {
    "Normal": "Study is unremarkable",
    "Stroke": "Acute stroke",
    "Glioma": "Glioma",
    "Meningioma": "Meningioma",
    "Metastasis": "Metastasis",
}
"""Class → text, in the published order."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "stroke": ("Normal", "Stroke"),
    "glioma": ("Normal", "Glioma"),
    "meningioma": ("Normal", "Meningioma"),
    "metastasis": ("Normal", "Metastasis"),
    "tumour": ("Glioma", "Meningioma", "Metastasis"),
    "disease": tuple(PROMPTS),
}
"""Task → its classes; only studies of these classes take part."""

PUBLISHED_COUNTS = {
    "pub_brain_5": {"Normal": 3984, "Stroke": 2871, "Glioma": 1614, "Meningioma": 1141, "Metastasis": 8733},
    "pub_brain_5_gt": {"Normal": 3984, "Stroke": 2372, "Glioma": 1350, "Meningioma": 1000, "Metastasis": 238},
}

_PREFIXES = ("data/pub_brain_5/", "pub_brain_5/", "")


def study_path(text: str) -> str:
    """Path of a study below pub_brain_5/, such as stroke/sub-0a1b2c3d, from the label file's rooted path.

    Raises:
        ValueError: empty, or leading out of the folder.
    """
    path = text.strip().lstrip("/")
    for prefix in _PREFIXES[:2]:
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or "\\" in path:
        raise UserError(f"{text!r}; expected a path such as /data/pub_brain_5/stroke/sub-0a1b2c3d")
    return "/".join(parts)


def read_labels(path: str | Path) -> LabelTable:
    """One-hot labels by study path.

    Raises:
        FileNotFoundError, ValueError: see `read_label_csv`; also a row without exactly one class.
    """
    table = read_label_csv(
        path, id_columns=["study"], class_columns={name: name for name in PROMPTS}, normalise_id=study_path
    )
    wrong = np.flatnonzero((table.labels_NC.sum(1) != 1) | (table.labels_NC < 0).any(1))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{path}: study {table.ids[row]!r}: labels {table.labels_NC[row].tolist()} for {', '.join(PROMPTS)}; "
            "expected exactly one 1"
        )
    return table


def series_name(scan: Path) -> str:
    """AX_ and what follows the last hyphen of the file's stem, the whole stem without one (as published)."""
    return "AX_" + scan.stem.rsplit("-", 1)[-1]


def find_data_folder(data_dir: Path, studies: list[str]) -> Path:
    """The folder pub_brain_5 of a download, given itself, its parent, or the folder that holds data/pub_brain_5.

    Raises:
        FileNotFoundError: none of the studies is in any of these.
    """
    for prefix in _PREFIXES:
        folder = data_dir / prefix
        if any((folder / study).is_dir() for study in studies):
            return folder
    raise MissingFileError(
        f"{data_dir}: none of the {len(studies):,} listed studies ({studies[0]}, …) is in it, in pub_brain_5/ or in "
        "data/pub_brain_5/ below it; give the folder that holds pub_brain_5 (--data-dir)"
    )


def open_pub_brain_5(
    labels_csv: str | Path, data_dir: str | Path, *, protocol: Protocol = "corrected", allow_missing: bool = False
) -> LabelledStudies:
    """Pub-Brain-5 or its subset with lesion annotation, whichever the label file lists.

    A study whose folder holds no `.pt` file is left out, as published.
    "published" reads every file as grey values 0…255, which makes files of 0…1 almost constant; "corrected" detects
    the range of each file.

    Raises:
        FileNotFoundError: no label file, no data folder, or missing studies without allow_missing.
        ValueError: a label file that is none.
    """
    table = read_labels(labels_csv)
    folder = find_data_folder(Path(data_dir).expanduser(), table.ids)
    found: list[Study | None] = []
    empty: list[int] = []
    for row, study in enumerate(table.ids):
        # Hidden files are no scans: some systems leave them beside every file they copy.
        scans = [scan for scan in visible_entries(folder / study) if scan.suffix == ".pt"]
        if not scans and (folder / study).is_dir():
            empty.append(row)
        found.append(Study(study, tuple(SeriesFile(series_name(scan), scan) for scan in scans)) if scans else None)
    excluded = {table.ids[row]: "its folder holds no .pt file" for row in empty}
    kept = [row for row in range(len(table)) if row not in set(empty)]
    benchmark = assemble(
        name=Path(labels_csv).stem,
        protocol=protocol,
        table=table.rows(kept),
        prompts=tuple(PROMPTS.values()),
        found=[found[row] for row in kept],
        allow_missing=allow_missing,
        looked_in=folder,
    )
    benchmark.excluded = excluded
    benchmark.reader = BrainReader("resample", grey_range="0-255" if protocol == "published" else None)
    if protocol == "published":
        benchmark.notes.append("published protocol: grey values read as 0…255 whatever they are")
    return benchmark


# --- the benchmark ----------------------------------------------------------------------------------------------------

MEASURES = {
    "balanced_accuracy": "bal. acc.",
    "f1": "F1",
    "recall": "recall",
    "precision": "precision",
    "auc": "AUC",
}
"""Name in results → heading."""


@dataclass(frozen=True, kw_only=True)
class PubBrain5Options(StudyOptions):
    """Zero-shot classification on Pub-Brain-5: four diseases against normal, three tumours, five groups."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = Path("pub_brain_5.csv")
    """pub_brain_5.csv or pub_brain_5_gt.csv, also looked for in --data-dir and the folder above."""

    family: ClassVar[str] = "pub_brain_5"

    def read(self) -> LabelledStudies:
        """Pub-Brain-5, or its subset with lesion annotation."""
        if any(self.data_dir.expanduser().glob("CQ500CT*")):
            raise UserError(f"{self.data_dir} holds CQ500 studies; they are evaluated by zero_shot_cq500.py")
        labels = find_labels(self.labels, ["pub_brain_5.csv"], self.data_dir)
        return open_pub_brain_5(labels, self.data_dir, protocol=self.protocol, allow_missing=self.allow_missing)

    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """All measures of the six tasks."""
        metrics: dict[str, float] = {}
        sizes: dict[str, int] = {}
        for task, names in TASKS.items():
            columns = [classes.index(name) for name in names]
            rows = labels_NC[:, columns].max(1) == 1
            measured = task_measures(scores_NC[rows][:, columns], labels_NC[rows][:, columns].argmax(1))
            metrics |= {f"{task}/{name}": value for name, value in measured.items()}
            sizes[task] = int(rows.sum())
        if not metrics:
            raise UserError("no task has studies of all its classes, so nothing can be measured")
        facts = {
            "studies_per_task": sizes,
            "undefined_tasks": [task for task in TASKS if f"{task}/auc" not in metrics],
            "averaging": "f1 weighted by class; recall and precision of the disease in 2-way tasks, else the mean over "
            "classes; auc of the disease, else the mean of one class against the rest",
        }
        return Measures(metrics, facts, _table(metrics, sizes))


def task_measures(scores_NC: np.ndarray, truth_N: np.ndarray) -> dict[str, float]:
    """Measures of one task (scikit-learn); empty when a class has no study.

    Class probabilities are a softmax over the task's scores, without a temperature; the prediction is the largest.

    Args:
        scores_NC: scores of the task's C classes; of two, the second is the disease.
        truth_N: class numbers.
    """
    # Here, because importing it takes a second that most users don't need.
    from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

    C = scores_NC.shape[1]
    if set(truth_N.tolist()) != set(range(C)):
        return {}
    probabilities_NC = torch.from_numpy(scores_NC).softmax(1).numpy()
    predicted_N = scores_NC.argmax(1)
    average = "binary" if C == 2 else "macro"
    if C == 2:
        auc = roc_auc_score(truth_N, probabilities_NC[:, 1])
    else:
        auc = roc_auc_score(truth_N, probabilities_NC, multi_class="ovr", average="macro")
    return {
        "balanced_accuracy": float(balanced_accuracy_score(truth_N, predicted_N)),
        "f1": float(f1_score(truth_N, predicted_N, average="weighted", zero_division=0)),
        "recall": float(recall_score(truth_N, predicted_N, average=average, zero_division=0)),
        "precision": float(precision_score(truth_N, predicted_N, average=average, zero_division=0)),
        "auc": float(auc),
    }


def _table(metrics: dict[str, float], sizes: dict[str, int]) -> Table:
    title = "Pub-Brain-5, in percent; F1 weighted by class"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("task", no_wrap=True)
    for heading in ("classes", "studies", *MEASURES.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, names in TASKS.items():
        known = f"{task}/auc" in metrics
        shown = [f"{100 * metrics[f'{task}/{name}']:.1f}" for name in MEASURES] if known else ["undefined"]
        table.add_row(task, str(len(names)), f"{sizes[task]:,}", *shown)
    return table
