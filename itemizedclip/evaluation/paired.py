"""Is one model better than another on the same cases? Paired tests of two evaluations.

DeLong's test (DeLong, DeLong and Clarke-Pearson, Biometrics 1988) for the AUC of one class where every patient has one
case; a paired bootstrap of whole patients for everything else: several cases a patient, means over classes, top-1.

Axes: N cases, P positive and Q negative ones, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

from itemizedclip.evaluation.cases import CaseScores
from itemizedclip.evaluation.intervals import CONFIDENCE, Array, case_resampling, resampled_values
from itemizedclip.runtime.errors import UserError


@dataclass(frozen=True)
class PairedDifference:
    """This model's measure minus the other's, on the cases that both have.

    Attributes:
        value, other: the two measures.
        difference: value − other.
        low, high: 95 % interval of the difference.
        p: two-sided, of no difference.
        test: how.
    """

    value: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    test: Literal["delong", "bootstrap"]


def delong(scores_N: Array, other_N: Array, labels_N: Array) -> PairedDifference:
    """DeLong's test of two AUCs on the same independent cases.

    Placements are taken from mid-ranks (Sun and Xu, IEEE Signal Processing Letters 2014), which takes N log N.

    Args:
        scores_N: of this model.
        other_N: of the other.
        labels_N: 1 or 0; at least two of each.

    Raises:
        UserError: fewer than two cases of one label.
    """
    positive = labels_N == 1
    P, Q = int(positive.sum()), int((~positive).sum())
    if P < 2 or Q < 2:
        raise UserError(f"DeLong's test needs two positive and two negative cases; got {P} and {Q}")
    aucs, shares_P, shares_Q = [], [], []
    for scores in (scores_N, other_N):
        all_ranks = stats.rankdata(scores)
        # Share of negatives below each positive, and of positives above each negative; ties count half.
        above_P = (all_ranks[positive] - stats.rankdata(scores[positive])) / Q
        below_Q = 1 - (all_ranks[~positive] - stats.rankdata(scores[~positive])) / P
        aucs.append(float(above_P.mean()))
        shares_P.append(above_P)
        shares_Q.append(below_Q)
    variance = np.var(shares_P[0] - shares_P[1], ddof=1) / P + np.var(shares_Q[0] - shares_Q[1], ddof=1) / Q
    difference, deviation = aucs[0] - aucs[1], float(np.sqrt(variance))
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * deviation
    if deviation > 0:
        p = float(2 * stats.norm.sf(abs(difference) / deviation))
    else:
        p = 1.0 if difference == 0 else 0.0
    return PairedDifference(aucs[0], aucs[1], difference, difference - half, difference + half, p, "delong")


def compare_cases(ours: CaseScores, theirs: CaseScores, *, resamples: int = 2000) -> dict[str, Any]:
    """Paired differences of every measure that both have; plain data for a result file.

    Args:
        ours: cases of this evaluation.
        theirs: cases of the other; matched by id, and their labels must agree.
        resamples: R of the bootstrap.

    Raises:
        UserError: fewer than two common cases, no common class, or labels that differ.
    """
    ours, theirs = _matched(ours, theirs)
    differences: dict[str, PairedDifference] = {}
    # The same patients in the same order: the same draws for both.
    paired = replace(theirs, patients=ours.patients)
    drawn = [resampled_values(case_resampling(cases), resamples) for cases in (ours, paired)]
    whole = [case_resampling(cases).measure(np.ones((1, len(ours)))) for cases in (ours, theirs)]
    for name in whole[0]:
        if name == "mean_auc":
            continue  # the same as macro_auc
        values = [float(part[name][0]) for part in whole]
        differences[name] = _bootstrapped(values[0], values[1], drawn[0][name] - drawn[1][name])
    for column, name in enumerate(ours.classes):
        rated = ours.rated(column)
        own = [patient for patient, keep in zip(ours.patients, rated) if keep]
        labels = ours.labels_NC[rated, column]
        independent = len(set(own)) == len(own)
        if f"auc/{name}" in differences and independent and 2 <= labels.sum() <= len(labels) - 2:
            differences[f"auc/{name}"] = delong(ours.scores_NC[rated, column], theirs.scores_NC[rated, column], labels)
    return {
        "num_cases": len(ours),
        "num_patients": len(set(ours.patients)),
        "resamples": resamples,
        "differences": {name: asdict(difference) for name, difference in differences.items()},
    }


def _bootstrapped(value: float, other: float, differences_R: Array) -> PairedDifference:
    known = differences_R[~np.isnan(differences_R)]
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if len(known) else (np.nan, np.nan)
    # Ties count on both sides; never 0, as R resamples cannot show less than 1 in R.
    least = min((known <= 0).sum(), (known >= 0).sum()) if len(known) else 0
    p = min(1.0, 2 * (least + 1) / (len(known) + 1))
    return PairedDifference(value, other, value - other, float(low), float(high), float(p), "bootstrap")


def _matched(ours: CaseScores, theirs: CaseScores) -> tuple[CaseScores, CaseScores]:
    """The common cases and classes of two evaluations, in the order of the first."""
    row_of = {name: row for row, name in enumerate(theirs.ids)}
    pairs = [(row, row_of[name]) for row, name in enumerate(ours.ids) if name in row_of]
    if len(pairs) < 2:
        raise UserError(f"{len(pairs)} cases in common; expected two evaluations of the same cases")
    names = [name for name in ours.classes if name in theirs.classes]
    if not names or (ours.one_each and tuple(ours.classes) != tuple(theirs.classes)):
        raise UserError("the two evaluations have other classes; expected the same benchmark with the same classes")
    ours, theirs = ours.rows([row for row, _ in pairs]), theirs.rows([row for _, row in pairs])
    ours, theirs = _columns(ours, names), _columns(theirs, names)
    same = (ours.labels_NC == theirs.labels_NC) | (np.isnan(ours.labels_NC) & np.isnan(theirs.labels_NC))
    if not same.all():
        row = int(np.flatnonzero(~same.all(1))[0])
        raise UserError(f"{ours.ids[row]}: its labels differ in the two evaluations; expected the same label file")
    return ours, theirs


def _columns(cases: CaseScores, names: list[str]) -> CaseScores:
    at = [cases.classes.index(name) for name in names]
    return CaseScores(
        cases.ids, cases.patients, tuple(names), cases.scores_NC[:, at], cases.labels_NC[:, at], cases.one_each
    )
