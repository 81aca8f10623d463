"""Bootstrap by patient and paired tests, against plain implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from itemizedclip.evaluation.cases import CaseScores, read_cases, write_cases
from itemizedclip.evaluation.intervals import (
    Resampling,
    bootstrap_intervals,
    case_resampling,
    intervals_of,
    patient_draws,
    weighted_aucs,
    weighted_mean,
)
from itemizedclip.evaluation.paired import compare_cases, delong
from itemizedclip.runtime.errors import UserError


def cases(count=60, seed=0, *, effect=1.0, per_patient=1, unknown=True) -> CaseScores:
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 2)) < 0.4).astype(float)
    scores = np.round(rng.normal(size=(count, 2)) + effect * labels, 1)  # rounded: there are ties
    if unknown:
        labels[3, 0] = np.nan
    patients = tuple(f"p{row // per_patient}" for row in range(count))
    return CaseScores(tuple(f"c{row}" for row in range(count)), patients, ("a", "b"), scores, labels)


def test_weighted_aucs_are_those_of_repeated_cases():
    rng = np.random.default_rng(3)
    scores, labels = np.round(rng.normal(size=40), 1), (rng.random(40) < 0.5).astype(float)
    weights = rng.integers(0, 4, size=(20, 40)).astype(float)
    found = weighted_aucs(scores, labels, weights)
    for row, own in zip(found, weights):
        repeated = np.repeat(np.arange(40), own.astype(int))
        assert row == pytest.approx(roc_auc_score(labels[repeated], scores[repeated]), abs=1e-12)
    assert np.isnan(weighted_aucs(scores, np.ones(40), weights)).all()
    values = np.where(rng.random(40) < 0.2, np.nan, scores)
    for row, own in zip(weighted_mean(values, weights), weights):
        assert row == pytest.approx(np.nanmean(np.repeat(values, own.astype(int))))


def each_alone(values) -> Resampling:
    """A mean over patients of one case each."""
    return Resampling([f"{n}" for n in range(len(values))], lambda w: {"m": weighted_mean(values, w)})


def test_whole_patients_are_drawn():
    patients = ["x", "y", "x", "z"]
    weights = patient_draws(patients, 500, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all()
    assert weights[:, 1].mean() == pytest.approx(1, abs=0.1)
    # Three cases of one patient tell as much as one: the interval is as wide.
    values = np.random.default_rng(0).normal(size=30)
    single = bootstrap_intervals(
        Resampling([f"{n}" for n in range(30)], lambda w: {"m": weighted_mean(values, w)}), 400
    )
    thrice = bootstrap_intervals(
        Resampling([f"{n // 3:02d}" for n in range(90)], lambda w: {"m": weighted_mean(np.repeat(values, 3), w)}), 400
    )
    width = [high - low for found in (single, thrice) for low, high in found.values()]
    assert width[1] == pytest.approx(width[0], rel=0.15)
    assert bootstrap_intervals(Resampling(["x", "x"], lambda w: {"m": weighted_mean(values[:2], w)}), 50) == {}


def test_the_interval_of_a_mean_is_nearly_that_of_theory():
    values = np.random.default_rng(1).normal(size=200)
    found = bootstrap_intervals(
        Resampling([f"{n}" for n in range(200)], lambda w: {"m": weighted_mean(values, w)}), 4000
    )
    expected = stats.norm.interval(0.95, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(200))
    assert found["m"] == pytest.approx(expected, abs=0.01)


def test_intervals_hold_the_value_and_are_given_for_reported_values_only():
    own = cases()
    known = ~np.isnan(own.labels_NC[:, 0])
    aucs = [roc_auc_score(own.labels_NC[known, 0], own.scores_NC[known, 0]),
            roc_auc_score(own.labels_NC[:, 1], own.scores_NC[:, 1])]  # fmt: skip
    metrics = {"macro_auc": np.mean(aucs), "auc/a": aucs[0], "auc/b": aucs[1], "mean_auc": 0.1, "other": 0.3}
    found = intervals_of(metrics, case_resampling(own), 300)
    assert set(found) == {"macro_auc", "auc/a", "auc/b"}
    for name, (low, high) in found.items():
        assert 0 < low < metrics[name] < high <= 1
    assert intervals_of(metrics, None, 300) == intervals_of(metrics, case_resampling(own), 0) == {}


def test_ranks_of_single_classes():
    scores = np.array([[3.0, 1, 2], [1, 1, 0], [0, 5, 6]])
    labels = np.array([[1.0, 0, 0], [1, 0, 0], [1, 0, 0]])
    own = CaseScores(("a", "b", "c"), ("a", "b", "c"), ("x", "y", "z"), scores, labels, one_each=True)
    found = case_resampling(own).measure(np.ones((1, 3)))
    assert {name: values[0] for name, values in found.items()} == {
        "top1": pytest.approx(1 / 3), "top5": 1.0, "mean_rank": pytest.approx((1 + 1.5 + 3) / 3),
    }  # fmt: skip


# --- paired tests ----------------------------------------------------------------------------------------------------


def plain_delong(first, second, labels):
    """The paper's formulas by two loops over pairs of a positive and a negative."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    kernel = lambda x, y: 1.0 if x > y else 0.5 if x == y else 0.0  # noqa: E731
    v10, v01 = np.zeros((2, len(positive))), np.zeros((2, len(negative)))
    for model, scores in enumerate((first, second)):
        for i, p in enumerate(positive):
            for j, n in enumerate(negative):
                v10[model, i] += kernel(scores[p], scores[n]) / len(negative)
                v01[model, j] += kernel(scores[p], scores[n]) / len(positive)
    aucs = v10.mean(1)
    s = np.cov(v10) / len(positive) + np.cov(v01) / len(negative)
    deviation = math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    return aucs, deviation, 2 * stats.norm.sf(abs(aucs[0] - aucs[1]) / deviation)


def test_delong_is_the_papers():
    ours, theirs = cases(seed=1, effect=1.5), cases(seed=2, effect=0.5)
    labels = ours.labels_NC[:, 1]
    found = delong(ours.scores_NC[:, 1], theirs.scores_NC[:, 1], labels)
    aucs, deviation, p = plain_delong(ours.scores_NC[:, 1], theirs.scores_NC[:, 1], labels)
    assert (found.value, found.other) == pytest.approx(tuple(aucs))
    assert found.value == pytest.approx(roc_auc_score(labels, ours.scores_NC[:, 1]))
    assert found.p == pytest.approx(p)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * deviation, rel=1e-5)
    same = delong(ours.scores_NC[:, 1], ours.scores_NC[:, 1], labels)
    assert (same.difference, same.p) == (0, 1)


def test_delong_holds_its_level():
    """Of two models that are equally good, one in twenty is called different."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0.0, 1.0], 60)
    ps = []
    for _ in range(300):
        shared = rng.normal(size=120) + labels
        ps.append(delong(shared + rng.normal(size=120), shared + rng.normal(size=120), labels).p)
    assert 0.02 < np.mean(np.array(ps) < 0.05) < 0.09


def test_evaluations_are_compared_by_case(tmp_path):
    ours = cases(200, effect=2.0)
    worse = CaseScores(ours.ids, ours.patients, ours.classes, ours.scores_NC + np.random.default_rng(9).normal(
        scale=3, size=ours.scores_NC.shape), ours.labels_NC)  # fmt: skip
    shuffled = worse.rows(np.random.default_rng(1).permutation(200)[:190].tolist())
    write_cases(tmp_path / "cases.json", shuffled)
    found = compare_cases(ours, read_cases(tmp_path / "cases.json"), resamples=300)
    assert (found["num_cases"], found["num_patients"]) == (190, 190)
    kept = ours.rows([row for row, name in enumerate(ours.ids) if name in set(shuffled.ids)])
    for name in ("auc/a", "auc/b"):
        difference = found["differences"][name]
        assert difference["test"] == "delong"
        assert difference["low"] > 0
        assert difference["p"] < 0.001
        column = ours.classes.index(name[-1])
        known = kept.rated(column)
        assert difference["value"] == pytest.approx(
            roc_auc_score(kept.labels_NC[known, column], kept.scores_NC[known, column])
        )
    assert found["differences"]["macro_auc"]["test"] == "bootstrap"
    assert found["differences"]["macro_auc"]["low"] > 0
    # Two cases a patient are not independent: DeLong's test would take them for such.
    paired = compare_cases(cases(100, per_patient=2), cases(100, per_patient=2), resamples=100)
    assert {entry["test"] for entry in paired["differences"].values()} == {"bootstrap"}
    assert all(entry["p"] == 1 and entry["difference"] == 0 for entry in paired["differences"].values())


def test_what_cannot_be_compared_is_said():
    ours = cases(unknown=False)
    changed = CaseScores(ours.ids, ours.patients, ours.classes, ours.scores_NC, 1 - ours.labels_NC)
    with pytest.raises(UserError, match="c0: its labels differ"):
        compare_cases(ours, changed)
    elsewhere = CaseScores(tuple(f"d{n}" for n in range(60)), ours.patients, ours.classes, ours.scores_NC,
                           ours.labels_NC)  # fmt: skip
    with pytest.raises(UserError, match="0 cases in common"):
        compare_cases(ours, elsewhere)


def test_cases_are_kept_whole(tmp_path):
    own = cases()
    write_cases(tmp_path / "cases.json", own)
    again = read_cases(tmp_path / "cases.json")
    assert (again.ids, again.patients, again.classes, again.one_each) == (own.ids, own.patients, own.classes, False)
    assert (again.scores_NC == own.scores_NC).all()
    assert np.array_equal(again.labels_NC, own.labels_NC, equal_nan=True)
    (tmp_path / "cases.json").write_text('{"classes": ["a"], "cases": [{"id": "x", "patient": "x", "scores": [1, 2], '
                                         '"labels": [1]}]}')  # fmt: skip
    with pytest.raises(UserError, match=r"cases.json: cases\[0\].scores is a list of 2; expected a list of 1"):
        read_cases(tmp_path / "cases.json")
