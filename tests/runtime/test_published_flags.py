"""Every published script's flags, as they were written, are taken up to the missing files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, fails, run
from itemizedclip_2d import visualize_rsicd, visualize_shards
from itemizedclip_2d.benchmarks import classification_main, retrieval_main
from itemizedclip_2d.recipes import main as train_2d
from itemizedclip_radiology.recipes import main_chest, main_studies

from itemizedclip.runtime.published_flags import IGNORED, RENAMED, own_flags, without_published
from itemizedclip.training.options import RunOptions

FLAGS = json.loads((ROOT / "tests" / "fixtures" / "published-flags.json").read_text())

MAINS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "inference_coco.sh": (retrieval_main, ["coco"]),
    "inference_flickr.sh": (retrieval_main, ["flickr"]),
    "inference_rsicd_classification.sh": (classification_main, []),
    "train_ct.sh": (main_studies, ["--recipe", "ct", "--data-root", "DIR", "--json-root", "DIR"]),
    "train_ctrate.sh": (main_chest, ["--recipe", "ctrate", "--data-root", "DIR", "--items-json", "A.json"]),
    "train_itemized_cc0.3M.sh": (train_2d, ["--recipe", "itemized_cc0.3M"]),
    "train_mri.sh": (main_studies, ["--recipe", "mri", "--data-root", "DIR", "--json-root", "DIR"]),
    "train_rsicd.sh": (train_2d, ["--recipe", "rsicd"]),
    "visualize_itemized_cc3m.sh": (visualize_shards.main, []),
    "visualize_rsicd.sh": (visualize_rsicd.main, []),
}
"""Script → what it runs, and the flags that it makes of its variables."""


def as_written(script: str, folder: Path) -> list[str]:
    """The published flags with paths that are not there."""
    words = [*MAINS[script][1], *(word for flag in FLAGS[script] for word in flag)]
    places = {"CHECKPOINT": str(folder / "none.pt"), "DIR": str(folder / "none"), "A.json": str(folder / "a.json"),
              "B.json": str(folder / "b.json")}  # fmt: skip
    return [re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], word) for word in words]


def test_all_published_scripts_are_here():
    assert set(FLAGS) == set(MAINS)


@pytest.mark.parametrize("script", MAINS)
def test_published_flags_are_taken_up_to_the_missing_files(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, _ = MAINS[script]
    said = fails(capsys, main, as_written(script, tmp_path))
    assert re.search(r"error: .*(no such|do(es)? not exist)", said), said
    assert "without effect here: " in said
    # Each is said once, with its reason.
    for flag in re.findall(r"(--[\w-]+) \(", said.partition("without effect here: ")[2].partition("error:")[0]):
        assert said.count(f"{flag} (") == 1


def test_a_script_runs_as_written(tmp_path):
    """One of them through the shell, without any variable."""
    done = run("bash", str(ROOT / "inference_coco.sh"), *as_written("inference_coco.sh", tmp_path)[1:], cwd=tmp_path)
    assert done.returncode == 1
    assert "none.pt: checkpoint does not exist" in done.stderr
    assert "set these environment variables" not in done.stderr
    missing = run("bash", str(ROOT / "inference_coco.sh"), "--resume", "x.pt", cwd=tmp_path)
    assert missing.returncode == 2
    assert "COCO_DIR" in missing.stderr
    assert "RESUME" not in missing.stderr.partition("for example")[0]


def test_own_flags_win_and_unknown_ones_stay():
    own = own_flags(RunOptions)
    assert {"--batch-size", "--wd", "--resume", "--ila-fac", "--workers"} <= own
    kept = without_published(
        RunOptions, ["--workers", "3", "--use-flair-loss", "--zeroshot-frequency=2", "--vizid", "7"]
    )
    assert kept == ["--workers", "3", "--val-frequency=2", "--vizid", "7"]
    assert without_published(RunOptions, ["--dist-url=env://x", "--epochs", "2"]) == ["--epochs", "2"]
    assert without_published(RunOptions, ["--dist-url"]) == []


def test_the_table_in_the_documents_is_complete():
    page = (ROOT / "docs" / "published-flags.md").read_text()
    for flag, (_, reason) in IGNORED.items():
        assert f"| `{flag}` | – | {reason} |" in page
    for flag, ours in RENAMED.items():
        assert f"| `{flag}` | `{ours}` |" in page
