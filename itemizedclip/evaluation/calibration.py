"""Trust in a score: probabilities, thresholds and conformal sets of each finding, fitted on patients of their own.

`itemizedclip calibrate` writes calibration.json beside a checkpoint. A score is a cosine and no probability; what is
here turns the score of a known finding, taken as the calibration took it, into

    probability      by isotonic regression (monotone steps) or Platt's sigmoid, both from scikit-learn;
    yes or no        at the largest threshold that keeps a wanted sensitivity on the calibration patients;
    a conformal set  {present}, {absent}, both (undecided) or neither (like neither), which holds the truth with the
                     stated coverage for each of the two truths, when the new patient is drawn as the calibration
                     patients were. Patients may have several cases: each patient weighs 1 / (K + 1), shared among
                     its cases, and 1 / (K + 1) lies at infinity (Lee, Barber and Willett 2023, hierarchical conformal).

Figures about itself (Brier score, calibration error, sensitivity, coverage) are cross-fitted: no patient is measured by
what was fitted on that patient.

Axes: N cases, C findings, K patients.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from itemizedclip.data.batch import Tokenizer
from itemizedclip.evaluation.cases import CaseScores
from itemizedclip.evaluation.classification import ClassPrompts, ZeroShotClassifier
from itemizedclip.evaluation.intervals import Array
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.runtime.errors import UserError, about
from itemizedclip.runtime.fields import (
    Rule,
    check_fields,
    either,
    nothing,
    number,
    one_of,
    plain_object,
    several,
    text,
    true_or_false,
    whole,
)
from itemizedclip.runtime.files import file_sha256, read_json, write_json

logger = logging.getLogger(__name__)

FILE_NAME = "calibration.json"
"""Beside the checkpoint it belongs to."""

FORMAT = 1
HOLDING = "a calibration (itemizedclip calibrate)"

Method = Literal["isotonic", "platt"]
Truth = Literal["present", "absent"]

FOLDS = 5
FOLD_SEED = 0
LEAST_PATIENTS = 5
"""With a finding, and as many without, for it to be calibrated."""

ISOTONIC_FROM = 1000
"""Cases from which on isotonic regression is chosen; with fewer it overfits (scikit-learn's advice)."""

QUANTILES = 21
"""Scores of the calibration cases are kept at as many even shares: 0, 5, …, 100 %."""

ERROR_BINS = 10
"""Of the expected calibration error: as many equally full bins."""


# --- what is kept ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold that keeps a sensitivity.

    Attributes:
        wanted_sensitivity: on the calibration cases.
        threshold: a score of at least this is a yes.
        sensitivity, specificity: cross-fitted; None where folds have no such case.
    """

    wanted_sensitivity: float
    threshold: float
    sensitivity: float | None
    specificity: float | None


@dataclass(frozen=True)
class FindingCalibration:
    """What the scores of one finding mean.

    Attributes:
        name: of the finding.
        prompts: its texts; several are averaged as `class_features` does.
        num_positive, num_negative: calibration cases.
        method: of `probability`.
        scores, probabilities: knots of isotonic regression, rising; empty with Platt's sigmoid.
        slope, intercept: of Platt's sigmoid: 1 / (1 + exp(−(slope · score + intercept))); 0 with isotonic regression.
        operating_points: one per wanted sensitivity.
        present_from: scores of at least this have "present" in their conformal set; None: all have.
        absent_to: scores of at most this have "absent" in it; None: all have.
        quality: cross-fitted Brier score, expected calibration error, coverage by truth, share of undecided cases.
        present_scores, absent_scores: of the calibration cases with and without it, at `QUANTILES` even shares from the
            lowest to the highest; empty in files made before they were kept.
    """

    name: str
    prompts: tuple[str, ...]
    num_positive: int
    num_negative: int
    method: Method
    scores: tuple[float, ...]
    probabilities: tuple[float, ...]
    slope: float
    intercept: float
    operating_points: tuple[OperatingPoint, ...]
    present_from: float | None
    absent_to: float | None
    quality: Mapping[str, float]
    present_scores: tuple[float, ...] = ()
    absent_scores: tuple[float, ...] = ()

    def probability(self, scores_N: Array) -> Array:
        """Probability of the finding, (N,), as frequent as it was among the calibration cases."""
        if self.method == "platt":
            return 1 / (1 + np.exp(-np.clip(self.slope * scores_N + self.intercept, -500, 500)))
        return np.interp(scores_N, self.scores, self.probabilities)

    def share_below(self, truth: Truth, score: float) -> float | None:
        """How many of the calibration cases of this truth score lower, 0 … 1; None where that was not kept."""
        scores = self.present_scores if truth == "present" else self.absent_scores
        return float(np.interp(score, scores, np.linspace(0, 1, len(scores)))) if scores else None

    def truths(self, score: float) -> tuple[Truth, ...]:
        """The conformal set of one score."""
        found: list[Truth] = []
        if self.present_from is None or score >= self.present_from:
            found.append("present")
        if self.absent_to is None or score <= self.absent_to:
            found.append("absent")
        return tuple(found)


@dataclass(frozen=True)
class Calibration:
    """Calibrated findings of one checkpoint.

    Attributes:
        checkpoint_sha256: of the file of weights they belong to.
        scoring: "tcsim" or "global".
        normalise_tokens: how scores were taken.
        precision: of the towers, such as "fp32".
        coverage: of the conformal sets, stated.
        evaluation: what was scored, such as "own".
        patients: SHA-256 of each calibration patient's name: whoever evaluates on them is refused.
        findings: the calibrated ones.
        left_out: finding → why it was not calibrated.
    """

    checkpoint_sha256: str
    scoring: Literal["tcsim", "global"]
    normalise_tokens: bool
    precision: str
    coverage: float
    evaluation: str
    patients: tuple[str, ...]
    findings: tuple[FindingCalibration, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def finding(self, wanted: str) -> FindingCalibration | None:
        """The finding of this name, or of this text if it is the only prompt; None where there is none."""
        plain = wanted.strip().casefold()
        for finding in self.findings:
            if plain == finding.name.casefold() or [plain] == [prompt.casefold() for prompt in finding.prompts]:
                return finding
        return None

    def check_patients(self, patients: Sequence[str], *, where: str) -> None:
        """Refuse to be measured on its own patients.

        Raises:
            UserError: some are among them.
        """
        shared = sorted({patient for patient in patients if hashed(patient) in set(self.patients)})
        if shared:
            raise UserError(
                f"{where}: the calibration was fitted on {len(shared):,} of these patients ({', '.join(shared[:3])}"
                f"{', …' if len(shared) > 3 else ''}): evaluate on others, or without it (--no-use-calibration)"
            )


@dataclass(frozen=True)
class Judgement:
    """What one score says of one finding.

    Attributes:
        score: as the calibration took scores.
        probability: of the finding.
        truths: conformal set: ("present",), ("absent",), both or neither.
        above: wanted sensitivity → whether the score reaches its threshold.
        thresholds: wanted sensitivity → that threshold.
        below: truth → share of the calibration cases of this truth that score lower; without those that are not known.
    """

    score: float
    probability: float
    truths: tuple[Truth, ...]
    above: Mapping[float, bool]
    thresholds: Mapping[float, float] = field(default_factory=dict)
    below: Mapping[Truth, float] = field(default_factory=dict)


def judged(finding: FindingCalibration, score: float) -> Judgement:
    """A score of a finding, with what it means."""
    above = {point.wanted_sensitivity: score >= point.threshold for point in finding.operating_points}
    thresholds = {point.wanted_sensitivity: point.threshold for point in finding.operating_points}
    truths: tuple[Truth, ...] = ("present", "absent")
    below = {truth: share for truth in truths if (share := finding.share_below(truth, score)) is not None}
    probability = float(finding.probability(np.array([score]))[0])
    return Judgement(score, probability, finding.truths(score), above, thresholds, below)


@torch.no_grad()
def judge_images(
    model: DualEncoder,
    tokenizer: Tokenizer,
    calibration: Calibration,
    features: ImageFeatures,
    findings: Sequence[FindingCalibration] | None = None,
) -> list[dict[str, Judgement]]:
    """Findings of B encoded images, scored as the calibration scored its own.

    Args:
        model: in evaluation mode; on the device of the features.
        tokenizer: texts → int64 (M, C).
        calibration: of these weights.
        features: of B images.
        findings: which; None: all calibrated ones.
    """
    chosen = list(calibration.findings if findings is None else findings)
    if not chosen:
        return [{} for _ in features.global_BD]
    classifier = ZeroShotClassifier(
        model,
        tokenizer,
        ClassPrompts([finding.name for finding in chosen], [finding.prompts for finding in chosen]),
        scoring=calibration.scoring,
        normalise_tokens=calibration.normalise_tokens,
    )
    scores_BC = classifier.score(features).cpu().tolist()
    return [{finding.name: judged(finding, score) for finding, score in zip(chosen, row)} for row in scores_BC]


def hashed(patient: str) -> str:
    """What is kept of a patient's name."""
    return hashlib.sha256(patient.encode()).hexdigest()[:32]


# --- files -----------------------------------------------------------------------------------------------------------


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write as JSON; the file appears whole or not at all."""
    write_json(path, {"format": FORMAT, **asdict(calibration)})


_SCORE = number(-1e6, 1e6)
_SHARE = number(0, 1)
_COUNT = whole(0, 10**9)
_TOP: dict[str, Rule] = {
    "format": one_of([FORMAT]),
    "checkpoint_sha256": text(64),
    "scoring": one_of(["tcsim", "global"]),
    "normalise_tokens": true_or_false(),
    "precision": text(64),
    "coverage": _SHARE,
    "evaluation": text(),
    "patients": several(text(32)),
    "findings": several(plain_object()),
    "left_out": plain_object(),
}
_FINDING: dict[str, Rule] = {
    "name": text(),
    "prompts": several(text()),
    "num_positive": _COUNT,
    "num_negative": _COUNT,
    "method": one_of(["isotonic", "platt"]),
    "scores": either(several(_SCORE), Rule("[]", lambda value: value == [])),
    "probabilities": either(several(_SHARE), Rule("[]", lambda value: value == [])),
    "slope": number(-1e9, 1e9),
    "intercept": number(-1e9, 1e9),
    "operating_points": several(plain_object()),
    "present_from": either(_SCORE, nothing()),
    "absent_to": either(_SCORE, nothing()),
    "quality": plain_object(),
}
_KEPT_SCORES: dict[str, Rule] = {
    key: either(several(_SCORE), Rule("[]", lambda value: value == [])) for key in ("present_scores", "absent_scores")
}
_POINT: dict[str, Rule] = {
    "wanted_sensitivity": _SHARE,
    "threshold": _SCORE,
    "sensitivity": either(_SHARE, nothing()),
    "specificity": either(_SHARE, nothing()),
}


def read_calibration(path: str | Path) -> Calibration:
    """A calibration that `write_calibration` wrote.

    Raises:
        MissingFileError: no such file.
        UserError: not such a file; says where and what was expected.
    """
    values = read_json(path, holding=HOLDING)
    with about(path):
        check_fields(values, _TOP, required=_TOP)
        findings = []
        for row, entry in enumerate(values["findings"]):
            place = f"findings[{row}]"
            check_fields(entry, _FINDING | _KEPT_SCORES, place=place, required=_FINDING)
            rising = all(first <= second for first, second in zip(entry["scores"], entry["scores"][1:]))
            if len(entry["scores"]) != len(entry["probabilities"]) or not rising:
                raise UserError(f"{place}: expected as many probabilities as scores, and rising scores")
            if entry["method"] == "isotonic" and not entry["scores"]:
                raise UserError(f"{place}.scores is empty; expected the knots of isotonic regression")
            points = []
            for at, point in enumerate(entry["operating_points"]):
                check_fields(point, _POINT, place=f"{place}.operating_points[{at}]", required=_POINT)
                points.append(OperatingPoint(**point))
            listed = {key: tuple(entry.get(key, ())) for key in ("prompts", "scores", "probabilities", *_KEPT_SCORES)}
            findings.append(FindingCalibration(**{**entry, **listed, "operating_points": tuple(points)}))
        plain = {key: value for key, value in values.items() if key != "format"}
        return Calibration(**{**plain, "patients": tuple(values["patients"]), "findings": tuple(findings)})


def calibration_path(checkpoint: str | Path) -> Path:
    """Where the calibration of a checkpoint lies: calibration.json in its folder."""
    return Path(checkpoint).parent / FILE_NAME


def calibration_beside(checkpoint: str | Path, sha256: str) -> Calibration | None:
    """The calibration of exactly these weights, if there is one beside them.

    One of other weights, such as another epoch of the same run, is passed over with a warning.

    Args:
        checkpoint: file of weights.
        sha256: of that file (`itemizedclip.runtime.files.file_sha256`).

    Raises:
        UserError: a file of that name that is no calibration.
    """
    path = calibration_path(checkpoint)
    if not path.is_file():
        return None
    found = read_calibration(path)
    if found.checkpoint_sha256 != sha256:
        logger.warning("%s: is of other weights than %s and is not used", path, Path(checkpoint).name)
        return None
    return found


def calibration_of(checkpoint: str | Path) -> Calibration | None:
    """The calibration beside a file of weights, whose checksum is taken only where there is one."""
    return calibration_beside(checkpoint, file_sha256(checkpoint)) if calibration_path(checkpoint).is_file() else None


# --- fitting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitSettings:
    """How to calibrate.

    Attributes:
        method: "auto" takes isotonic regression from `ISOTONIC_FROM` cases on, else Platt's sigmoid.
        coverage: of the conformal sets, for each truth.
        sensitivities: of the operating points, each in (0, 1].
    """

    method: Literal["auto", "isotonic", "platt"] = "auto"
    coverage: float = 0.9
    sensitivities: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class _Fitted:
    """What one fit knows; the same for all cases and for all but a fold."""

    method: Method
    scores: Array
    probabilities: Array
    slope: float
    intercept: float
    thresholds: tuple[float, ...]
    present_from: float
    absent_to: float

    def probability(self, scores_N: Array) -> Array:
        if self.method == "platt":
            return 1 / (1 + np.exp(-np.clip(self.slope * scores_N + self.intercept, -500, 500)))
        return np.interp(scores_N, self.scores, self.probabilities)


def platt(scores_N: Array, labels_N: Array) -> tuple[float, float]:
    """Slope and intercept of Platt's sigmoid (1999), with his targets (P + 1) / (P + 2) and 1 / (Q + 2).

    scikit-learn's logistic regression takes the targets as weights of both labels; scores are standardised within.
    """
    P, Q = labels_N.sum(), (1 - labels_N).sum()
    target_N = np.where(labels_N == 1, (P + 1) / (P + 2), 1 / (Q + 2))
    centre, scale = scores_N.mean(), scores_N.std() or 1.0
    standard = np.concatenate([scores_N, scores_N])[:, None]
    labels = np.repeat([1, 0], len(scores_N))
    weights = np.concatenate([target_N, 1 - target_N])
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e12, tol=1e-10, max_iter=1000)
    model.fit((standard - centre) / scale, labels, sample_weight=weights)
    slope = float(model.coef_[0, 0]) / scale
    return slope, float(model.intercept_[0]) - slope * centre


def sensitive_threshold(positive_scores_P: Array, sensitivity: float) -> float:
    """The largest threshold that at least this share of the positives reaches (score ≥ threshold)."""
    needed = max(1, math.ceil(sensitivity * len(positive_scores_P) - 1e-9))
    return float(np.sort(positive_scores_P)[::-1][needed - 1])


def conformal_bound(nonconformity_N: Array, patients_N: Sequence[str], coverage: float) -> float:
    """The value that a new case of a new patient does not exceed with this probability; infinite with few patients.

    Each of K patients weighs 1 / (K + 1), shared among its cases; the new one's share lies at infinity.

    Args:
        nonconformity_N: larger is stranger.
        patients_N: whose each case is.
        coverage: 1 − α.
    """
    names, patient_N, counts_K = np.unique(
        np.asarray(patients_N, dtype=object).astype(str), return_inverse=True, return_counts=True
    )
    weight_N = 1 / ((len(names) + 1) * counts_K[patient_N])
    order = np.argsort(nonconformity_N, kind="stable")
    reached = np.cumsum(weight_N[order])
    at = int(np.searchsorted(reached, coverage - 1e-9))
    return float(nonconformity_N[order][at]) if at < len(order) else math.inf


def _fit(scores_N: Array, labels_N: Array, patients_N: np.ndarray, method: Method, settings: FitSettings) -> _Fitted:
    positive = labels_N == 1
    knots, heights, slope, intercept = np.empty(0), np.empty(0), 0.0, 0.0
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression  # takes a second: only here

        regression = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores_N, labels_N)
        knots, heights = regression.X_thresholds_, regression.y_thresholds_
    else:
        slope, intercept = platt(scores_N, labels_N)
    return _Fitted(
        method, knots, heights, slope, intercept,
        tuple(sensitive_threshold(scores_N[positive], wanted) for wanted in settings.sensitivities),
        -conformal_bound(-scores_N[positive], patients_N[positive].tolist(), settings.coverage),
        conformal_bound(scores_N[~positive], patients_N[~positive].tolist(), settings.coverage),
    )  # fmt: skip


def calibration_error(probabilities_N: Array, labels_N: Array) -> float:
    """Expected calibration error: |mean probability − share of positives| in `ERROR_BINS` equally full bins."""
    parts = np.array_split(np.argsort(probabilities_N, kind="stable"), min(ERROR_BINS, len(labels_N)))
    gaps = [len(part) * abs(probabilities_N[part].mean() - labels_N[part].mean()) for part in parts]
    return float(sum(gaps) / len(labels_N))


def fit_finding(
    name: str,
    prompts: Sequence[str],
    scores_N: Array,
    labels_N: Array,
    patients: Sequence[str],
    settings: FitSettings,
) -> FindingCalibration:
    """Calibrate one finding.

    Args:
        name, prompts: of the finding.
        scores_N: of its rated cases.
        labels_N: 1 or 0.
        patients: whose each case is.
        settings: how.

    Raises:
        UserError: too few patients with or without the finding.
    """
    patients_N = np.asarray(patients, dtype=object).astype(str)
    with_it, without = (len(set(patients_N[labels_N == value].tolist())) for value in (1, 0))
    if min(with_it, without) < LEAST_PATIENTS:
        raise UserError(f"{with_it} patients with it and {without} without; expected at least {LEAST_PATIENTS} of each")
    method: Method = settings.method if settings.method != "auto" else (
        "isotonic" if len(scores_N) >= ISOTONIC_FROM else "platt"
    )  # fmt: skip
    whole = _fit(scores_N, labels_N, patients_N, method, settings)
    from sklearn.model_selection import StratifiedGroupKFold

    fitted, folds = np.full(len(scores_N), np.nan), StratifiedGroupKFold(FOLDS, shuffle=True, random_state=FOLD_SEED)
    yes = np.zeros((len(settings.sensitivities), len(scores_N)), dtype=bool)
    has_present, has_absent = np.zeros(len(scores_N), dtype=bool), np.zeros(len(scores_N), dtype=bool)
    for kept, held_out in folds.split(scores_N, labels_N, patients_N):
        part = _fit(scores_N[kept], labels_N[kept], patients_N[kept], method, settings)
        fitted[held_out] = part.probability(scores_N[held_out])
        yes[:, held_out] = scores_N[held_out] >= np.asarray(part.thresholds)[:, None]
        has_present[held_out] = scores_N[held_out] >= part.present_from
        has_absent[held_out] = scores_N[held_out] <= part.absent_to
    positive = labels_N == 1
    points = tuple(
        OperatingPoint(wanted, threshold, float(own[positive].mean()), float((~own[~positive]).mean()))
        for wanted, threshold, own in zip(settings.sensitivities, whole.thresholds, yes)
    )
    quality = {
        "brier": float(((fitted - labels_N) ** 2).mean()),
        "calibration_error": calibration_error(fitted, labels_N),
        "coverage_present": float(has_present[positive].mean()),
        "coverage_absent": float(has_absent[~positive].mean()),
        "undecided": float((has_present & has_absent).mean()),
        "like_neither": float((~has_present & ~has_absent).mean()),
    }
    return FindingCalibration(
        name,
        tuple(prompts),
        int(positive.sum()),
        int((~positive).sum()),
        method,
        tuple(whole.scores.tolist()),
        tuple(whole.probabilities.tolist()),
        whole.slope,
        whole.intercept,
        points,
        whole.present_from if math.isfinite(whole.present_from) else None,
        whole.absent_to if math.isfinite(whole.absent_to) else None,
        quality,
        *(tuple(np.quantile(scores_N[of], np.linspace(0, 1, QUANTILES)).tolist()) for of in (positive, ~positive)),
    )


@dataclass(frozen=True)
class Scored:
    """How cases were scored.

    Attributes:
        evaluation: what was scored.
        checkpoint_sha256, precision: of the weights and towers.
        scoring, normalise_tokens: see `Calibration`.
        prompts: class → its texts.
    """

    evaluation: str
    checkpoint_sha256: str
    precision: str
    scoring: Literal["tcsim", "global"]
    normalise_tokens: bool
    prompts: Mapping[str, Sequence[str]]


def fit_calibration(cases: CaseScores, scored: Scored, settings: FitSettings) -> Calibration:
    """Calibrate every class that has enough patients.

    Args:
        cases: the calibration cases.
        scored: how they were scored.
        settings: how to calibrate.

    Raises:
        UserError: no class has enough patients; says why the first has not.
    """
    findings, left_out = [], {}
    patients = np.asarray(cases.patients, dtype=object).astype(str)
    for column, name in enumerate(cases.classes):
        rated = cases.rated(column)
        try:
            findings.append(
                fit_finding(
                    name,
                    scored.prompts[name],
                    cases.scores_NC[rated, column],
                    cases.labels_NC[rated, column],
                    patients[rated].tolist(),
                    settings,
                )
            )
        except UserError as error:
            left_out[name] = str(error)
    if not findings:
        raise UserError(f"no finding can be calibrated; {next(iter(left_out))}: {next(iter(left_out.values()))}")
    return Calibration(
        checkpoint_sha256=scored.checkpoint_sha256,
        scoring=scored.scoring,
        normalise_tokens=scored.normalise_tokens,
        precision=scored.precision,
        coverage=settings.coverage,
        evaluation=scored.evaluation,
        patients=tuple(sorted({hashed(patient) for patient in cases.patients})),
        findings=tuple(findings),
        left_out=left_out,
    )


# --- measured on others ----------------------------------------------------------------------------------------------


def measured_calibration(
    calibration: Calibration, cases: CaseScores, prompts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """How the calibration does on other patients: finding → figures, of findings with the same texts.

    Args:
        calibration: fitted elsewhere.
        cases: scored in the same way.
        prompts: class → the texts it was scored with.
    """
    found: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(cases.classes):
        finding = next((own for own in calibration.findings if own.name == name), None)
        if finding is None or tuple(prompts.get(name, ())) != finding.prompts:
            continue
        rated = cases.rated(column)
        scores, positive = cases.scores_NC[rated, column], cases.labels_NC[rated, column] == 1
        if not len(scores):
            continue
        probabilities = finding.probability(scores)
        sets = [finding.truths(score) for score in scores.tolist()]
        found[name] = {
            "num_positive": int(positive.sum()),
            "num_negative": int((~positive).sum()),
            "brier": float(((probabilities - positive) ** 2).mean()),
            "calibration_error": calibration_error(probabilities, positive.astype(np.float64)),
            "coverage_present": _share([("present" in own) for own, is_it in zip(sets, positive) if is_it]),
            "coverage_absent": _share([("absent" in own) for own, is_it in zip(sets, positive) if not is_it]),
            "undecided": _share([len(own) == 2 for own in sets]),
            "operating_points": [
                {
                    "wanted_sensitivity": point.wanted_sensitivity,
                    "threshold": point.threshold,
                    "sensitivity": _share((scores[positive] >= point.threshold).tolist()),
                    "specificity": _share((scores[~positive] < point.threshold).tolist()),
                }
                for point in finding.operating_points
            ],
        }
    return found


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
