"""Trust in a score, from a user's side: calibrate, evaluate with intervals, compare two models, ask report and API."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from PIL import Image

import itemizedclip
from itemizedclip.commands.calibrate import main as calibrate
from itemizedclip.commands.evaluate import main as evaluate
from itemizedclip.commands.report import main as report
from itemizedclip.evaluation.calibration import read_calibration
from itemizedclip.models.factory import create_model
from itemizedclip.runtime.errors import UserError

COLOURS = {"red": (170, 60, 60), "green": (60, 150, 60)}
NUM = 96


def write_checkpoint(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = create_model("ViT-scenes-ItemizedCLIP")
    folder.mkdir()
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, folder / "epoch_1.pt")
    return folder / "epoch_1.pt"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures of two colours and much noise, two a patient, half of them for calibration; three checkpoints."""
    folder = tmp_path_factory.mktemp("calibrate")
    rng, lines = np.random.default_rng(0), []
    for number in range(NUM):
        colour = list(COLOURS)[int(rng.random() < 0.5)]
        pixels = np.array(COLOURS[colour]) + rng.normal(scale=40, size=3) + rng.normal(scale=20, size=(64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "labels": {name: int(name == colour) for name in COLOURS},
                      "items": ["a picture"], "patient": f"patient {number // 2}",
                      "split": "val" if number < NUM // 2 else "test"})  # fmt: skip
    # Some labels are unknown, so that classes are not one each.
    lines[0]["labels"], lines[-1]["labels"] = {"red": 0}, {"red": 0}
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "classes.txt").write_text("red: a red picture\ngreen: a green picture\n")
    for name, seed in (("first", 0), ("second", 1)):
        write_checkpoint(folder / name, seed)
    return folder


def flags(data: Path, model: str = "first", *more: str) -> list[str]:
    return ["own", "--data", str(data / "own.jsonl"), "--classes", str(data / "classes.txt"), "--checkpoint",
            str(data / model / "epoch_1.pt"), "--workers", "0", "--device", "cpu", *more]  # fmt: skip


def results(data: Path, model: str = "first") -> dict:
    return json.loads((data / model / "epoch_1.own.own.json").read_text())


def test_the_way_of_a_user(data, capsys):
    # 1. An evaluation with intervals, by patient.
    metrics = evaluate(flags(data, "second", "--bootstrap", "200"))
    facts = results(data, "second")["facts"]
    assert facts["intervals"]["num_patients"] == NUM // 4
    for name, value in metrics.items():
        low, high = facts["intervals"]["of"][name]
        assert low <= value <= high
    assert "95 % intervals" in capsys.readouterr().out
    # 2. Another model on the same cases.
    evaluate(flags(data, "first", "--compare-with", str(data / "second" / "epoch_1.own.own.json")))
    compared = results(data)["facts"]["compared_with"]
    assert compared["num_cases"] == NUM // 2
    assert compared["differences"]["auc/red"]["value"] == results(data)["metrics"]["auc/red"]
    assert compared["differences"]["auc/red"]["other"] == pytest.approx(metrics["auc/red"])
    assert {entry["test"] for entry in compared["differences"].values()} == {"bootstrap"}  # two cases a patient
    # 3. A calibration on split val, of other patients than the test's.
    capsys.readouterr()
    calibrate(flags(data, "first", "--not-of", str(data / "first" / "epoch_1.own.own.json"), "--sensitivities", "0.8"))
    said = capsys.readouterr().out
    assert f"Calibration on {NUM // 2} cases of {NUM // 4} patients" in said
    found = read_calibration(data / "first" / "calibration.json")
    assert [finding.name for finding in found.findings] == ["red", "green"]
    assert found.findings[0].num_positive + found.findings[0].num_negative == NUM // 2
    assert found.findings[1].num_positive + found.findings[1].num_negative == NUM // 2 - 1
    # 4. Measured on the test patients by the next evaluation.
    evaluate(flags(data))
    measured = results(data)["facts"]["calibrated"]["findings"]["red"]
    cases = json.loads((data / "first" / results(data)["facts"]["cases"]).read_text())["cases"]
    scores = np.array([case["scores"][0] for case in cases])
    labels = np.array([case["labels"][0] for case in cases])
    expected = found.findings[0].probability(scores)
    assert measured["brier"] == pytest.approx(((expected - labels) ** 2).mean())
    threshold = found.findings[0].operating_points[0].threshold
    assert measured["operating_points"][0]["sensitivity"] == pytest.approx((scores[labels == 1] >= threshold).mean())
    # 5. The API scores an image as the calibration did.
    loaded = itemizedclip.load(data / "first" / "epoch_1.pt", device="cpu")
    (judgement,) = itemizedclip.calibrated(loaded, data / cases[3]["id"])
    assert judgement["red"].score == pytest.approx(scores[3], abs=1e-6)
    assert judgement["red"].probability == pytest.approx(expected[3], abs=1e-4)
    assert judgement["red"].truths == found.findings[0].truths(scores[3])
    assert judgement["red"].above == {0.8: scores[3] >= threshold}
    with pytest.raises(UserError, match="make one with itemizedclip calibrate"):
        itemizedclip.calibrated(itemizedclip.load(data / "second" / "epoch_1.pt"), data / "0.png")
    # 6. So does report.
    capsys.readouterr()
    report([str(data / cases[3]["id"]), "--checkpoint", str(data / "first" / "epoch_1.pt"), "--items",
            "a red picture;a dog", "--output", str(data / "page.html"), "--device", "cpu"])  # fmt: skip
    said = capsys.readouterr().out
    assert "probability" in said
    assert f"{expected[3]:.0%}" in said


def test_a_calibration_is_not_fitted_or_measured_on_test_patients(data, capsys, tmp_path):
    own = write_checkpoint(tmp_path / "own", 2)
    there = [*flags(data)[:-6], "--checkpoint", str(own), *flags(data)[-4:]]
    assert "not fitted on entries of split test" in fails(capsys, calibrate, [*there, "--split", "test"])
    calibrate([*there, "--split", "val"])
    said = fails(capsys, evaluate, [*there, "--split", "val"])
    assert f"the calibration was fitted on {NUM // 4} of these patients (patient 0, patient 1, patient 10, …)" in said
    assert "--no-use-calibration" in said
    evaluate([*there, "--split", "val", "--no-use-calibration", "--output", str(tmp_path / "val.json")])
    said = fails(capsys, calibrate, [*there, "--not-of", str(tmp_path / "val.json")])
    assert f"val.json: {NUM // 4} of its patients are among those of the calibration" in said
    lines = [json.loads(line) for line in (data / "own.jsonl").read_text().splitlines()]
    lines[-1]["patient"] = "patient 0"
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixed = [*there, "--data", str(tmp_path / "mixed.jsonl")]
    assert "1 patients of split val have test entries too, the first patient 0" in fails(capsys, calibrate, mixed)
    retrieval = [flag for flag in there if flag not in ("--classes", str(data / "classes.txt"))]
    assert "has no classes to calibrate" in fails(capsys, calibrate, retrieval)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--coverage", "90"], "--coverage is 90.0; expected a number between 0 and 1"),
        (["--sensitivities", "0"], "expected numbers above 0, at most 1"),
        (["--not-of", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_wrong_flags(data, capsys, more, message):
    assert message in fails(capsys, calibrate, flags(data, "second", *more))
