"""Probabilities, thresholds and conformal sets of findings, against scikit-learn and plain counting."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression

from itemizedclip.evaluation.calibration import (
    Calibration,
    FitSettings,
    Scored,
    calibration_beside,
    calibration_error,
    calibration_path,
    conformal_bound,
    fit_calibration,
    fit_finding,
    measured_calibration,
    platt,
    read_calibration,
    sensitive_threshold,
    write_calibration,
)
from itemizedclip.evaluation.cases import CaseScores
from itemizedclip.runtime.errors import UserError

PROMPTS = {"effusion": ["a pleural effusion"], "rare": ["a rare thing"]}
SCORED = Scored("tests", "5" * 64, "fp32", "tcsim", True, PROMPTS)


def drawn(count: int, seed: int, *, per_patient: int = 1, name: str = "p", rare: int = 2) -> CaseScores:
    """Effusions in a third of the cases, with better scores; of a rare finding, `rare` cases."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, 2))
    labels[:, 0] = rng.random(count) < 1 / 3
    labels[:rare, 1] = 1
    scores = 0.1 * rng.normal(size=(count, 2)) + 0.2 * labels
    patients = tuple(f"{name}{row // per_patient}" for row in range(count))
    return CaseScores(tuple(f"{name}c{row}" for row in range(count)), patients, tuple(PROMPTS), scores, labels)


def test_probabilities_are_scikit_learns():
    own = drawn(400, 0)
    scores, labels = own.scores_NC[:, 0], own.labels_NC[:, 0]
    expected = _SigmoidCalibration().fit(scores, labels)
    slope, intercept = platt(scores, labels)
    assert (slope, intercept) == pytest.approx((-expected.a_, -expected.b_), rel=1e-3)
    some = np.linspace(-0.5, 0.8, 50)
    for method, plain in (
        ("platt", expected),
        ("isotonic", IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)),
    ):
        found = fit_finding("effusion", ["x"], scores, labels, own.patients, FitSettings(method=method))
        assert found.probability(some) == pytest.approx(plain.predict(some), abs=1e-4)
        assert (np.diff(found.probability(some)) >= 0).all()
    assert fit_finding("effusion", ["x"], scores, labels, own.patients, FitSettings()).method == "platt"


def test_thresholds_keep_their_sensitivity():
    rng = np.random.default_rng(1)
    for count in (7, 10, 99):
        scores = np.round(rng.normal(size=count), 1)
        for wanted in (0.5, 0.9, 0.95, 1.0):
            threshold = sensitive_threshold(scores, wanted)
            assert (scores >= threshold).mean() >= wanted
            higher = np.unique(scores[scores > threshold])
            assert not len(higher) or (scores >= higher[0]).mean() < wanted


def plain_bound(values, patients, coverage):
    """The smallest value whose weight, counted patient by patient, reaches the coverage."""
    K = len(set(patients))
    for candidate in sorted(values):
        reached = sum(
            sum(value <= candidate for value, own in zip(values, patients) if own == patient) / patients.count(patient)
            for patient in set(patients)
        )
        if reached / (K + 1) >= coverage - 1e-9:
            return candidate
    return math.inf


def test_conformal_bounds_count_patients():
    rng = np.random.default_rng(2)
    values = rng.normal(size=30)
    patients = [f"p{number}" for number in rng.integers(0, 12, 30)]
    for coverage in (0.5, 0.8, 0.9, 0.95):
        assert conformal_bound(values, patients, coverage) == plain_bound(values.tolist(), patients, coverage)
    single = [str(number) for number in range(30)]
    assert conformal_bound(values, single, 0.9) == np.sort(values)[math.ceil(0.9 * 31) - 1]
    assert conformal_bound(values[:5], single[:5], 0.9) == math.inf


def test_conformal_sets_cover_as_stated():
    """Over many calibrations, new patients with several cases each are covered as often as stated, not much more."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(400):
        patient = rng.normal(size=41)  # what a patient's cases share
        values = np.repeat(patient, 3) + 0.3 * rng.normal(size=123)
        names = [f"p{number // 3}" for number in range(123)]
        bound = conformal_bound(values[:120], names[:120], 0.9)
        covered.append((values[120:] <= bound).mean())
    assert 0.88 < np.mean(covered) < 0.94


def test_a_calibration_holds_on_other_patients():
    calibration = fit_calibration(drawn(1500, 4, per_patient=2), SCORED, FitSettings())
    (finding,) = calibration.findings
    assert finding.method == "isotonic"
    assert list(calibration.left_out) == ["rare"]
    assert "1 patients with it and 749 without; expected at least 5" in calibration.left_out["rare"]
    measured = measured_calibration(calibration, drawn(4000, 5, name="q"), PROMPTS)
    assert list(measured) == ["effusion"]
    own = measured["effusion"]
    for key in ("coverage_present", "coverage_absent"):
        assert own[key] == pytest.approx(0.9, abs=0.04)
        assert finding.quality[key] == pytest.approx(0.9, abs=0.04)
    assert own["calibration_error"] < 0.05
    for point, of_fit in zip(own["operating_points"], finding.operating_points):
        assert point["sensitivity"] == pytest.approx(point["wanted_sensitivity"], abs=0.04)
        assert of_fit.sensitivity == pytest.approx(point["sensitivity"], abs=0.05)
        assert of_fit.specificity == pytest.approx(point["specificity"], abs=0.06)
    # Other texts are other scores.
    assert measured_calibration(calibration, drawn(50, 5, name="q"), {"effusion": ["fluid"]}) == {}
    assert finding.truths(-9) == ("absent",)
    assert finding.truths(9) == ("present",)


def test_calibration_error_by_hand():
    probabilities = np.repeat([0.25, 0.75], 50)
    labels = np.concatenate([np.repeat([1.0, 0], [10, 40]), np.repeat([1.0, 0], [45, 5])])
    shuffled = np.random.default_rng(0).permutation(100)
    # Ten bins of ten; whatever their order, bins of 0.25 are 0.05 off on average or more.
    assert calibration_error(probabilities[shuffled], labels[shuffled]) >= 0.5 * 0.05 + 0.5 * 0.15 - 1e-9
    assert calibration_error(labels, labels) == 0


def test_own_patients_are_refused():
    calibration = fit_calibration(drawn(300, 6), SCORED, FitSettings())
    calibration.check_patients(["q1", "q2"], where="test.json")
    with pytest.raises(UserError, match=r"test.json: the calibration was fitted on 2 of these patients \(p1, p2\)"):
        calibration.check_patients(["q1", "p2", "p1"], where="test.json")
    assert "p1" not in calibration.patients


def test_files(tmp_path, caplog):
    checkpoint = tmp_path / "epoch_1.pt"
    assert calibration_beside(checkpoint, "5" * 64) is None
    calibration = fit_calibration(drawn(300, 6), SCORED, FitSettings(method="isotonic"))
    write_calibration(calibration_path(checkpoint), calibration)
    found = calibration_beside(checkpoint, "5" * 64)
    assert isinstance(found, Calibration)
    assert found == calibration
    assert found.finding("Effusion") is found.finding(" a pleural effusion ") is found.findings[0]
    assert found.finding("fluid") is None
    assert calibration_beside(checkpoint, "6" * 64) is None
    assert "is of other weights than epoch_1.pt" in caplog.text
    values = json.loads(calibration_path(checkpoint).read_text())
    for change, message in (
        ({"coverage": 2}, "coverage is 2; expected a number from 0 to 1"),
        ({"findings": [{**values["findings"][0], "method": "guess"}]}, r"findings\[0\].method is 'guess'"),
        ({"findings": [{**values["findings"][0], "scores": [1.0]}]}, "expected as many probabilities as scores"),
        ({"more": 1}, "unknown key 'more'"),
    ):
        calibration_path(checkpoint).write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message) as error:
            read_calibration(calibration_path(checkpoint))
        assert "calibration.json" in str(error.value)


def test_too_few_patients():
    with pytest.raises(UserError, match="no finding can be calibrated; effusion: "):
        fit_calibration(drawn(8, 0), SCORED, FitSettings())


def test_where_a_score_stands_among_known_cases(tmp_path):
    own = drawn(400, 0)
    scores, labels = own.scores_NC[:, 0], own.labels_NC[:, 0]
    found = fit_finding("effusion", ["x"], scores, labels, own.patients, FitSettings())
    for score in np.quantile(scores, [0.05, 0.4, 0.9]):
        for truth, value in (("present", 1), ("absent", 0)):
            lower = (scores[labels == value] < score).mean()
            assert found.share_below(truth, score) == pytest.approx(lower, abs=0.03)
    assert (found.share_below("absent", -9.0), found.share_below("present", 9.0)) == (0.0, 1.0)
    assert replace(found, absent_scores=()).share_below("absent", 0.0) is None
