"""Zero-shot classification: which class text fits the image, by TCSim or by global features (paper: inference).

Axes: N images, C classes, B images of a batch, D joint width.

A class may have several prompts: their features are normalised, averaged and normalised again, before the head.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from itemizedclip.data.batch import BadSampleError, Tokenizer
from itemizedclip.evaluation.cases import CaseScores
from itemizedclip.evaluation.encoding import (
    EncodingOptions,
    ImageBatch,
    encode_images,
    encode_texts,
    evaluation_mode,
    model_device,
    number_texts,
)
from itemizedclip.evaluation.evaluator import ItemDataset, facts_of_unusable, joined_unusable, parts_of, sample_id_of
from itemizedclip.evaluation.intervals import Resampling, case_resampling
from itemizedclip.evaluation.ranks import top_k_table
from itemizedclip.evaluation.scores import ScoreStore, StoredScores
from itemizedclip.evaluation.tcsim import Scoring, create_scorer
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.runtime.collectives import gather_objects, gather_rows, rank
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.logs import OnProgress
from itemizedclip.runtime.processes import on_main

logger = logging.getLogger(__name__)

TOP_CUTOFFS = (1, 5)
"""k of the top-k accuracies."""

CLASS_SLOT = "{class}"
"""What a template holds in place of the class name."""


@dataclass(frozen=True)
class ClassPrompts:
    """C classes, each with one or more prompts.

    Raises ValueError when lengths differ, a class has no prompt, or two classes share a name.
    """

    names: Sequence[str]
    prompts: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.prompts):
            raise UserError(f"{len(self.names)} class names, {len(self.prompts)} lists of prompts; expected one each")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"class names must differ, got {list(self.names)}")
        for name, prompts in zip(self.names, self.prompts):
            if isinstance(prompts, str) or not prompts:
                raise UserError(f"class {name!r}: expected a list of at least one prompt, got {prompts!r}")

    @classmethod
    def from_templates(cls, names: Sequence[str], templates: Sequence[str]) -> ClassPrompts:
        """Every template filled with every name, such as "there is {class}".

        Raises ValueError for a template without {class}.
        """
        for template in templates:
            if CLASS_SLOT not in template:
                raise UserError(f"template {template!r} lacks {CLASS_SLOT}, the place of the class name")
        return cls(tuple(names), [[template.replace(CLASS_SLOT, name) for template in templates] for name in names])

    @property
    def sha256(self) -> str:
        """Fingerprint of names and prompts, for result files."""
        plain = [list(self.names), [list(prompts) for prompts in self.prompts]]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


@torch.no_grad()
def class_features(model: DualEncoder, tokenizer: Tokenizer, classes: ClassPrompts, options: EncodingOptions) -> Tensor:
    """One unit vector per class (C, D), float32, on every rank: the normalised mean of the prompts' unit vectors."""
    texts, numbers = number_texts([prompt for prompts in classes.prompts for prompt in prompts])
    features_UD = F.normalize(encode_texts(model, tokenizer, texts, options), dim=-1)
    per_class = features_UD[numbers.to(features_UD.device)].split([len(prompts) for prompts in classes.prompts])
    return F.normalize(torch.stack([features.mean(0) for features in per_class]), dim=-1)


class ZeroShotClassifier:
    """Scores images with classes; texts are encoded once.

    Args:
        model: in eval mode and on its device; all ranks must build the classifier together.
        tokenizer: texts → int64 (M, C).
        classes: names and prompts.
        scoring: "tcsim" or "global".
        normalise_tokens: the published zero-shot evaluations do; see `TcsimScorer`.
        options: text batch size and precision of the text tower.
        score_dtype: precision of scoring.
    """

    def __init__(
        self,
        model: DualEncoder,
        tokenizer: Tokenizer,
        classes: ClassPrompts,
        *,
        scoring: Scoring = "tcsim",
        normalise_tokens: bool = True,
        options: EncodingOptions | None = None,
        score_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.classes = classes
        features_CD = class_features(model, tokenizer, classes, options or EncodingOptions())
        self._scorer = create_scorer(
            model.head, features_CD, scoring, normalise_tokens=normalise_tokens, dtype=score_dtype
        )

    def score(self, features: ImageFeatures) -> Tensor:
        """Scores (B, C), float32."""
        return self._scorer.score(features)


@dataclass
class ClassEvaluator(ABC):
    """Scores of images with classes, and what is measured of them.

    Attributes:
        dataset: images; items are not used.
        tokenizer: texts → int64 (M, C).
        classes: names and prompts.
        labels: see the subclass; the first len(labels) images are evaluated.
        name: prefix for logs.
        scorings: one or both of "tcsim" and "global"; with both, every measure is prefixed "tcsim/" or "global/" and
            images are encoded once.
        normalise_tokens: the published zero-shot evaluations do; see `TcsimScorer`.
        encoding: batch sizes, workers, precision of the towers, what to do about images that cannot be used.
        score_dtype: precision of scoring.
        store: keeps the scores of each image as soon as they are known; an evaluation that was stopped goes on. An
            image that cannot be used then ends the evaluation when the others have been scored.
        unit: what the images are called in messages.
        patients: whose each image of the data set is; None: each stands for itself. Intervals are taken by patient.
        on_progress: called after each batch.
        facts: after `run`: numbers of images and classes, prompts and their fingerprint, scoring.
        cases: after `run`: scores and labels by image, of the first scoring.
        rows: after `scores`: N images that have scores.
        unusable: after `scores`: row → why an image was left out.
        skipped: after `scores`: why parts of images that were scored now could not be used.
    """

    dataset: ItemDataset
    tokenizer: Tokenizer
    classes: ClassPrompts
    labels: Any
    name: str = "zero_shot"
    scorings: Sequence[Scoring] = ("tcsim",)
    normalise_tokens: bool = True
    encoding: EncodingOptions = field(default_factory=EncodingOptions)
    score_dtype: torch.dtype = torch.float32
    store: ScoreStore | None = None
    unit: str = "images"
    patients: Sequence[str] | None = None
    on_progress: OnProgress | None = None
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    cases: CaseScores | None = field(default=None, init=False)
    rows: list[int] = field(default_factory=list, init=False)
    unusable: dict[int, str] = field(default_factory=dict, init=False)
    skipped: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.labels) <= len(self.dataset):
            raise UserError(
                f"{self.name}: {len(self.labels)} labels for {len(self.dataset)} images; expected one label per image, "
                "at least one and no more than images"
            )
        if not self.scorings or len(set(self.scorings)) != len(self.scorings):
            raise UserError(f"{self.name}: scorings are {list(self.scorings)}; expected tcsim, global or both")
        self.rows = list(range(len(self.labels)))

    def run(self, model: DualEncoder) -> dict[str, float]:
        """The measures, the same on every rank; all ranks must call it.

        Raises:
            BadSampleError: images that cannot be used, see `EncodingOptions.on_bad_sample`.
            ValueError: scores that are not finite, or labels of which nothing can be measured.
        """
        table: dict[str, float] = {}
        for scoring, scores_NC in self.scores(model).items():
            self._check_finite(scores_NC)
            if scoring == self.scorings[0]:
                self.cases = self._cases(scores_NC)
            prefix = f"{scoring}/" if len(self.scorings) > 1 else ""
            table |= {prefix + key: value for key, value in self.measures(scores_NC).items()}
        return table

    @torch.no_grad()
    def scores(self, model: DualEncoder) -> dict[Scoring, Tensor]:
        """Scores (N, C) of the images `rows` by kind, float32 on the CPU, on every rank."""
        device, C = model_device(model), len(self.classes.names)
        known = self._known()
        unusable: dict[int, str] = {}
        # With a store the others are scored first, so that nothing is computed twice.
        encoding = self.encoding if self.store is None else replace(self.encoding, on_bad_sample="skip")
        self.skipped = []
        with evaluation_mode(model), self._keeping() as keep:
            classifiers = [
                ZeroShotClassifier(
                    model,
                    self.tokenizer,
                    self.classes,
                    scoring=scoring,
                    normalise_tokens=self.normalise_tokens,
                    options=self.encoding,
                    score_dtype=self.score_dtype,
                )
                for scoring in self.scorings
            ]
            rows = [torch.empty(0, dtype=torch.int64, device=device)]
            scores = [torch.empty((0, len(classifiers) * C), device=device)]
            for batch in encode_images(
                model,
                self.dataset,
                encoding,
                rows=range(len(self.labels)),
                known=known,
                unusable=unusable,
                on_progress=self.on_progress,
            ):
                rows.append(batch.rows_B)
                scores.append(torch.cat([classifier.score(batch.features) for classifier in classifiers], dim=1))
                keep(batch, scores[-1])
                self.skipped += [message for messages in batch.skipped for message in messages]
        self.skipped = [message for share in gather_objects(self.skipped) for message in share]
        self.unusable = joined_unusable(self, unusable, len(self.labels))
        on_main(self._check_unusable)
        stored = torch.tensor(list(known.values()), dtype=torch.float32).reshape(len(known), len(classifiers) * C)
        rows_N = torch.cat([gather_rows(torch.cat(rows)).cpu(), torch.tensor(list(known), dtype=torch.int64)])
        scores_N = torch.cat([gather_rows(torch.cat(scores)).cpu(), stored])
        order_N = rows_N.argsort()
        self.rows = rows_N[order_N].tolist()
        self.facts |= {
            "num_images": len(self.rows),
            "num_classes": C,
            "prompts": {name: list(prompts) for name, prompts in zip(self.classes.names, self.classes.prompts)},
            "prompts_sha256": self.classes.sha256,
            "scoring": list(self.scorings),
            "normalise_tokens": "tcsim" in self.scorings and self.normalise_tokens,
            **facts_of_unusable(self.dataset, self.unusable),
        }
        return dict(zip(self.scorings, scores_N[order_N].split(C, dim=1)))

    @abstractmethod
    def measures(self, scores_NC: Tensor) -> dict[str, float]:
        """The measures of one score matrix, of the images `rows`."""

    @abstractmethod
    def label_matrix(self) -> np.ndarray:
        """float64 (images of the data set, C): 1, 0, or NaN where unknown."""

    @property
    def one_each(self) -> bool:
        """Whether every image has exactly one class."""
        return False

    @property
    def resampling(self) -> Resampling | None:
        """After `run` with one scoring: how its measures follow from the images."""
        return case_resampling(self.cases) if self.cases is not None and len(self.scorings) == 1 else None

    def patient_names(self) -> list[str]:
        """Whose each labelled image is."""
        if self.patients is not None:
            return list(self.patients[: len(self.labels)])
        return [sample_id_of(self.dataset, row) for row in range(len(self.labels))]

    def _cases(self, scores_NC: Tensor) -> CaseScores:
        names = [sample_id_of(self.dataset, row) for row in self.rows]
        if len(set(names)) < len(names):
            names = [f"{name} ({row})" for name, row in zip(names, self.rows)]
        patients = self.patient_names()
        return CaseScores(
            tuple(names),
            tuple(patients[row] for row in self.rows),
            tuple(self.classes.names),
            scores_NC.double().numpy(),
            self.label_matrix()[self.rows],
            self.one_each,
        )

    def _known(self) -> Mapping[int, list[float]]:
        """Row → scores of an earlier evaluation, on every rank."""
        store = self.store
        return {} if store is None else on_main(lambda: self._taken_over(store))

    def _taken_over(self, store: ScoreStore) -> dict[int, list[float]]:
        found = store.take_over()
        known = {}
        for row in range(len(self.labels)):
            entry = found.get(sample_id_of(self.dataset, row))
            if entry is not None and not entry.skipped and entry.parts == parts_of(self.dataset, row):
                known[row] = entry.scores
        if known:
            logger.info("%d of %d %s were scored before (%s)", len(known), len(self.labels), self.unit, store.path(0))
        return known

    @contextmanager
    def _keeping(self) -> Iterator[Callable[[ImageBatch, Tensor], None]]:
        """What puts the scores of a batch into the store, if there is one."""
        if self.store is None:
            yield lambda batch, scores: None
            return
        with self.store.appending(rank()) as writer:

            def keep(batch: ImageBatch, scores: Tensor) -> None:
                self._check_finite(scores)
                writer.add(
                    StoredScores(sample_id_of(self.dataset, row), parts_of(self.dataset, row), skipped, own)
                    for row, skipped, own in zip(batch.rows_B.tolist(), batch.skipped, scores.tolist())
                )

            yield keep

    def _check_finite(self, scores: Tensor) -> None:
        if not torch.isfinite(scores).all():
            raise UserError(
                f"{self.name}: scores are not finite: check the weights (--resume) and use --precision fp32"
            )

    def _check_unusable(self) -> None:
        if self.unusable and self.encoding.on_bad_sample == "stop" and self.store is not None:
            raise BadSampleError(
                f"{len(self.unusable):,} of {len(self.labels):,} {self.unit} cannot be read, the first: "
                f"{next(iter(self.unusable.values()))}. The scores of the others are kept in {self.store.folder}: mend "
                f"these {self.unit}, or leave them out with --on-bad-sample skip, and go on"
            )


@dataclass
class SingleLabelEvaluator(ClassEvaluator):
    """One true class per image: top-1, top-5 and mean rank of the true class (from 1, ties by mid-rank).

    `labels`: N class numbers 0 … C − 1.
    """

    labels: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        C = len(self.classes.names)
        wrong = [label for label in self.labels if not 0 <= label < C]
        if wrong:
            raise UserError(f"{self.name}: labels must be 0 … {C - 1} for {C} classes, got {wrong[0]}")

    @property
    def one_each(self) -> bool:
        """See `ClassEvaluator`."""
        return True

    def label_matrix(self) -> np.ndarray:
        """See `ClassEvaluator`."""
        return np.eye(len(self.classes.names))[list(self.labels)]

    def measures(self, scores_NC: Tensor) -> dict[str, float]:
        """`top1`, `top5`, `mean_rank`."""
        labels_N = torch.as_tensor(self.labels)[self.rows]
        return top_k_table(class_ranks(scores_NC, labels_N), TOP_CUTOFFS)


@dataclass
class MultiLabelEvaluator(ClassEvaluator):
    """Any number of true classes per image: AUC of each class and their mean.

    `labels`: (N, C) of 0, 1, or NaN for unknown; unknown entries are left out of their class. A class whose known
    labels are all alike has no AUC: it is left out of the mean and named in `facts["undefined_classes"]`.
    """

    labels: Any

    def __post_init__(self) -> None:
        self.labels = np.asarray(self.labels, dtype=np.float64)
        C = len(self.classes.names)
        if self.labels.ndim != 2 or self.labels.shape[1] != C:
            raise UserError(f"{self.name}: labels must be (images, {C} classes), got {self.labels.shape}")
        if not (np.isin(self.labels, (0, 1)) | np.isnan(self.labels)).all():
            raise UserError(f"{self.name}: labels must be 0, 1 or NaN (unknown)")
        super().__post_init__()

    def label_matrix(self) -> np.ndarray:
        """See `ClassEvaluator`."""
        labels: np.ndarray = self.labels
        return labels

    def measures(self, scores_NC: Tensor) -> dict[str, float]:
        """`macro_auc` and `auc/<class>` of every class that has one."""
        per_class = class_aucs(scores_NC, self.labels[self.rows])
        known = {name: auc for name, auc in zip(self.classes.names, per_class) if auc is not None}
        self.facts["undefined_classes"] = [name for name in self.classes.names if name not in known]
        if not known:
            raise UserError(f"{self.name}: no class has both positive and negative images, so no AUC exists")
        return {"macro_auc": float(np.mean(list(known.values())))} | {f"auc/{name}": auc for name, auc in known.items()}


def class_ranks(scores_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Rank of each image's true class: 1 + larger scores + half of the other equal ones; float64 (N,)."""
    true_N1 = scores_NC.gather(1, labels_N[:, None].long())
    larger, equal = (scores_NC > true_N1).sum(1), (scores_NC == true_N1).sum(1) - 1
    return 1 + larger.double() + equal.double() / 2


def class_aucs(scores_NC: Tensor, labels_NC: np.ndarray) -> list[float | None]:
    """Area under the ROC curve of each class (scikit-learn), None where it is undefined; NaN labels are left out."""
    scores = scores_NC.double().numpy()
    aucs: list[float | None] = []
    for column in range(scores.shape[1]):
        known = ~np.isnan(labels_NC[:, column])
        labels = labels_NC[known, column]
        aucs.append(float(roc_auc_score(labels, scores[known, column])) if len(np.unique(labels)) == 2 else None)
    return aucs
