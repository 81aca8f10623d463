"""Bootstrap intervals by patient: whole patients are drawn with replacement, with all of their cases.

Axes: N cases, P patients, R resamples, C classes, M texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from itemizedclip.evaluation.cases import CaseScores

Array = NDArray[np.float64]
"""Numbers of double precision."""

CONFIDENCE = 0.95
"""Of every interval."""

SEED = 0
"""Of the resamples: the same evaluation gives the same intervals."""

BLOCK_VALUES = 1_000_000
"""Weights held at a time: resamples go block by block."""


@dataclass(frozen=True)
class Resampling:
    """How an evaluation's measures follow from how often each case counts.

    Attributes:
        patients_N: whose each case is.
        measure: weights (R, N), how often each case counts in each resample → measure → values (R,), NaN where a
            resample has none.
    """

    patients_N: Sequence[str]
    measure: Callable[[Array], Mapping[str, Array]]


def patient_draws(patients_N: Sequence[str], resamples: int, rng: np.random.Generator) -> Array:
    """How often each case counts in each bootstrap resample of whole patients, (R, N).

    Args:
        patients_N: whose each case is.
        resamples: R.
        rng: of the draws.
    """
    names, patient_N = np.unique(np.asarray(patients_N, dtype=object).astype(str), return_inverse=True)
    P = len(names)
    counts_RP = np.stack([np.bincount(rng.integers(P, size=P), minlength=P) for _ in range(resamples)])
    drawn: Array = counts_RP[:, patient_N].astype(np.float64)
    return drawn


def resampled_values(resampling: Resampling, resamples: int, *, seed: int = SEED) -> dict[str, Array]:
    """Each measure in each resample, (R,); the same draws for the same patients, whatever is measured.

    Args:
        resampling: what to draw from.
        resamples: R, at least 1.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_VALUES // max(len(resampling.patients_N), 1))
    parts = []
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        parts.append(resampling.measure(patient_draws(resampling.patients_N, count, rng)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def bootstrap_intervals(
    resampling: Resampling, resamples: int, *, seed: int = SEED, confidence: float = CONFIDENCE
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of every measure (Efron 1979), by patient; none with fewer than two patients.

    A resample in which a measure does not exist (such as an AUC without a positive) is left out of that measure; a
    measure that exists in fewer than half of them has no interval.

    Args:
        resampling: what to draw from.
        resamples: R; 0 gives no interval.
        seed: of the draws.
        confidence: share of resamples between the ends.
    """
    if not resamples or len(set(resampling.patients_N)) < 2:
        return {}
    intervals = {}
    for name, values in resampled_values(resampling, resamples, seed=seed).items():
        known = values[~np.isnan(values)]
        if 2 * len(known) >= resamples:
            low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
            intervals[name] = (float(low), float(high))
    return intervals


def weighted_aucs(scores_N: Array, labels_N: Array, weights_RN: Array) -> Array:
    """Area under the ROC curve with each case counted as often as its weight says, (R,); NaN without both labels.

    Args:
        scores_N: of one class; equal scores of a positive and a negative count half.
        labels_N: 1 or 0.
        weights_RN: not negative.
    """
    if not len(scores_N):
        return np.full(len(weights_RN), np.nan)
    order = np.argsort(scores_N, kind="stable")
    rising = scores_N[order]
    starts = np.flatnonzero(np.r_[True, rising[1:] != rising[:-1]])
    sorted_RN = weights_RN[:, order]
    positive_RG = np.add.reduceat(sorted_RN * labels_N[order], starts, axis=1)
    negative_RG = np.add.reduceat(sorted_RN * (1 - labels_N[order]), starts, axis=1)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        aucs: Array = (positive_RG * below_RG).sum(1) / (positive_RG.sum(1) * negative_RG.sum(1))
    return aucs


def weighted_mean(values_N: Array, weights_RN: Array) -> Array:
    """Mean over cases that have a value (not NaN), (R,); NaN where none counts."""
    known = ~np.isnan(values_N)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = (weights_RN[:, known] @ values_N[known]) / weights_RN[:, known].sum(1)
    return means


def case_resampling(cases: CaseScores) -> Resampling:
    """The measures of classes: AUC of each and their mean (macro_auc, mean_auc), or top-1, top-5 and mean rank."""
    if cases.one_each:
        true_N1 = np.take_along_axis(cases.scores_NC, np.nanargmax(cases.labels_NC, 1)[:, None], 1)
        larger_N = (cases.scores_NC > true_N1).sum(1)
        ranks_N = 1.0 + larger_N + ((cases.scores_NC == true_N1).sum(1) - 1) / 2
        values = {"top1": (ranks_N <= 1) * 1.0, "top5": (ranks_N <= 5) * 1.0, "mean_rank": ranks_N}
        return Resampling(
            cases.patients, lambda weights_RN: {name: weighted_mean(own, weights_RN) for name, own in values.items()}
        )

    def measure(weights_RN: Array) -> dict[str, Array]:
        measured = {}
        for column, name in enumerate(cases.classes):
            rated = cases.rated(column)
            labels = cases.labels_NC[rated, column]
            if 0 < labels.sum() < len(labels):
                scores = cases.scores_NC[rated, column]
                measured[f"auc/{name}"] = weighted_aucs(scores, labels, weights_RN[:, rated])
        if measured:
            every_CR = np.stack(list(measured.values()))
            there_R = (~np.isnan(every_CR)).sum(0)
            mean_R = np.where(there_R, np.nansum(every_CR, axis=0) / np.maximum(there_R, 1), np.nan)
            measured |= {"macro_auc": mean_R, "mean_auc": mean_R}
        return measured

    return Resampling(cases.patients, measure)


def intervals_of(
    metrics: Mapping[str, float], resampling: Resampling | None, resamples: int
) -> dict[str, tuple[float, float]]:
    """Intervals of those measures whose reported value follows from these cases; none without a resampling.

    Args:
        metrics: as reported.
        resampling: of the same evaluation.
        resamples: R; 0 gives none.
    """
    if resampling is None or not resamples:
        return {}
    whole = resampling.measure(np.ones((1, len(resampling.patients_N))))
    # Some benchmarks report a mean over other classes under the same name: no interval rather than a wrong one.
    same = {name for name, values in whole.items() if abs(metrics.get(name, np.inf) - float(values[0])) < 1e-6}
    found = bootstrap_intervals(resampling, resamples)
    return {name: ends for name, ends in found.items() if name in same}
