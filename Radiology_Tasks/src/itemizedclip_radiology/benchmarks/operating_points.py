"""From scores to yes or no: thresholds near the corner of the ROC curve, and what is measured at them.

A row is called positive when its score is larger than the threshold. The threshold of a class is the one whose
(false-positive rate, true-positive rate) lies nearest to the corner (0, 1); of several the largest. It is chosen

    corner           among all operating points, on the labels that are then measured (optimistic: it is tuned on them)
    cross_validated  the same, but each fold of rows is measured at the threshold of the other folds; all rows of one
                     group (one patient) are in one fold, folds have about equally many groups with the finding
    published        among evenly spaced values from −1 to 1, on the labels that are then measured

Axes: N rows, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_FOLDS = 5
FOLD_SEED = 0

MEASURES = ("accuracy", "balanced_accuracy", "f1", "recall", "precision")
"""F1 is weighted by class (finding, no finding), as published; recall and precision are those of the finding."""

MEANING = {
    "corner": "thresholds nearest to the ROC corner among all operating points, chosen on the labels they are "
    "measured on",
    "cross_validated": f"thresholds nearest to the ROC corner on the other folds ({NUM_FOLDS}, or as many as there are "
    f"groups with and without the finding; seed {FOLD_SEED}): no row is measured at a threshold that its label helped "
    "to choose",
    "published": "thresholds nearest to the ROC corner on the published grid, chosen on the labels they are measured "
    "on; what the published code prints as 'acc (balanced)' is accuracy",
}
"""Way to choose → sentence for result files."""


@dataclass(frozen=True)
class Decided:
    """A yes or no for each row of one class.

    Attributes:
        positive_N: bool.
        thresholds: the one used, or one per fold.
    """

    positive_N: np.ndarray
    thresholds: list[float]


def corner_distance(scores_N: np.ndarray, labels_N: np.ndarray, thresholds_T: np.ndarray) -> np.ndarray:
    """How far each operating point lies from the ROC corner (T,): whole numbers in the order of the distances.

    The square of the distance times both squared counts: two points as far as each other are equal here, which the
    rounding of a square root would hide.
    """
    positive, negative = np.sort(scores_N[labels_N == 1]), np.sort(scores_N[labels_N == 0])
    missed_T = np.searchsorted(positive, thresholds_T, side="right")
    false_alarms_T = len(negative) - np.searchsorted(negative, thresholds_T, side="right")
    # Python's integers: with 10⁵ rows the numbers pass 2⁶⁴.
    return (false_alarms_T.astype(object) * len(positive)) ** 2 + (missed_T.astype(object) * len(negative)) ** 2


def operating_points(scores_N: np.ndarray) -> np.ndarray:
    """One threshold per way to split the rows, rising: below all scores, halfway between neighbours, the largest."""
    values = np.unique(scores_N)
    between = values[:-1] + (values[1:] - values[:-1]) / 2
    return np.concatenate([[np.nextafter(values[0], -np.inf)], between, values[-1:]])


def published_grid(num_values: int) -> np.ndarray:
    """Evenly spaced thresholds from −1 to 1."""
    return np.linspace(-1, 1, num_values)


def corner_threshold(scores_N: np.ndarray, labels_N: np.ndarray, thresholds_T: np.ndarray | None = None) -> float:
    """The threshold nearest to the ROC corner, of equal ones the largest.

    Args:
        scores_N: scores of one class.
        labels_N: 0 or 1; both must occur.
        thresholds_T: candidates, rising; by default all operating points.
    """
    candidates_T = operating_points(scores_N) if thresholds_T is None else thresholds_T
    distance_T = corner_distance(scores_N, labels_N, candidates_T)
    return float(candidates_T[len(candidates_T) - 1 - distance_T[::-1].argmin()])


def decide(scores_N: np.ndarray, labels_N: np.ndarray, thresholds_T: np.ndarray | None = None) -> Decided:
    """Yes or no at `corner_threshold`."""
    threshold = corner_threshold(scores_N, labels_N, thresholds_T)
    return Decided(scores_N > threshold, [threshold])


def decide_across_folds(scores_N: np.ndarray, labels_N: np.ndarray, groups_N: Sequence[str]) -> Decided | None:
    """Yes or no for each row at the threshold of the folds without it.

    Args:
        scores_N: scores of one class.
        labels_N: 0 or 1.
        groups_N: rows of one group stay together, such as the patient.

    Returns:
        None when fewer than two groups have the finding, or fewer than two are without it.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second: only here

    groups, group_N = np.unique(np.asarray(groups_N), return_inverse=True)
    has_finding = np.zeros(len(groups), dtype=np.int8)
    np.maximum.at(has_finding, group_N, labels_N.astype(np.int8))
    num_folds = min(NUM_FOLDS, *np.bincount(has_finding, minlength=2).tolist())
    if num_folds < 2:
        return None
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=FOLD_SEED)
    positive_N = np.zeros(len(scores_N), dtype=bool)
    thresholds = []
    for _, fold in folds.split(groups, has_finding):
        held_out = np.isin(group_N, fold)
        thresholds.append(corner_threshold(scores_N[~held_out], labels_N[~held_out]))
        positive_N[held_out] = scores_N[held_out] > thresholds[-1]
    return Decided(positive_N, thresholds)


def measure_decisions(labels_N: np.ndarray, positive_N: np.ndarray) -> dict[str, float]:
    """The `MEASURES` of one class (scikit-learn); a precision without any positive call is 0."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, precision_score, recall_score

    predicted_N = positive_N.astype(labels_N.dtype)
    return {
        "accuracy": float(accuracy_score(labels_N, predicted_N)),
        "balanced_accuracy": float(balanced_accuracy_score(labels_N, predicted_N)),
        "f1": float(f1_score(labels_N, predicted_N, average="weighted", zero_division=0)),
        "recall": float(recall_score(labels_N, predicted_N, zero_division=0)),
        "precision": float(precision_score(labels_N, predicted_N, zero_division=0)),
    }
