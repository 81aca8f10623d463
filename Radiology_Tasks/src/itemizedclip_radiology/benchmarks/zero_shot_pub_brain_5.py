"""Zero-shot classification of brain MRI studies: Pub-Brain-5 and Pub-Brain-5-gt.

    python3 zero_shot_pub_brain_5.py --resume epoch_24.pt --input-filename pub_brain_5.csv --data-dir DIR
    python3 zero_shot_pub_brain_5.py --resume epoch_24.pt --input-filename pub_brain_5_gt.csv --data-dir DIR
    torchrun --nproc_per_node 8 -- zero_shot_pub_brain_5.py …          the same numbers

DIR holds pub_brain_5/. Both sets share their scores: the second one evaluated with a checkpoint takes seconds.

Axes: N studies, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score, roc_auc_score

from itemizedclip.runtime.errors import UserError
from itemizedclip_radiology.benchmarks.benchmark import Benchmark
from itemizedclip_radiology.benchmarks.pub_brain_5 import TASKS, open_pub_brain_5
from itemizedclip_radiology.benchmarks.zero_shot import Measures, ZeroShotOptions, find_labels, parse_and_evaluate

DESCRIPTION = "Zero-shot classification on Pub-Brain-5: four diseases against normal, three tumours, five groups."

MEASURES = {
    "balanced_accuracy": "bal. acc.",
    "f1": "F1",
    "recall": "recall",
    "precision": "precision",
    "auc": "AUC",
}
"""Name in results → heading."""


@dataclass(frozen=True, kw_only=True)
class PubBrain5Options(ZeroShotOptions):
    """Zero-shot classification on Pub-Brain-5."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = Path("pub_brain_5.csv")
    """pub_brain_5.csv or pub_brain_5_gt.csv, also looked for in --data-dir and the folder above."""

    family: ClassVar[str] = "pub_brain_5"

    def open(self) -> Benchmark:
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


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line."""
    return parse_and_evaluate(PubBrain5Options, argv, prog="zero_shot_pub_brain_5.py", description=DESCRIPTION)
