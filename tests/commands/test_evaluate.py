"""itemizedclip evaluate: the benchmarks of installed packages by name."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, run

from itemizedclip.commands.cli import main as cli
from itemizedclip.commands.evaluate import main
from itemizedclip.evaluation.benchmark import BENCHMARKS
from itemizedclip.models.factory import create_model
from itemizedclip.runtime import registry
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.registry import MissingExtraError, Registry


@dataclass
class Distribution:
    """What pip knows of a package."""

    name: str
    requires: list[str]


@dataclass
class Point:
    """An entry point whose loading fails as an import does."""

    name: str
    absent: str
    dist: Distribution | None
    module: str = "wing.benchmarks"

    def load(self) -> Any:
        raise ModuleNotFoundError(f"No module named {self.absent!r}", name=self.absent)


@dataclass
class Installed:
    """Stands for importlib.metadata.entry_points."""

    points: list[Any] = field(default_factory=list)

    def __call__(self, *, group: str) -> list[Any]:
        return self.points if group == BENCHMARKS.group else []


@pytest.fixture
def installed(monkeypatch) -> Installed:
    """A benchmark of a test, and one whose optional packages are missing."""
    own = Distribution("itemizedclip", ["torch>=2.6", 'SimpleITK>=2.3; extra == "studies"', 'ruff; extra == "dev"'])
    found = Installed([
        EntryPoint("tiny", "tiny_benchmark:TinyOptions", BENCHMARKS.group),
        Point("scans", "simpleitk.io", own),
    ])  # fmt: skip
    monkeypatch.setattr(registry, "entry_points", found)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = create_model("ViT-scenes-ItemizedCLIP")
    path = tmp_path_factory.mktemp("checkpoint") / "epoch_1.pt"
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, path)
    return path


# --- by name ---------------------------------------------------------------------------------------------------------


def shown(capsys, function, *arguments: str) -> str:
    """What a command prints before it leaves with status 0."""
    with pytest.raises(SystemExit) as stopped:
        function(list(arguments))
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_list_has_a_line_for_each(installed, capsys):
    out = shown(capsys, cli, "evaluate", "--help")
    assert "  tiny   Two classes of random pictures: chance, by which nobody learns anything." in out
    assert "  scans  needs pip install -e '.[studies]'" in out
    assert "Further lines" not in out


def test_unknown_and_missing_names(installed, capsys):
    for arguments, status, message in (
        (["tinny"], 2, "evaluate: error: no benchmark named tinny (did you mean tiny?); there are: scans, tiny"),
        ([], 2, "no benchmark named first"),
        (["--batch-size", "3"], 2, "no benchmark named first"),
        (["scans", "--help"], 1, "the benchmark scans needs the package simpleitk: pip install -e '.[studies]'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == status
        assert message in capsys.readouterr().err


def test_things_of_the_core_are_listed_with_those_of_packages():
    offered = Registry("itemizedclip.nothing", "thing", {"b": 2, "a": 1})
    assert offered.names() == ["a", "b"]
    assert offered.load("b") == 2
    with pytest.raises(UserError, match=r"no thing named c; there are: a, b"):
        offered.load("c")


def test_what_brings_a_missing_package(installed):
    installed.points = [Point("far", "pydicom", Distribution("far-wing", ["Pydicom>=2.4; extra == 'scans'"]))]
    with pytest.raises(MissingExtraError, match=r"pip install 'far-wing\[scans\]'$"):
        BENCHMARKS.load("far")
    installed.points = [Point("far", "pydicom", None)]
    with pytest.raises(MissingExtraError, match=r"needs the package pydicom: pip install pydicom$"):
        BENCHMARKS.load("far")
    # A package that misses a module of its own is broken, not incomplete.
    installed.points = [Point("far", "wing.measures", None)]
    with pytest.raises(ModuleNotFoundError):
        BENCHMARKS.load("far")


def test_the_projects_own_benchmarks():
    found = run(sys.executable, "-m", "itemizedclip", "evaluate", "--help")
    assert found.returncode == 0, found.stderr
    for name in ("pub-brain-5", "rsna", "cq500", "ct-rate", "rad-chestct", "rsicd", "coco", "flickr30k"):
        assert f"  {name} " in found.stdout
    lines = [
        "import importlib.util, sys",
        "find = importlib.util.find_spec",
        "importlib.util.find_spec = lambda name: None if name == 'nibabel' else find(name)",
        "from itemizedclip.commands.evaluate import main",
        "main(['--help'])",
    ]
    found = run(sys.executable, "-c", "\n".join(lines))
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("needs pip install -e '.[radiology]'") == 7
    assert re.search(r"  rsicd +30-class zero-shot classification", found.stdout)


# --- an evaluation ---------------------------------------------------------------------------------------------------


def evaluate(checkpoint: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Metrics as returned and as written, and what else the results say."""
    here = ["--data-dir", str(output.parent), "--output", str(output), "--workers", "0", "--device", "cpu"]
    metrics = main(["tiny", "--checkpoint", str(checkpoint), *here, *flags])
    report = json.loads((output / "tiny.results.json").read_text())
    assert report["metrics"] == metrics
    return report


def test_a_benchmark_of_another_package(installed, checkpoint, tmp_path, capsys):
    report = evaluate(checkpoint, tmp_path / "out")
    assert set(report["metrics"]) == {"top1", "top5", "mean_rank"}
    assert (report["evaluation"], report["protocol"], report["checkpoint"]) == ("tiny", "corrected", str(checkpoint))
    facts = report["facts"]
    assert facts["num_images"] == 8
    assert facts["data_dir"] == str(tmp_path)
    assert len(facts["checkpoint_sha256"]) == 64
    assert facts["precision"] == "fp32"
    assert "unusable" not in facts
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"tiny.results.json", "tiny.cases.json", "tiny.empty.png"}
    said = capsys.readouterr()
    assert "these pictures mean nothing" in said.err
    assert "mean_rank" in said.out
    assert "tiny.results.json and " in said.out
    assert "cannot be read" not in said.out
    # Beside the checkpoint, which its published flag names.
    own = main(["tiny", "--resume", str(checkpoint), "--data-dir", str(tmp_path), "--device", "cpu"])
    assert own == report["metrics"]
    beside = json.loads((checkpoint.with_suffix(".tiny") / "tiny.results.json").read_text())
    assert beside["facts"] == facts


def test_bad_pictures_of_a_benchmark(installed, checkpoint, tmp_path, capsys):
    said = fails(capsys, evaluate, checkpoint, tmp_path / "out", "--bad", "3", "5", "--workers", "1")
    assert said.endswith("itemizedclip evaluate tiny: error: 3.png: no picture; copy it again")
    assert not (tmp_path / "out" / "tiny.results.json").exists()
    report = evaluate(checkpoint, tmp_path / "out", "--bad", "3", "5", "--on-bad-sample", "skip")
    assert report["facts"]["num_images"] == 6
    assert list(report["facts"]["unusable"]) == ["image 3", "image 5"]
    assert "2 listed images are missing or cannot be read; see tiny.results.json" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_is_computed(installed, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiny_benchmark.Pictures.__getitem__", None)
    file = tmp_path / "file"
    file.write_text("")
    here = ["tiny", "--checkpoint", str(checkpoint), "--data-dir", str(tmp_path)]
    cases = [
        ([*here, "--output", str(file)], "results cannot be written there"),
        ([*here, "--data-dir", "/nowhere"], "/nowhere: no such folder (--data-dir)"),
        (
            ["tiny", "--checkpoint", "/nowhere.pt", "--data-dir", str(tmp_path)],
            "/nowhere.pt: checkpoint does not exist",
        ),
        ([*here, "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
        ([*here, "--devise", "cpu"], "--devise"),
    ]
    for arguments, message in cases:
        assert message in fails(capsys, main, arguments), arguments
    (tmp_path / "out" / "tiny.results.json").mkdir(parents=True)
    assert "it is a folder" in fails(capsys, main, [*here, "--output", str(tmp_path / "out")])
