"""Zero-shot evaluation of studies: what Pub-Brain-5, RSNA, CQ500, CT-RATE and Rad-ChestCT have in common.

A study's score for a class is TCSim of the class's text with the study's image tokens, which are L2-normalised before
the head. Scores are kept study by study (`itemizedclip.evaluation.scores`), so that an evaluation that was stopped goes
on where it was.

Axes: N studies, C classes, M missing studies.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from itemizedclip.evaluation.benchmark import Benchmark, BenchmarkOptions, Subject
from itemizedclip.evaluation.classification import ClassEvaluator, class_aucs
from itemizedclip.evaluation.results import Protocol, format_measure
from itemizedclip.evaluation.scores import ScoreStore
from itemizedclip.models.factory import LoadedModel
from itemizedclip.runtime.errors import MissingFileError, UserError
from itemizedclip.runtime.processes import on_main
from itemizedclip_radiology.benchmarks.labelled_studies import LabelledStudies

logger = logging.getLogger(__name__)

_SCORES_VERSION = 1
"""Part of the key of every scores file; to be raised when scores change for a reason the key does not show."""


@dataclass(frozen=True)
class Measures:
    """What comes of scores and labels.

    Attributes:
        metrics: name → value.
        facts: how they were taken, for the result file.
        table: for people.
        figures: part of the file name → picture, written beside the result file.
    """

    metrics: dict[str, float]
    facts: dict[str, Any]
    table: Table
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass
class StudyEvaluator(ClassEvaluator):
    """Zero-shot classes of labelled studies, measured as a benchmark does.

    `dataset`: the studies. `labels`: int8 (N, C), −1 where not rated. `measure`: scores (N, C), labels and study ids →
    measures; it runs on the main rank alone, where `measured` keeps what it gave and `facts` say how.
    """

    dataset: LabelledStudies
    unit: str = "studies"
    measure: Callable[[np.ndarray, np.ndarray, Sequence[str]], Measures] = field(kw_only=True)
    measured: Measures | None = field(default=None, init=False)

    def label_matrix(self) -> np.ndarray:
        """See `ClassEvaluator`."""
        return self.dataset.known_labels_NC

    def measures(self, scores_NC: Tensor) -> dict[str, float]:
        """What the benchmark measures."""
        return on_main(lambda: self._measured(scores_NC).metrics)

    def _measured(self, scores_NC: Tensor) -> Measures:
        studies = self.dataset
        scores, labels, ids = self._scores_and_labels(scores_NC)
        self.measured = self.measure(scores, labels, ids)
        self.facts = {
            "num_studies": len(self.rows),
            "studies_per_class": {name: int((labels[:, c] == 1).sum()) for c, name in enumerate(studies.classes)},
            "prompts": dict(zip(studies.classes, studies.prompts)),
            "normalise_tokens": self.normalise_tokens,
            "volume_size": list(studies.size),
            "missing": studies.missing,
            "missing_scored_zero": len(ids) > len(self.rows),
            "unusable": {studies.sample_id(row): why for row, why in self.unusable.items()},
            "excluded": studies.excluded,
            "num_unlisted": len(studies.unlisted),
            "skipped_series": self.skipped,
            "notes": studies.notes,
            **self.measured.facts,
        }
        return self.measured

    def _scores_and_labels(self, scores_NC: Tensor) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Scores float64 (N, C), labels int8 (N, C) and ids of what is measured, in the order of the label file.

        Where the protocol says so, studies that are missing or cannot be read follow, with score 0.
        """
        studies, absent = self.dataset, list(self.unusable)
        scores, labels = scores_NC.double().numpy(), self.labels[self.rows]
        ids = [studies.sample_id(row) for row in self.rows]
        if studies.missing_score_zero and (studies.missing or absent):
            zeros = [studies.labels_NC[absent]] + ([studies.missing_labels_MC] if studies.missing else [])
            labels_MC = np.concatenate(zeros)
            scores = np.concatenate([scores, np.zeros(labels_MC.shape)])
            labels = np.concatenate([labels, labels_MC])
            ids += [studies.sample_id(row) for row in absent] + studies.missing
        return scores, labels, ids


@dataclass(frozen=True, kw_only=True)
class StudyOptions(BenchmarkOptions):
    """What the evaluations of studies are asked for."""

    data_dir: Annotated[Path, tyro.conf.arg(aliases=("--data-root",))]
    """Folder that holds the studies."""

    labels: Annotated[Path | None, tyro.conf.arg(aliases=("--input-filename",))] = None
    """CSV of labels, also looked for in --data-dir and the folder above."""

    protocol: Protocol = "corrected"
    """published: reproduce known defects of the published evaluation, to compare with its numbers."""

    allow_missing: bool = False
    """Go on without listed studies that are not on disk or cannot be read; otherwise they are an error."""

    model: str | None = "HLIPSN_BiomedBERT_81616_itemizedclip"
    """Config of a released checkpoint; checkpoints of runs carry their own."""

    use_serienames: bool = True
    """Accepted for published commands; whether the model reads series names is part of its config."""

    batch_size: int = 1
    """Studies per forward pass and process; those with as many series as each other are encoded together."""

    on_bad_sample: Literal["skip", "stop"] = "stop"
    """A study that cannot be read is left out, named and counted, or ends the evaluation once the others are scored."""

    output: Path | None = None
    """Folder of results and scores; default: beside the checkpoint, named after it and the benchmark."""

    resume_scores: bool = True
    """Take over scores of an evaluation with the same weights, texts and settings; otherwise score all anew."""

    family: ClassVar[str] = ""
    """Ending of the output folder's name."""

    @abstractmethod
    def read(self) -> LabelledStudies:
        """The benchmark's studies and labels; only the main rank calls it.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, in one sentence.
        """

    def fit_to_model(self, studies: LabelledStudies, loaded: LoadedModel) -> LabelledStudies:
        """The studies as this model takes them; every rank calls it.

        Raises:
            ValueError: a model for other studies.
        """
        vision = loaded.config["vision_cfg"]
        names = bool(vision.get("series_names", False))
        if names and not self.use_serienames:
            raise UserError(f"{self.checkpoint}: its model reads series names; drop --no-use-serienames")
        d, h, w = vision["volume_size"]
        return replace(studies, size=(d, h, w), series_names=names)

    def patient_of(self, study_id: str) -> str:
        """Whose a study is, for intervals and calibration; the study itself where its name does not say."""
        return study_id

    @abstractmethod
    def measure(
        self, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str], studies: Sequence[str]
    ) -> Measures:
        """The benchmark's measures; `studies` are the N ids."""

    def open(self, subject: Subject) -> Benchmark:
        """Studies, labels and texts, and the scores that are known of them."""
        loaded = subject.loaded
        if loaded.config["vision_cfg"].get("tower") != "hlip":
            raise UserError(
                f"{self.checkpoint}: its model takes no studies; give one of train_mri, train_ct, train_ctrate"
            )
        studies = self.fit_to_model(on_main(self._read), loaded)
        classes = studies.class_prompts
        depends_on = {"data_dir": str(self.data_dir.expanduser().resolve()), "reader": studies.reader.facts()}
        key = {
            "version": _SCORES_VERSION,
            "model_config": loaded.config,
            "classes": classes.sha256,
            **subject.identity,
            **depends_on,
        }
        folder = self.output or self.checkpoint.with_suffix(f".zero_shot_{self.family}")
        store = ScoreStore(folder, key, studies.classes, anew=not self.resume_scores)
        skip = self.allow_missing or self.on_bad_sample == "skip"
        evaluator = StudyEvaluator(
            studies,
            loaded.tokenizer,
            classes,
            studies.labels_NC,
            name=studies.name,
            encoding=replace(subject.encoding, on_bad_sample="skip" if skip else "stop"),
            store=store,
            patients=[self.patient_of(study.study_id) for study in studies.studies],
            measure=lambda scores_NC, labels_NC, ids: self.measure(scores_NC, labels_NC, studies.classes, ids),
        )

        def measured() -> Measures:
            assert evaluator.measured is not None  # asked for after the run
            return evaluator.measured

        published = ".published" if self.protocol == "published" else ""
        return Benchmark(
            name=studies.name,
            evaluator=evaluator,
            results=folder / f"{studies.name}{published}.results.json",
            facts=lambda: {"scores": store.path(0).name, **depends_on},
            table=lambda metrics: measured().table,
            protocol=studies.protocol,
            missing=studies.missing,
            figures=lambda: measured().figures,
        )

    def _read(self) -> LabelledStudies:
        if not self.data_dir.expanduser().is_dir():
            raise MissingFileError(f"{self.data_dir}: no such folder; expected the benchmark's studies (--data-dir)")
        studies = self.read()
        logger.info(studies.describe())
        return studies


def finding_measures(title: str, scores_NC: np.ndarray, labels_NC: np.ndarray, classes: Sequence[str]) -> Measures:
    """AUC of each finding and their mean; unrated studies do not count for a finding.

    Raises:
        ValueError: no finding has studies with and without it.
    """
    labels = np.where(labels_NC < 0, np.nan, labels_NC.astype(np.float64))
    aucs = class_aucs(torch.from_numpy(scores_NC), labels)
    known = {name: auc for name, auc in zip(classes, aucs) if auc is not None}
    if not known:
        raise UserError(f"{title}: no finding has both studies with and without it, so no AUC exists")
    metrics = {"mean_auc": float(np.mean(list(known.values()))), **{f"auc/{name}": auc for name, auc in known.items()}}
    table = Table(title=f"{title}: {len(scores_NC):,} studies", title_justify="left")
    table.add_column("finding")
    for column in ("with it", "rated", "AUC"):
        table.add_column(column, justify="right", no_wrap=True)
    for c, name in enumerate(classes):
        shown = format_measure("auc", known[name]) if name in known else "undefined"
        positive, rated = int((labels_NC[:, c] == 1).sum()), int((labels_NC[:, c] >= 0).sum())
        table.add_row(name, f"{positive:,}", f"{rated:,}", shown)
    table.add_section()
    table.add_row("mean", "", "", format_measure("auc", metrics["mean_auc"]))
    return Measures(metrics, {"undefined_classes": [name for name in classes if name not in known]}, table)
