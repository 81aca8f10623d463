"""The RSICD scripts as a user runs them: bash, environment variables, real file formats, one and two processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import ROOT, fails, run
from itemizedclip_2d.benchmarks import classification_main
from rsicd_files import RsicdFolder, captions_cell, image_cell, write_rsicd_csv, write_rsicd_folder


def bash(script: str, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """A script of the project folder."""
    return run("bash", str(ROOT / script), *flags, **variables)


@pytest.fixture(scope="module")
def rsicd(tmp_path_factory) -> RsicdFolder:
    return write_rsicd_folder(tmp_path_factory.mktemp("rsicd"), num_train=24, num_valid=6, num_test=14, image_size=64)


@pytest.fixture(scope="module")
def trained(rsicd, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    result = bash(
        "train_rsicd.sh", "--recipe", "rsicd_debug", "--name", "one", "--log-every-n-steps", "1",
        RSICD_DIR=str(rsicd.folder), RSICD_ITEMS=rsicd.external_captions, LOGS=str(logs),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "as the published code does" in result.stderr + result.stdout
    return logs / "one"


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_training_writes_a_run_folder(trained):
    assert len(curve(trained)) == 12
    assert {p.name for p in trained.iterdir()} >= {"params.json", "log.txt", "metrics.jsonl", "checkpoints"}
    params = json.loads((trained / "params.json").read_text())
    assert params["objective"]["kta_weight"] == 1.5
    evaluations = [json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines() if '"eval"' in x]
    for name in ("text_to_image_R@10", "image_to_text_R@1", "mean_item_rank", "worst_item_rank", "complete@100"):
        assert f"rsicd_test/{name}" in evaluations[-1]


def test_training_on_two_processes_with_three_item_files(rsicd, tmp_path):
    items = f"{rsicd.items_path('train')};{rsicd.items_path('valid')};{rsicd.items_path('test')}"
    result = bash(
        "train_rsicd.sh", "--recipe", "rsicd_debug", "--name", "two", "--log-every-n-steps", "1", "--epochs", "1",
        RSICD_DIR=str(rsicd.folder), RSICD_ITEMS=items, LOGS=str(tmp_path), GPUS="2",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(curve(tmp_path / "two")) == 3
    assert "rsicd_valid/mean_item_rank" in (tmp_path / "two" / "metrics.jsonl").read_text()


def test_captions_instead_of_item_files(rsicd, tmp_path):
    result = bash(
        "train_rsicd.sh", "--recipe", "rsicd_debug", "--name", "c", "--epochs", "1",
        RSICD_DIR=str(rsicd.folder), RSICD_ITEMS="captions", LOGS=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "valid.csv" in result.stderr + result.stdout


def test_classification_is_the_same_on_two_processes(rsicd, trained, tmp_path):
    checkpoint = str(trained / "checkpoints" / "epoch_2.pt")
    reports = []
    for gpus in ("1", "2"):
        output = tmp_path / f"{gpus}.json"
        result = bash(
            "inference_rsicd_classification.sh", "--output", str(output), "--batch-size", "4", "--workers", "0",
            RSICD_DIR=str(rsicd.folder), RESUME=checkpoint, GPUS=gpus,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "tcsim/top1" in result.stdout
        reports.append(json.loads(output.read_text()))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["facts"]["num_images"] == 14
    assert reports[0]["facts"]["num_classes"] == 30
    assert 1 <= reports[0]["metrics"]["tcsim/mean_rank"] <= 30


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_decoded_ends_the_classification_or_is_left_out(trained, tmp_path, workers, capfd):
    written = write_rsicd_folder(tmp_path / "rsicd", num_test=14, image_size=64)
    scenes = written.scenes["test"]
    cells = [(scene.filename, captions_cell(scene.captions), image_cell(scene.jpeg)) for scene in scenes]
    cells[5] = (*cells[5][:2], image_cell(scenes[5].jpeg[:300]))
    write_rsicd_csv(written.csv_path("test"), cells)
    output = tmp_path / "r.json"
    flags = ["--resume", str(trained / "checkpoints" / "epoch_2.pt"), "--rsicd-data-dir", str(written.folder)]
    flags += ["--output", str(output), "--workers", workers, "--device", "cpu", "--batch-size", "4"]
    said = fails(capfd, classification_main, flags)
    assert scenes[5].filename in said
    assert not output.exists()
    metrics = classification_main([*flags, "--on-bad-sample", "skip"])
    report = json.loads(output.read_text())
    assert report["metrics"] == metrics
    assert report["facts"]["num_images"] == 13
    assert list(report["facts"]["unusable"]) == [scenes[5].filename]
    assert "13 images" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("train_rsicd.sh", ["RSICD_DIR", "RSICD_ITEMS"]),
        ("inference_rsicd_classification.sh", ["RSICD_DIR", "RESUME"]),
        ("visualize_rsicd.sh", ["RSICD_DIR", "RSICD_ITEMS", "RESUME"]),
    ],
)
def test_unset_variables_are_all_named(script, missing):
    result = bash(script)
    assert result.returncode == 2
    assert all(f"  {name}  " in result.stderr for name in missing)


@pytest.mark.parametrize("script", ["train_rsicd.sh", "inference_rsicd_classification.sh", "visualize_rsicd.sh"])
def test_help_needs_no_variables(script):
    result = bash(script, "--help")
    assert result.returncode == 0, result.stderr
    assert "--rsicd-data-dir" in result.stdout


def test_wrong_paths_and_flags_give_one_message(rsicd, trained, tmp_path):
    here = {"RSICD_DIR": str(rsicd.folder), "RSICD_ITEMS": rsicd.external_captions, "LOGS": str(tmp_path)}

    def train(*flags: str, **changes: str) -> subprocess.CompletedProcess:
        return bash("train_rsicd.sh", "--recipe", "rsicd_debug", *flags, **(here | changes))

    absent = "/nowhere/epoch_1.pt"
    cases = [
        (train(RSICD_DIR="/nowhere"), "/nowhere"),
        (train(RSICD_ITEMS="a.json"), "train.json;test.json"),
        (train("--learning-rate", "1"), "learning-rate"),
        (train("--batch-size", "1000"), "--batch-size"),
        (bash("inference_rsicd_classification.sh", **(here | {"RESUME": absent})), absent),
    ]
    for result, message in cases:
        assert result.returncode != 0
        assert message in result.stderr + result.stdout
        assert "Traceback" not in result.stderr, result.stderr
